"""Files of masks: bit for bit what was saved, as small as their entropy lets them be, and errors for all else."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masks import TASKS, method_of, network, network_params, results

from jaxcl import masks, trees
from jaxcl.masks import storage

pytest.importorskip("constriction")

SHAPES = {"first": (40, 33), "second": (3, 3, 5, 35)}


def random_bank(densities, *, tasks=3, seed=0):
    """By chance a weight in so many is kept, by each task independently."""
    rng = np.random.default_rng(seed)
    bank = (
        masks.winning_subnetwork(lambda path: path in SHAPES, tasks, sparsity=0.5)
        .init(jax.random.key(0), {name: jnp.ones(shape) for name, shape in SHAPES.items()} | {"own": jnp.ones(3)})[1]
        .bank
    )
    kept = {name: rng.random((tasks, *shape)) < densities for name, shape in SHAPES.items()}
    own = {"own": rng.normal(size=(tasks, 3)).astype(np.float32)}
    return keeping(bank._replace(own=own), kept), kept


def keeping(bank, kept):
    """A bank whose tasks keep these weights, by path bool [T, ...]."""
    owner = {
        name: np.where(of.any(axis=0), of.argmax(axis=0), masks.FREE).astype(np.uint8) for name, of in kept.items()
    }
    packed = {name: np.packbits(of.reshape(len(of), -1), axis=1) for name, of in kept.items()}
    return bank._replace(masks=packed, owner=owner)


def assert_same(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "name", ["ib_masks", "ib_masks, one scale", "ib_masks, float scales", "winning_subnetwork", "packnet"]
)
def test_a_bank_comes_back_to_the_bit_and_answers_the_same(name, tmp_path):
    method = method_of(name)
    masked, state = results(name)[-1][1]
    costs = masks.save_bank(tmp_path / "bank", method.bank(state), TASKS)
    stored = masks.load_bank(tmp_path / "bank")
    assert stored.tasks == TASKS
    assert_same(stored.bank, method.bank(state))
    again = state._replace(bank=stored.bank)
    x = jax.random.normal(jax.random.key(0), (100, 7))
    for task in range(TASKS):
        one, two = (network(method.select(masked, each, task), x) for each in (state, again))
        np.testing.assert_array_equal(one, two)
    floats = 4 * sum(owner.size for owner in stored.bank.owner.values())
    assert (costs[-1].masks > floats) == (name == "ib_masks, float scales")
    size = (tmp_path / "bank").stat().st_size
    assert sum(cost.masks + cost.own for cost in costs) < size < sum(cost.masks + cost.own for cost in costs) + 600


@pytest.mark.parametrize("name", ["ib_masks", "winning_subnetwork", "packnet"])
def test_a_file_with_weights_holds_all_that_it_takes_to_answer(name, tmp_path):
    method = method_of(name)
    masked, state = results(name)[-1][1]
    without = masks.save_bank(tmp_path / "bank", method.bank(state), TASKS)
    assert masks.load_bank(tmp_path / "bank").weights is None
    assert masks.save_bank(tmp_path / "all", method.bank(state), TASKS, weights=masked.weights) == without
    stored = masks.load_bank(tmp_path / "all")
    assert_same(stored.bank, method.bank(state))
    blank = jax.tree.map(jnp.zeros_like, masked.weights)
    again = masked._replace(weights=trees.replace_leaves(blank, stored.weights))
    x = jax.random.normal(jax.random.key(0), (100, 7))
    for task in range(TASKS):
        one = network(method.select(masked, state, task), x)
        two = network(method.select(again, state._replace(bank=stored.bank), task), x)
        np.testing.assert_array_equal(one, two)
    kept = sum(int((owner != masks.FREE).sum()) for owner in stored.bank.owner.values())
    beyond = (tmp_path / "all").stat().st_size - (tmp_path / "bank").stat().st_size
    assert 4 * kept < beyond < 4 * kept + 200


def test_weights_of_another_network_are_refused(tmp_path):
    method = method_of("winning_subnetwork")
    masked, state = results("winning_subnetwork")[-1][1]
    other = jax.tree.map(lambda leaf: leaf[..., :1], masked.weights)
    with pytest.raises(ValueError, match=r"weights: got .*; pass parameters whose leaves with masks are"):
        masks.save_bank(tmp_path / "bank", method.bank(state), TASKS, weights=other)


def test_a_count_of_weights_that_the_masks_belie_is_an_error(tmp_path):
    bank, kept = random_bank(0.3)
    masks.save_bank(tmp_path / "bank", bank, 3, weights={name: jnp.ones(shape) for name, shape in SHAPES.items()})
    content = (tmp_path / "bank").read_bytes()[:-4]
    first, second = (f'"{name}": ["float32", {kept[name].any(axis=0).sum()}]'.encode() for name in SHAPES)
    counts = [int(part.split()[-1][:-1]) for part in (first, second)]
    for part, change in ((first, -1), (second, 1)):  # together as many bytes as before
        count = counts[0 if part is first else 1]
        content = content.replace(part, part.replace(str(count).encode(), str(count + change).encode()))
    (tmp_path / "bank").write_bytes(content + struct.pack("<I", zlib.crc32(content)))
    with pytest.raises(ValueError, match="it is damaged, or no file of masks"):
        masks.load_bank(tmp_path / "bank")


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.98])
def test_masks_of_chance_cost_little_more_than_their_entropy(density, tmp_path):
    bank, kept = random_bank(density)
    costs = masks.save_bank(tmp_path / "bank", bank, 3)
    weights = sum(of[0].size for of in kept.values())
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    for cost in costs:
        assert 8 * cost.masks < 1.12 * entropy * weights + 100
        assert cost.own == 12
    assert masks.huffman_bits(bank, 3) >= 3 * entropy * 0.97


def test_what_rows_columns_and_earlier_tasks_tell_is_not_paid_for(tmp_path):
    """A task that keeps the same as the one before, but for few; and whole rows and columns that nothing keeps."""
    bank, kept = random_bank(0.5)
    rng = np.random.default_rng(1)
    alone = masks.save_bank(tmp_path / "bank", bank, 1)[0].masks
    for of in kept.values():
        of[1] = of[0] ^ (rng.random(of[0].shape) < 0.01)
    assert masks.save_bank(tmp_path / "bank", keeping(bank, kept), 2)[1].masks < 0.2 * alone
    for of in kept.values():
        of[0, ::2] = False
        of[0, ..., 1::2] = False
    assert masks.save_bank(tmp_path / "bank", keeping(bank, kept), 1)[0].masks < 0.55 * alone


@pytest.mark.parametrize("shape", [(), (5,), (100_000,), (1, 100_000), (100_000, 1), (20_000, 3), (20_000, 40)])
def test_a_leaf_of_any_shape_takes_few_runs(shape, tmp_path, monkeypatch):
    calls = []
    surprise = storage._surprise
    monkeypatch.setattr(storage, "_surprise", lambda *args: calls.append(args) or surprise(*args))
    kept = {"first": np.random.default_rng(0).random((2, *shape)) < 0.1}
    method = masks.winning_subnetwork(lambda path: path == "first", 2, sparsity=0.5)
    bank = keeping(method.init(jax.random.key(0), {"first": jnp.ones(shape)})[1].bank, kept)
    (cost, _) = masks.save_bank(tmp_path / "bank", bank, 2)
    assert len(calls) <= 2 * 2 * 2 * 8192  # for row and column, two tasks, and the shorter last part of each row
    assert 8 * cost.masks <= 0.5 * np.prod(shape) + 100  # 0.469 is the entropy
    assert_same(masks.load_bank(tmp_path / "bank").bank, bank)


def test_tasks_in_another_order_are_refused(tmp_path):
    method = method_of("ib_masks")
    masked, state = method.init(jax.random.key(0), network_params())
    for task in (1, 0):
        masked, state = method.commit(jax.random.key(1), masked, state, task)
    with pytest.raises(
        ValueError, match=r"bank: got hidden_0/kernel of other owners; commit tasks once each: 0, 1, 2 and so on"
    ):
        masks.save_bank(tmp_path / "bank", state.bank, 2)


def test_leaves_without_a_mask_keep_their_type(tmp_path):
    bank, _ = random_bank(0.3)
    own = {
        name: jnp.ones((3, 2), name) for name in ("bool", "bfloat16", "float16", "int8", "uint32", "complex64")
    } | {"none": jnp.ones((3, 0))}  # fmt: skip
    masks.save_bank(tmp_path / "bank", bank._replace(own=own), 3)
    assert_same(masks.load_bank(tmp_path / "bank").bank.own, own)
    with pytest.raises(ValueError, match="bank: got leaves of float8_e4m3fn; a file has leaves of bool, int8"):
        masks.save_bank(tmp_path / "bank", bank._replace(own={"own": jnp.ones((3, 2), jnp.float8_e4m3fn)}), 3)
    masks.save_bank(tmp_path / "bank", bank._replace(own={"own": np.ones((3, 2))}), 3)
    with pytest.raises(ValueError, match="with leaves of float64; set jax_enable_x64 before loading it"):
        masks.load_bank(tmp_path / "bank")


def test_a_file_holds_many_tasks(tmp_path):
    bank, _ = random_bank(0.3, tasks=30)
    masks.save_bank(tmp_path / "bank", bank, 30)
    stored = masks.load_bank(tmp_path / "bank")
    assert stored.tasks == 30
    assert_same(stored.bank.masks, bank.masks)


def test_a_file_has_room_for_more_tasks(tmp_path):
    bank, _ = random_bank(0.3)
    masks.save_bank(tmp_path / "bank", bank, 2)
    stored = masks.load_bank(tmp_path / "bank", capacity=5)
    assert stored.tasks == 2 and {len(leaf) for leaf in jax.tree.leaves((stored.bank.masks, stored.bank.own))} == {5}
    np.testing.assert_array_equal(stored.bank.masks["first"][:2], bank.masks["first"][:2])
    assert not stored.bank.masks["first"][2:].any()
    with pytest.raises(ValueError, match="capacity: got 1; pass a number from 2 to 255"):
        masks.load_bank(tmp_path / "bank", capacity=1)
    with pytest.raises(ValueError, match="tasks: got 4; pass a number from 1 to 3"):
        masks.save_bank(tmp_path / "bank", bank, 4)


def test_damaged_files_are_errors(tmp_path):
    """Ten thousand: bytes changed, cut off, put in, swapped; never a crash, nor another mask."""
    _, state = results("ib_masks")[-1][1]
    masks.save_bank(tmp_path / "bank", state.bank, TASKS)
    content = (tmp_path / "bank").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for number in range(10_000):
        damaged = bytearray(content)
        at = int(rng.integers(len(content)))
        if number % 4 == 0:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif number % 4 == 1:
            del damaged[at:]
        elif number % 4 == 2:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            damaged[at : at + 4] = rng.bytes(4)
        if damaged == content:
            continue
        path.unlink(missing_ok=True)  # some file systems put to the disk what takes a file's place
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path: got .*damaged; it is damaged, or no file of masks"):
            masks.load_bank(path)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{}", b'{"masks": {"a": [-1]}, "own": {}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [1099511627776]}, "own": {}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {}, "own": {}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [1%s]}, "own": {}, "scale_bits": null, "coded": [0]}' % (b", 1" * 32),
        b'{"masks": {"a": [8]}, "own": {"b": [null, 0]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"b": [["int8"], 0]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"b": ["longdouble", 0]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"b": ["f4,(", 0]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"b": ["object", 1]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": 31, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": 70, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": "x", "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": 3.0, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"b": ["float32", 0, 2305843009213693952]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {"a": ["float32", 0]}, "scale_bits": null, "coded": [0]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": ["0"]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [%s0]}' % (b"0, " * 255),
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [-4]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": []}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [3]}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [0], "weights": {"b": ["float32", 0]}}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [0], "weights": {"a": ["float32", -1]}}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [0], "weights": {"a": ["object", 0]}}',
        b'{"masks": {"a": [8]}, "own": {}, "scale_bits": null, "coded": [0], "weights": [["a"]]}',
    ],
)  # fmt: skip
def test_headers_that_lie_are_errors_though_the_sum_is_right(header, tmp_path):
    content = b"JAXCLMK2" + struct.pack("<I", len(header)) + header
    (tmp_path / "bank").write_bytes(content + struct.pack("<I", zlib.crc32(content)))
    with pytest.raises(ValueError, match="it is damaged, or no file of masks"):
        masks.load_bank(tmp_path / "bank")


def test_coded_words_that_no_encoder_wrote_are_an_error_or_other_masks(tmp_path):
    """With a sum that is right; never a crash."""
    bank, _ = random_bank(0.3)
    masks.save_bank(tmp_path / "bank", bank, 3)
    content = (tmp_path / "bank").read_bytes()[:-4]
    rng, faults = np.random.default_rng(0), 0
    for _ in range(50):
        at = int(rng.integers(len(content) - 500, len(content) - 40)) // 4 * 4
        forged = content[:at] + rng.bytes(8) + content[at + 8 :]
        (tmp_path / "forged").write_bytes(forged + struct.pack("<I", zlib.crc32(forged)))
        try:
            masks.load_bank(tmp_path / "forged")
        except ValueError as error:
            faults += "it is damaged" in str(error)
    assert faults > 0


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(OSError, match="bank"):
        masks.load_bank(tmp_path / "bank")
