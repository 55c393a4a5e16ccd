"""Data sets of other libraries: TensorFlow Datasets, written here and read back, and Hugging Face's tables."""

import io
import pickle
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from jaxcl import data


def some_images(count, *shape, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8))


# TensorFlow Datasets


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def png(image):
    """TFDS encodes arrays with TensorFlow, but takes the bytes of a file as they are."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return io.BytesIO(file.getvalue())


def prepare(folder, parts, file_format="array_record"):
    """Writes a data set "tiny" of {split: [(image, label)]}."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # it is read by its files alone
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(rows) for split, rows in parts.items()}

        def _generate_examples(self, rows):
            for number, (image, label) in enumerate(rows):
                yield number, {"image": png(image), "label": label}

    Tiny(data_dir=folder, file_format=file_format).download_and_prepare()


def tiny_parts():
    return {
        "train": list(zip(some_images(7, 5, 6, 3), [0, 1, 2, 0, 1, 2, 0], strict=True)),
        "test": list(zip(some_images(3, 5, 6, 3, seed=1), [2, 1, 0], strict=True)),
    }


def in_order(images, labels):
    """Rows as comparable pairs, sorted: TFDS shuffles when it writes."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_a_prepared_data_set_comes_back(tmp_path, file_format):
    parts = tiny_parts()
    prepare(tmp_path, parts, file_format)
    split = data.from_tfds("tiny", data_dir=tmp_path)
    for examples, rows in zip(split, parts.values(), strict=True):
        assert examples.inputs.shape == (len(rows), 5, 6, 3) and examples.inputs.dtype == np.uint8
        assert examples.labels.dtype == np.int32
        assert in_order(examples.inputs[np.arange(len(rows))], examples.labels) == in_order(*zip(*rows, strict=True))
    rows = np.array([4, 0, 4])
    np.testing.assert_array_equal(split.train.inputs[rows], split.train.inputs[np.arange(7)][rows])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(split.train.inputs))[rows], split.train.inputs[rows])
    assert "tensorflow" not in sys.modules


def test_splits_may_be_cut_as_tfds_cuts_them(tmp_path):
    prepare(tmp_path, tiny_parts())
    whole = data.from_tfds("tiny:1.0.0", data_dir=tmp_path).train
    train, test = data.from_tfds("tiny", data_dir=tmp_path, train="train[:5]", test="train[5:]")
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), whole.labels)
    np.testing.assert_array_equal(test.inputs[np.arange(2)], whole.inputs[np.array([5, 6])])


def test_images_that_differ_in_shape_are_named_when_asked_for(tmp_path):
    rows = [(image, 0) for image in (*some_images(3, 5, 6, 3), *some_images(3, 6, 5, 3))]
    prepare(tmp_path, {"train": rows, "test": rows})
    inputs = data.from_tfds("tiny", data_dir=tmp_path).train.inputs
    with pytest.raises(ValueError, match=r"inputs: got uint8 of shape .* in row \d; all must be uint8 of shape"):
        inputs[np.arange(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": "validation"}, r"name: got 'tiny', split 'validation' \(Unknown split.*\); choose a split"),
        ({"label": "class"}, r"label: got 'class'; choose one of 'image', 'label'"),
        ({"image": "picture"}, r"image: got 'picture'; choose one of 'image', 'label'"),
        ({"test": "test[:0]"}, r"name: got 'tiny', split 'test\[:0\]' \(Paths sequence .* 0 length\)"),
        ({"test": "train", "train": "test[:1]"}, r"test.labels: got values from 0 to 2; labels must lie in"),
        ({"data_dir": "nowhere"}, r"name: got 'tiny', split 'train' .* or prepare it: tfds.builder\('tiny'"),
    ],
    ids=["split", "label", "image", "empty", "labels out of range", "folder"],
)  # fmt: skip
def test_what_a_data_set_has_not_is_refused(tmp_path, options, message):
    parts = tiny_parts()
    parts["test"] = [(image, 0) for image, _ in parts["test"]]
    prepare(tmp_path, parts)
    with pytest.raises(ValueError, match=message):
        data.from_tfds("tiny", **{"data_dir": tmp_path} | options)


def test_missing_tfds_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r'tensorflow-datasets: pip install "jaxcl\[tfds\]"'):
        data.from_tfds("tiny")


@pytest.mark.parametrize("features", [("text",), ("premise", "hypothesis")])
def test_texts_of_a_prepared_data_set_are_a_task(tmp_path, features):
    prepare_texts(tmp_path, features)
    train, test = data.text_task_from_tfds("tiny_texts", data_dir=tmp_path, test="train[:2]")
    first = "text zero é" if len(features) == 1 else "hypothesis: hypothesis zero é\npremise: premise zero é"
    assert dict(zip(train.texts, train.labels.tolist(), strict=True))[first] == 1
    assert train.label_names == test.label_names == ["no", "yes"]
    assert test.texts == train.texts[:2] and train.labels.dtype == np.int32 and len(train.texts) == 3


def test_texts_without_labels_or_labels_without_texts_are_refused(tmp_path):
    prepare_texts(tmp_path, ("text",))
    with pytest.raises(ValueError, match=r"test, labels of 'test': got values from -1 to -1"):
        data.text_task_from_tfds("tiny_texts", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"label: got 'class'; choose one of 'label', 'text'"):
        data.text_task_from_tfds("tiny_texts", data_dir=tmp_path, label="class")
    with pytest.raises(ValueError, match=r"name: got 'tiny_texts' of {'label': 'ClassLabel', 'text': 'Text'}; choose"):
        data.text_task_from_tfds("tiny_texts", data_dir=tmp_path, label="text")


def prepare_texts(folder, features):
    """Writes a data set "tiny_texts" whose test rows have no labels, as in GLUE."""
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            own = {name: tfds.features.Text() for name in features}
            own |= {"label": tfds.features.ClassLabel(names=["no", "yes"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(own))

        def _split_generators(self, manager):
            return {"train": self._generate_examples([1, 0, 1]), "test": self._generate_examples([-1])}

        def _generate_examples(self, labels):
            for number, label in enumerate(labels):
                said = ("zero é", "one", "two")[number]
                yield number, {name: f"{name} {said}" for name in features} | {"label": label}

    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()


# Hugging Face


class Table:
    """What `from_hugging_face` uses of a `datasets.Dataset`: a length, rows as dicts, columns."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


def stand_in(images, labels):
    return Table(image=images, label=labels)


def real(images, labels):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


TABLES = pytest.mark.parametrize("table", [stand_in, real])


@TABLES
@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6)], ids=str)
def test_pillow_images_come_as_arrays(table, shape):
    images, labels = some_images(4, *shape), [2, 0, 1, 1]
    rows = table([Image.fromarray(image) for image in images], labels)
    train, test = data.from_hugging_face(rows, table([Image.fromarray(images[0])], [1]))
    assert train.inputs.shape == (4, *shape) and train.inputs.dtype == np.uint8 and test.inputs.shape == (1, *shape)
    np.testing.assert_array_equal(train.inputs[np.array([3, 0])], np.stack([images[3], images[0]]))
    np.testing.assert_array_equal(train.labels, labels)
    assert train.labels.dtype == np.int32


def test_a_table_in_numpy_format_gives_the_same():
    images = some_images(3, 5, 6, 3)
    rows = real([Image.fromarray(image) for image in images], [0, 1, 2]).with_format("numpy")
    train = data.from_hugging_face(rows, rows).train
    np.testing.assert_array_equal(train.inputs[np.arange(3)], np.stack(images))
    np.testing.assert_array_equal(train.labels, [0, 1, 2])


@TABLES
def test_gray_among_colour_is_named_and_the_cast_helps(table):
    images = [Image.fromarray(image) for image in (*some_images(1, 5, 6, 3), *some_images(1, 5, 6))]
    rows = table(images, [0, 0])
    inputs = data.from_hugging_face(rows, rows).train.inputs
    with pytest.raises(ValueError, match=r"shape \(5, 6\) in row 1; all must be uint8 of shape \(5, 6, 3\)"):
        inputs[np.array([0, 1])]
    if table is real:
        rows = rows.cast_column("image", pytest.importorskip("datasets").Image(mode="RGB"))
        assert data.from_hugging_face(rows, rows).train.inputs[np.array([0, 1])].shape == (2, 5, 6, 3)


def test_arrays_under_other_names_are_taken_as_they_are():
    images = some_images(3, 2, 2, 5)
    rows = Table(pixels=[image.astype(np.float32) for image in images], digit=np.array([1, 0, 1], np.int64))
    train = data.from_hugging_face(rows, rows, image="pixels", label="digit").train
    assert train.inputs.dtype == np.float32
    np.testing.assert_array_equal(train.inputs[np.arange(3)], np.stack(images).astype(np.float32))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    rows = stand_in([Image.new(mode, (4, 4))], [0])
    assert data.from_hugging_face(rows, rows).train.inputs[np.array([0])].shape == (1, 4, 4, 3)


def test_an_array_unlike_the_first_in_dtype_is_refused():
    rows = stand_in([np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.float32)], [0, 0])
    inputs = data.from_hugging_face(rows, rows).train.inputs
    with pytest.raises(ValueError, match=r"inputs: got float32 of shape \(2, 2\) in row 1; all must be uint8"):
        inputs[np.array([1])]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], [0], r"train: got no examples; pass one example or more"),
        ([0], [], r"test: got no examples; pass one example or more"),
        ([0, 1], [2], r"test.labels: got values from 2 to 2; labels must lie in \[0, 2\)"),
        ([0, 1], [-1], r"test.labels: got values from -1 to -1; labels must lie in \[0, 2\)"),
        ([-1, 1], [0], r"train.labels: got values from -1 to 1; labels must lie in"),
        (["cat"], [0], r"train.labels: got dtype <U3; pass integer class numbers"),
        ([0], [0.5], r"test.labels: got dtype float64; pass integer class numbers"),
        ([0], [[0]], r"test.labels: got shape \(1, 1\); pass an array with 1 axes"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(train, test, message):
    tables = [stand_in([np.zeros((2, 2), np.uint8)] * len(labels), labels) for labels in (train, test)]
    with pytest.raises(ValueError, match=message):
        data.from_hugging_face(*tables)


@TABLES
@pytest.mark.parametrize("argument", ["image", "label"])
def test_a_column_that_is_not_there_is_refused(table, argument):
    rows = table([Image.new("L", (2, 2))], [0])
    with pytest.raises(ValueError, match=rf"{argument}: got 'x'; choose one of 'image', 'label'"):
        data.from_hugging_face(rows, rows, **{argument: "x"})


def test_sixteen_bits_are_refused_not_cut():
    rows = stand_in([Image.fromarray(np.zeros((2, 2), np.uint16))], [0])
    with pytest.raises(ValueError, match=r"image: got mode I;16; reduce it to 8 bits"):
        data.from_hugging_face(rows, rows)
