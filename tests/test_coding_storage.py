"""Files of compressed weights: the same bits everywhere, one error for what is damaged, and the command line."""

import hashlib
import json
import math
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import coding, trees
from jaxcl.coding import arithmetic, storage
from jaxcl.coding.__main__ import main

pytestmark = pytest.mark.core
FIXTURES = Path(__file__).parent / "fixtures"
# SHA-256 of all leaves in the order of their paths, little-endian; written under Python 3.11 and JAX 0.10.2
HASHES = {
    "plain": "51546ff1803ec0bd141ba9559ca33609452850c35793f8297ae00ff3026969a4",
    "adaptive": "5ccdc9ff5d666d52588ea8af17c0ca0e1d81984849cea23524d953a7a7652096",
}
DECODED = """
import hashlib, sys
from jaxcl import coding, trees
leaves = trees.leaves_by_path(coding.decode(coding.load(sys.argv[1])))
print(hashlib.sha256(b"".join(leaves[path].astype("<f4").tobytes() for path in sorted(leaves))).hexdigest())
"""
PARAMS = {
    "params": {
        "Conv_0": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)}, "Dense_0": {"kernel": jnp.zeros((40, 30))},
        "temperature": jnp.zeros(()),
    }
}  # fmt: skip
LAYOUT = coding.layout_of(PARAMS, width=7, seed=2026, values={"params/Dense_0/kernel": 200})


def message(seed=0, bits=13, low=False):
    rng = np.random.default_rng(seed)
    indices = np.exp(rng.normal(3, 1, LAYOUT.blocks)).astype(int) if low else rng.integers(0, 2**bits, LAYOUT.blocks)
    scales = coding.storable(rng.uniform(0.01, 2, len(LAYOUT.leaves)))
    return coding.Message(LAYOUT, scales, bits, np.minimum(indices, 2**bits - 1).astype(np.uint32), 11.25)


def sha(leaves):
    return hashlib.sha256(b"".join(leaves[path].astype("<f4").tobytes() for path in sorted(leaves))).hexdigest()


@pytest.mark.parametrize("name", HASHES)
def test_files_of_old_decode_to_the_same_bits(name):
    leaves = trees.leaves_by_path(coding.decode(coding.load(FIXTURES / f"{name}.jcl")))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: leaf.shape for path, leaf in trees.leaves_by_path(PARAMS).items()
    }
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())
    assert sha(leaves) == HASHES[name]


@pytest.mark.parametrize(
    "settings",
    [
        {"JAX_ENABLE_X64": "1", "JAX_THREEFRY_PARTITIONABLE": "0"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DEFAULT_PRNG_IMPL": "rbg"},
    ],
)
def test_no_setting_of_jax_changes_a_bit(settings):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | settings
    found = subprocess.run(
        [sys.executable, "-c", DECODED, FIXTURES / "plain.jcl"], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout.strip() == HASHES["plain"]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("bits", [1, 13, 30])
def test_what_is_read_is_what_was_written(tmp_path, bits, low):
    written = message(bits=bits, low=low)
    size = coding.save(tmp_path / "w.jcl", written)
    read = coding.load(tmp_path / "w.jcl")
    assert size == (tmp_path / "w.jcl").stat().st_size
    assert read.layout == written.layout and (read.bits, read.kl) == (bits, 11.25)
    np.testing.assert_array_equal(read.indices, written.indices)
    np.testing.assert_array_equal(read.scales, written.scales)
    packed = -(-LAYOUT.blocks * bits // 8)
    beside = coding.header_bytes(LAYOUT, bits)
    assert 60 < beside < 75
    if low and bits > 13:
        assert size < packed / 2 + beside  # low indices take fewer bits
    else:
        assert packed - 2 <= size - beside <= packed + 2 or (low and size - beside < packed)


def test_weights_are_candidates_times_scales_where_the_layout_has_them():
    own = message()
    places = coding.places(LAYOUT)
    drawn = coding.chosen_candidates(2026, np.arange(LAYOUT.blocks), own.indices, 7)
    tree = coding.decode(own)
    for number, (path, leaf) in enumerate(trees.leaves_by_path(tree).items()):
        np.testing.assert_array_equal(leaf, drawn.ravel()[places.of_weights[path]] * own.scales[number])
    assert coding.values(own).shape == (LAYOUT.blocks, 7)


def test_messages_that_cannot_be_stored_are_refused(tmp_path):
    path = tmp_path / "w.jcl"
    with pytest.raises(ValueError, match="rounded with storable"):
        coding.save(path, message()._replace(scales=np.float32([0.1, 0.2, 0.3, 0.4])))
    with pytest.raises(ValueError, match=r"message\.indices: got"):
        coding.save(path, message()._replace(bits=2))
    for other in (
        {"kl": math.nan}, {"bits": 31}, {"bits": 0}, {"indices": np.zeros(3, np.uint32)},
        {"indices": np.full(LAYOUT.blocks, -1)}, {"scales": np.ones(3, np.float32)},
        {"scales": np.zeros(4, np.float32)}, {"scales": np.full(4, 2.0**-100, np.float32)},
        {"scales": np.ones(4)}, {"indices": np.ones(LAYOUT.blocks)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"message\.{next(iter(other))}: got"):
            coding.save(path, message()._replace(**other))
    assert not list(tmp_path.iterdir())


def test_more_weights_than_allowed_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    coding.save(tmp_path / "w.jcl", message())
    monkeypatch.setattr(storage, "_unpack", None)
    monkeypatch.setattr(storage, "decode_symbols", None)
    with pytest.raises(ValueError, match=r"limit: got 1000; .* decodes to 1281 weights"):
        coding.load(tmp_path / "w.jcl", limit=1000)


def summed(content):
    return content + struct.pack("<I", zlib.crc32(content))


def mutated(rng, content):
    content = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        del content[(at := rng.randrange(len(content))) : at + 1 + rng.randrange(4)]
    elif kind == 2:
        content[(at := rng.randrange(len(content))) : at] = rng.randbytes(1 + rng.randrange(4))
    for _ in range(1 + rng.randrange(3) if kind > 2 else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_a_hundred_thousand_damaged_files_give_one_error(monkeypatch):
    files = [(FIXTURES / f"{name}.jcl").read_bytes() for name in HASHES]
    rng = random.Random(0)
    for number in range(100_000):
        damaged = mutated(rng, files[number % 2])
        if damaged in files:
            continue
        monkeypatch.setattr(Path, "read_bytes", lambda _, damaged=damaged: damaged)
        with pytest.raises(ValueError, match="it is damaged, or no file of compressed weights"):
            coding.load("w.jcl")


def test_damage_with_a_right_sum_gives_that_error_or_weights(monkeypatch):
    """As somebody would write it who means harm: whatever the header says, nothing but ValueError comes of it."""
    files = [(FIXTURES / f"{name}.jcl").read_bytes()[:-4] for name in HASHES]
    rng, refused = random.Random(1), 0
    for number in range(5_000):
        damaged = summed(mutated(rng, files[number % 2]))
        monkeypatch.setattr(Path, "read_bytes", lambda _, damaged=damaged: damaged)
        try:
            read = coding.load("w.jcl", limit=100_000)
        except ValueError:
            refused += 1
        else:
            assert all(np.isfinite(leaf).all() for leaf in trees.leaves_by_path(coding.decode(read)).values())
    assert refused > 2_000


def with_header(text, body=b""):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=storage._WORDS)
    header = packer.compress(text.encode()) + packer.flush()
    return summed(b"JCL1" + struct.pack("<H", len(header)) + header + body)


ONE = b"\x80\x3f"  # a scale of 1


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("1 7 0 8 0", b""),  # no leaf
        ("1 7 0 8 0\na\t7", ONE),  # no index
        ("1 7 0 8 0\na\t7", ONE + b"\0\0"),  # one too many
        ("1 0 0 8 0\na\t7", ONE + b"\0"),  # no width
        ("1 7 -1 8 0\na\t7", ONE + b"\0"),  # seed
        ("1 7 0 31 0\na\t7", ONE + b"\0\0\0\0"),  # bits
        ("nan 7 0 8 0\na\t7", ONE + b"\0"),  # KL
        ("1 7 0 8 0\na\t0", ONE + b"\0"),  # no weights
        ("1 7 0 8 0\na\t7:8", ONE + b"\0"),  # more values than weights
        ("1 7 0 8 0\na\t7\na\t7", ONE + ONE + b"\0\0"),  # the same path twice
        ("1 7 0 8 0\na\t7\na/b\t7", ONE + ONE + b"\0\0"),  # a leaf that is a dict
        ("1 7 0 8 0\na\t7", b"\x80\x7f\0"),  # an infinite scale
        ("1 7 0 8 0\na\t7", b"\x80\xbf\0"),  # a negative one
        ("1 1 0 8 1\na\t2147483647", ONE + b"\0\0"),  # two thousand million symbols in no byte
        ("1 1 0 8 0\na\t2147483647", ONE + b"\0\0"),
        ("1 1 0 8 0\na\t99999999999999999999999", ONE + b"\0\0"),
        ("1 1 0 8 0\na\t-7 -1", ONE + b"\0" * 7),
        ("1 1 0 8 0\na\t" + " ".join(["1"] * 65), ONE + b"\0"),  # more axes than an array has
        ("1 1 0 8 0\na\t" + " ".join(["9"] * 300_000), ONE + b"\0"),
        ("1 7 0 8 0\n" + "/".join("a" * 5000) + "\t7", ONE + b"\0"),  # dicts in dicts
        ("1 7 0 8 0\n\x1b[2J\t7", ONE + b"\0"),  # a path that clears the screen
        ("1 1 0 8 1\na\t1024", ONE + b"\xff\xff" + b"\1" * 65535),  # a run that is longer than any can be
        ("1 7 0 8 0\n" + "a" * 3_000_000 + "\t7", ONE + b"\0"),  # a header that inflates to much more than it is
    ],
)
def test_headers_that_lie_are_refused(tmp_path, text, body):
    (tmp_path / "w.jcl").write_bytes(with_header(text, body))
    with pytest.raises(ValueError, match="it is damaged, or no file of compressed weights"):
        coding.load(tmp_path / "w.jcl", limit=2**31)


def test_a_header_that_does_not_lie_is_read(tmp_path):
    (tmp_path / "w.jcl").write_bytes(with_header("1 7 0 8 0\na\t7", ONE + b"\x05"))
    assert coding.load(tmp_path / "w.jcl").indices == [5]


@pytest.mark.parametrize("count", [0, 1, 1024, 3000])
def test_arithmetic_coding_is_lossless_and_near_the_entropy(count):
    symbols = np.random.default_rng(count).binomial(16, 0.3, count)
    code = arithmetic.encode_symbols(symbols, 17)
    decoded, used = arithmetic.decode_symbols(code + b"more", count, 17)
    np.testing.assert_array_equal(decoded, symbols)
    assert used == len(code)
    if count >= 1024:
        shares = np.bincount(symbols) / count
        entropy = -count * np.sum(shares[shares > 0] * np.log2(shares[shares > 0])) / 8
        assert entropy < len(code) < entropy + 25


def test_the_command_line_shows_and_decodes(tmp_path, capsys):
    source = str(FIXTURES / "adaptive.jcl")
    assert main(["inspect", source]) == 0
    shown = capsys.readouterr().out
    assert "117 bytes: 1,281 weights in 281 values, 41 blocks of 7" in shown
    assert "KL 11.50, spent" in shown and "3 x 3 x 1 x 8" in shown and "params/Dense_0/kernel" in shown
    for kind in ("npz", "safetensors"):
        out = tmp_path / f"w.{kind}"
        assert main(["decode", source, "--out", str(out)]) == 0
        if kind == "npz":
            with np.load(out) as file:
                leaves = {path: file[path] for path in file.files}
        else:
            from safetensors.numpy import load_file

            leaves = load_file(out)
        assert sha(leaves) == HASHES["adaptive"]


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_any_name_can_be_decoded_to_arrays(tmp_path, name):
    layout = coding.layout_of({name: jnp.zeros((2, 3)), "b": jnp.zeros(1)}, width=7)
    sent = coding.Message(layout, np.ones(2, np.float32), 4, np.zeros(1, np.uint32), 1.0)
    coding.save(tmp_path / "w.jcl", sent)
    assert main(["decode", str(tmp_path / "w.jcl"), "--out", str(tmp_path / "w.npz")]) == 0
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file[name], coding.decode(sent)[name])


def test_the_command_line_tells_what_is_wrong(tmp_path, capsys):
    (tmp_path / "w.jcl").write_text(json.dumps({}))
    assert main(["inspect", str(tmp_path / "w.jcl")]) == 1
    assert "it is damaged" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.jcl")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["decode", str(FIXTURES / "plain.jcl"), "--out", str(tmp_path / "w.txt")]) == 1
    assert "end it in .npz or .safetensors" in capsys.readouterr().err
    assert main(["inspect", str(FIXTURES / "plain.jcl"), "--limit", "1000"]) == 1
    assert "limit: got 1000" in capsys.readouterr().err
