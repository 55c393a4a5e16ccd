"""Data sources: splits, features, statistics, and what bad packs give."""

import io
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import data
from jaxcl.continual import Examples

PACKS = Path(os.environ.get("JAXCL_DATA", "missing"))


def needs(name):
    return pytest.mark.skipif(not (PACKS / name).is_file(), reason=f"JAXCL_DATA has no {name}")


class Counted:
    """Rows of an array in memory, given out as lazily as from a file; counts them."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        assert isinstance(rows, np.ndarray) and np.issubdtype(rows.dtype, np.integer)
        self.read += len(rows)
        return self.array[rows]


def test_digits_are_split_evenly_within_each_class():
    from sklearn.datasets import load_digits

    train, test = data.digits()
    images, labels = load_digits(return_X_y=True)
    assert len(train.labels) + len(test.labels) == len(labels) == 1797
    assert train.inputs.dtype == np.uint8 and train.inputs.shape[1:] == (8, 8)
    # Every fifth of each class, so the floor of a fifth of its count.
    np.testing.assert_array_equal(np.bincount(test.labels), np.bincount(labels) // 5)
    everything = np.concatenate([train.inputs, test.inputs]).reshape(-1, 64)
    np.testing.assert_array_equal(np.sort(everything, axis=0), np.sort(images.astype(np.uint8), axis=0))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_hold_out_takes_its_share_of_each_class_and_keeps_order(share):
    labels = np.array([0, 1, 0, 0, 1, 0, 1, 0, 1, 1] * 3)
    inputs = np.arange(30)
    rest, held = data.hold_out(Examples(inputs, labels), share=share)
    # 15 examples of each class; the share of them, rounded down.
    np.testing.assert_array_equal(np.bincount(held.labels, minlength=2), [int(15 * share)] * 2)
    assert sorted([*rest.inputs, *held.inputs]) == list(range(30))
    assert list(held.inputs) == sorted(held.inputs) and list(rest.inputs) == sorted(rest.inputs)
    np.testing.assert_array_equal(labels[held.inputs], held.labels)


def test_hold_out_refuses_a_share_above_one():
    with pytest.raises(ValueError, match=r"share: got 1.5; pass a number from 0 to 1"):
        data.hold_out(Examples(np.zeros(3), np.zeros(3, int)), share=1.5)


def test_flat_features_are_scaled_by_the_training_maximum():
    train = Examples(np.array([[[0, 4], [8, 2]]], np.uint8), np.zeros(1, np.int32))
    test = Examples(np.array([[[16, 0], [0, 0]]], np.uint8), np.zeros(1, np.int32))
    flat = data.flat_features(data.Split(train, test))
    np.testing.assert_array_equal(flat.train.inputs, np.array([[0, 0.5, 1, 0.25]], np.float32))
    np.testing.assert_array_equal(flat.test.inputs, np.array([[2, 0, 0, 0]], np.float32))


def test_what_is_taken_of_lazy_inputs_stays_lazy():
    source = Counted(np.arange(40, dtype=np.uint8).reshape(10, 2, 2))
    examples = Examples(source, np.array([0, 1] * 5))
    rest, held = data.hold_out(examples, share=0.4)
    in_memory = data.hold_out(examples._replace(inputs=source.array), share=0.4)
    assert source.read == 0
    for lazy, plain in zip((rest, held), in_memory, strict=True):
        assert lazy.inputs.shape == plain.inputs.shape and len(lazy.inputs) == len(plain.labels)
        assert lazy.inputs.dtype == np.uint8
        rows = np.array([2, 0, 2])
        np.testing.assert_array_equal(lazy.inputs[rows], plain.inputs[rows])
        np.testing.assert_array_equal(lazy.labels, plain.labels)


def test_what_is_taken_of_a_memory_map_stays_on_disk(tmp_path):
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(4, 2, 2))
    images[:] = np.arange(16).reshape(4, 2, 2)
    rest, held = data.hold_out(Examples(images, np.zeros(4, int)), share=0.25)
    assert not isinstance(rest.inputs, np.ndarray) and not isinstance(held.inputs, np.ndarray)
    np.testing.assert_array_equal(rest.inputs[np.arange(3)], images[:3])


def test_flat_features_read_lazy_inputs_once():
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    train, test = Counted(images), Counted(images[:3])
    flat = data.flat_features(data.Split(Examples(train, np.zeros(6, int)), Examples(test, np.zeros(3, int))))
    np.testing.assert_array_equal(flat.train.inputs, images.reshape(6, 4).astype(np.float32) / np.float32(23))
    np.testing.assert_array_equal(flat.test.inputs, flat.train.inputs[:3])
    assert (train.read, test.read) == (6, 3)


@pytest.mark.parametrize("shape", [(150, 4, 5, 3), (150, 4, 5), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_all_pixels(shape, dtype):
    inputs = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    source = Counted(inputs)
    statistics = data.channel_statistics(Examples(source, np.zeros(len(inputs), int)))
    channels = inputs.reshape(-1, shape[3] if len(shape) == 4 else 1).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, channels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, channels.std(0), rtol=1e-6)
    assert statistics.mean.dtype == statistics.std.dtype == np.float32
    assert source.read == len(inputs)


def test_statistics_survive_a_mean_far_above_the_deviation():
    inputs = 1e6 + np.random.default_rng(0).normal(size=(200, 3, 3, 1))  # the sum of squares would lose the deviation
    statistics = data.channel_statistics(Examples(inputs, np.zeros(200, int)))
    np.testing.assert_allclose(statistics.std, inputs.std(), rtol=1e-6)


@pytest.mark.parametrize(("limit", "rows"), [(1, [0]), (3, [0, 4, 9]), (10, range(10)), (99, range(10))])
def test_limited_statistics_look_evenly_over_the_set(limit, rows):
    inputs = np.random.default_rng(0).integers(0, 256, (10, 2, 2, 3), np.uint8)
    source = Counted(inputs)
    statistics = data.channel_statistics(Examples(source, np.zeros(10, int)), limit=limit)
    np.testing.assert_allclose(statistics.mean, inputs[list(rows)].mean((0, 1, 2)), rtol=1e-6)
    assert source.read == len(rows)


@pytest.mark.parametrize("value", [0.0, 0.1, 255.0])
def test_a_constant_channel_is_normalised_to_zero(value):
    inputs = np.random.default_rng(0).normal(size=(70, 3, 3, 2)).astype(np.float32)
    inputs[..., 1] = value
    statistics = data.channel_statistics(Examples(inputs, np.zeros(70, int)))
    assert statistics.std[1] == 1
    images = np.asarray(data.normalise(statistics, inputs))
    np.testing.assert_allclose(images[..., 1], 0, atol=1e-6)
    np.testing.assert_allclose([images[..., 0].mean(), images[..., 0].std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_normalise_gives_float32_under_jit(dtype):
    statistics = data.Statistics(np.array([1, 2, 3], np.float32), np.array([2, 4, 8], np.float32))
    images = np.arange(24).reshape(2, 2, 2, 3).astype(dtype)
    normal = jax.jit(data.normalise)(statistics, images)
    assert normal.dtype == jnp.float32
    expected = (images.astype(np.float32) - statistics.mean) / statistics.std
    np.testing.assert_allclose(normal, expected, rtol=1e-6)


def test_normalise_takes_images_without_a_channel_axis():
    statistics = data.Statistics(np.array([3], np.float32), np.array([2], np.float32))
    np.testing.assert_array_equal(data.normalise(statistics, np.full((2, 4, 5), 7, np.uint8)), np.full((2, 4, 5), 2))


@pytest.mark.parametrize(("shape", "limit"), [((5, 4), None), ((0, 4, 4, 3), None), ((5, 4, 4), 0)])
def test_statistics_refuse(shape, limit):
    wrong = r"limit: got 0; pass 1 or more" if limit == 0 else r"train.inputs: got shape .*; pass one image or more"
    with pytest.raises(ValueError, match=wrong):
        data.channel_statistics(Examples(np.zeros(shape), np.zeros(shape[0], int)), limit=limit)


def test_load_names_what_there_is():
    with pytest.raises(ValueError, match=r"name: got 'svhn'; choose one of 'digits', 'mnist', 'cifar10'"):
        data.load("svhn")


@needs("mnist.npz")
def test_mnist_has_its_published_counts():
    train, test = data.load("mnist")
    assert train.inputs.shape == (60000, 28, 28) and test.inputs.shape == (10000, 28, 28)
    # LeCun's counts of each digit, as the pack's notes list them.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    np.testing.assert_array_equal(np.bincount(train.labels), counts)


@needs("cifar10.npz")
def test_cifar10_decodes_to_its_published_mean():
    train, test = data.load("cifar10")
    assert train.inputs.shape == (50000, 32, 32, 3) and test.inputs.shape == (10000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(train.labels), [5000] * 10)
    # The mean the pack's notes give for the decoded training images.
    np.testing.assert_allclose(train.inputs.mean(axis=(0, 1, 2)) / 255, [0.4913, 0.4821, 0.4465], atol=2e-4)


@needs("fsdd.npz")
def test_fsdd_has_the_official_split():
    train, test = data.fsdd()
    assert (len(train.audio), len(test.audio), train.sample_rate) == (2700, 300, 8000)
    np.testing.assert_array_equal(np.bincount(test.labels), [30] * 10)
    seconds = sum(len(clip) for clip in train.audio + test.audio) / 8000
    assert seconds == pytest.approx(1312.3, abs=0.1)
    assert train.speaker_names[train.speakers[0]] == "george"


@needs("cl_text.npz")
def test_cl_text_reads_a_task_and_names_those_there_are():
    train, test = data.cl_text("agnews")
    assert (len(train.texts), len(test.texts)) == (4000, 7600)
    assert train.label_names == ["World", "Sports", "Business", "Science or Technology"]
    np.testing.assert_array_equal(np.bincount(train.labels), [968, 1040, 1000, 992])
    with pytest.raises(ValueError, match=r"task: got 'yahoo'; choose one of"):
        data.cl_text("yahoo")


def test_an_unset_folder_is_named(monkeypatch):
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"JAXCL_DATA: got no such environment variable; set it to .* mnist.npz"):
        data.load("mnist")


def test_a_folder_without_the_pack_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"JAXCL_DATA: got .*; set it to a folder that holds mnist.npz"):
        data.load("mnist")


def array_file():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def write_pack(path, **changes):
    arrays = {
        "train_images": np.zeros((2, 28, 28), np.uint8),
        "train_labels": np.zeros(2, np.uint8),
        "test_images": np.zeros((1, 28, 28), np.uint8),
        "test_labels": np.zeros(1, np.uint8),
    } | changes
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})


def write_header(path, shape):
    """An array that says it has this shape."""
    write_pack(path, train_images=None)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", file.getvalue())


def write_member(path, name):
    write_pack(path, **{name: None})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"no array")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(array_file()),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(path.read_bytes()[:60] + b"\xff" * 20 + path.read_bytes()[80:]),
        lambda path: write_pack(path, test_labels=None),
        lambda path: write_pack(path, train_images=np.zeros((2, 784), np.uint8)),
        lambda path: write_pack(path, train_images=np.zeros((2, 28, 27), np.uint8)),
        lambda path: write_pack(path, train_images=np.zeros((2, 28, 28))),
        lambda path: write_header(path, (10**15, 28, 28)),
        lambda path: write_header(path, (10**20, 28, 28)),
        lambda path: write_pack(path, train_labels=np.zeros(3, np.uint8)),
        lambda path: write_pack(path, train_labels=np.array([0, -3])),
        lambda path: write_pack(path, train_labels=np.zeros(2)),
        lambda path: write_member(path, "test_labels"),
        lambda path: write_pack(path, train_images=np.array([{"a": 1}, None], object)),
        lambda path: zipfile.ZipFile(path, "w").close(),
    ],
    ids=[
        "empty",
        "text",
        "npy",
        "cut short",
        "flipped bytes",
        "array missing",
        "wrong rank",
        "other images",
        "images of floats",
        "more than memory has",
        "more than there can be",
        "labels of others",
        "labels below 0",
        "labels that are no integers",
        "no array",
        "pickled objects",
        "no arrays",
    ],
)
def test_a_damaged_pack_gives_one_clear_error(spoil, monkeypatch, tmp_path):
    path = tmp_path / "mnist.npz"
    write_pack(path)
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    assert data.load("mnist").train.inputs.shape == (2, 28, 28)
    spoil(path)
    with pytest.raises(ValueError, match=r"data pack: got .*; the file is damaged or not a jaxcl pack"):
        data.load("mnist")


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.float64])
@pytest.mark.parametrize("offsets", [[0, 5], [1, 3, 4], [0, 3, 2, 4], []], ids=["past the end", "late", "back", "none"])
def test_offsets_that_do_not_cut_the_data_are_refused(offsets, kind, monkeypatch, tmp_path):
    np.savez(
        tmp_path / "cl_text.npz",
        task_names=np.array(["cb"]),
        cb_label_names=np.array(["yes", "no"]),
        cb_train_bytes=np.frombuffer(b"text", np.uint8),
        cb_train_offsets=np.array(offsets, kind),
        cb_train_labels=np.zeros(max(len(offsets) - 1, 0), np.uint8),
    )
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"cb_train_offsets: offsets that do not cut"):
        data.cl_text("cb")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"cb_train_bytes": np.frombuffer(b"\xff\xfe", np.uint8)}, "cb_train_bytes: .*utf-8"),
        ({"cb_train_labels": np.array([2], np.uint8)}, "cb_train_labels: labels that are no classes"),
        ({"cb_train_labels": np.zeros(2, np.uint8)}, "cb_train_labels: 2 uint8 for 1 examples"),
    ],
)
def test_texts_that_are_none_are_refused(changes, fault, monkeypatch, tmp_path):
    arrays = {"task_names": np.array(["cb"]), "cb_label_names": np.array(["yes", "no"])}
    for split in ("train", "test"):
        arrays |= {
            f"cb_{split}_bytes": np.frombuffer(b"ab", np.uint8), f"cb_{split}_offsets": np.array([0, 2]),
            f"cb_{split}_labels": np.zeros(1, np.uint8),
        }  # fmt: skip
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    np.savez(tmp_path / "cl_text.npz", **arrays)
    assert data.cl_text("cb")[0].texts == ["ab"]
    np.savez(tmp_path / "cl_text.npz", **arrays | changes)
    with pytest.raises(ValueError, match=f"data pack: got {fault}"):
        data.cl_text("cb")


def write_cifar100(folder, *, train=7, test=3):
    """Files in the layout of the binary version: coarse label, fine label, then the three colours one by one."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, count in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = rng.integers(0, [20, 100], (count, 2)).astype(np.uint8)
        rows = [labels, images[..., 0].reshape(count, -1), images[..., 1].reshape(count, -1),
                images[..., 2].reshape(count, -1)]  # fmt: skip
        (folder / "cifar-100-binary").mkdir(exist_ok=True)
        (folder / "cifar-100-binary" / f"{name}.bin").write_bytes(np.concatenate(rows, axis=1).tobytes())
        parts[name] = images, labels[:, 1]
    return parts


def test_cifar100_is_read_from_its_binary_version(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    written = write_cifar100(tmp_path)
    for part, (images, labels) in zip(data.load("cifar100"), written.values(), strict=True):
        np.testing.assert_array_equal(part.inputs, images)
        np.testing.assert_array_equal(part.labels, labels)
        assert part.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "JAXCL_DATA: got .*; set it to a folder that holds cifar-100-binary/test.bin"),
        (lambda path: path.write_bytes(b""), "data pack: got test.bin: 0 bytes, which are no rows"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "data pack: got test.bin: 9221 bytes, which are no"),
        (lambda path: path.write_bytes(b"\0d" + path.read_bytes()[2:]), "data pack: got test.bin: labels that are no"),
    ],
    ids=["missing", "empty", "cut short", "label of 100"],
)
def test_damaged_cifar100_gives_one_clear_error(spoil, message, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    write_cifar100(tmp_path)
    spoil(tmp_path / "cifar-100-binary" / "test.bin")
    with pytest.raises(ValueError, match=message):
        data.load("cifar100")
