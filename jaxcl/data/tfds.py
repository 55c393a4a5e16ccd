"""TensorFlow Datasets without TensorFlow: data sets that were prepared for random access."""

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxcl.data.lazy import Lazy, as_the_first
from jaxcl.data.packs import Texts
from jaxcl.data.sources import Split, labelled
from jaxcl.typing import bad_argument, check_choice, check_labels


def from_tfds(
    name: str,
    *,
    data_dir: str | Path | None = None,
    train: str = "train",
    test: str = "test",
    image: str = "image",
    label: str = "label",
) -> Split:
    """A prepared data set, lazily: images [N, H, W, channels] as they are stored, labels [N] int32.

    Nothing is downloaded. An image is decoded each time it is asked for. Labels are read here, once, which reads
    through the files that hold them.

    Args:
        name: as TFDS has it, with a config and version if need be: "mnist", "mnist:3.0.1".
        data_dir: where TFDS keeps its data sets; None for its own default.
        train: the split to learn from, as TFDS writes splits: "train", "train[:90%]".
        test: the split to be tested on.
        image: the feature that is the input.
        label: the feature that is the class.

    Raises:
        ValueError: the data set is not there, or not prepared as array_record or parquet; no such split or feature;
            labels that are not class numbers; or, when it is asked for, an image unlike the first in shape or dtype.
        ImportError: tensorflow-datasets is missing.
    """
    tfds = _library()

    def part(argument: str, split: str) -> tuple[Lazy, np.ndarray]:
        source = _open(name, split, data_dir)
        features = sorted(source.dataset_info.features)
        check_choice("image", image, features)
        check_choice("label", label, features)
        rows = _open(name, split, data_dir, decoders={image: tfds.decode.SkipDecoding()})
        labels = np.array([row[label] for row in rows])
        return as_the_first(argument, partial(_read, source, image), len(source)), labels

    return labelled(*part("train", train), *part("test", test))


def text_task_from_tfds(
    name: str, *, data_dir: str | Path | None = None, train: str = "train", test: str = "test", label: str = "label"
) -> tuple[Texts, Texts]:
    """One task of texts from a prepared data set, (train, test), read into memory; labels are [N].

    A text is all features of text that a row has, in the order of their names; where there are several, each is a line
    that begins with its name, "hypothesis: ...". Nothing is downloaded.

    Args:
        name: as TFDS has it, with a config and version if need be: "ag_news_subset", "glue/rte:2.0.0".
        data_dir: where TFDS keeps its data sets; None for its own default.
        train: the split to learn from, as TFDS writes splits: "train", "train[:5000]".
        test: the split to be tested on; that of GLUE and SuperGLUE has no labels: pass "validation".
        label: the feature that is the class.

    Raises:
        ValueError: as `from_tfds`; or a label that is no class with a name, or no feature that is text.
        ImportError: tensorflow-datasets is missing.
    """
    tfds = _library()

    def part(argument: str, split: str) -> Texts:
        source = _open(name, split, data_dir)
        features = source.dataset_info.features
        check_choice("label", label, sorted(features))
        shown = sorted(of for of, feature in features.items() if isinstance(feature, tfds.features.Text))
        if not shown or not isinstance(features[label], tfds.features.ClassLabel):
            kinds = {of: type(feature).__name__ for of, feature in sorted(features.items())}
            raise bad_argument("name", f"{name!r} of {kinds}", "choose one with texts and a class as its label")
        texts, labels = [], []
        for row in source:
            parts = [row[of].decode() for of in shown]
            texts.append(parts[0] if len(shown) == 1 else "\n".join(map("{}: {}".format, shown, parts)))
            labels.append(row[label])
        names = list(features[label].names)
        check_labels(f"{argument}, labels of {split!r}", np.array(labels), len(names))
        return Texts(texts, np.array(labels, np.int32), names)

    return part("train", train), part("test", test)


def _library() -> ModuleType:
    try:
        import tensorflow_datasets  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('this source needs tensorflow-datasets: pip install "jaxcl[tfds]"') from error
    library: ModuleType = tensorflow_datasets
    return library


def _open(name: str, split: str, data_dir: str | Path | None, **options: Any) -> Any:
    try:
        return _library().data_source(name, split=split, data_dir=data_dir, download=False, **options)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]  # what follows may be a list of all data sets
        raise bad_argument(
            "name", f"{name!r}, split {split!r} ({reason})",
            f"choose a split that it has, or prepare it: tfds.builder({name!r}, data_dir=..., "
            "file_format='array_record').download_and_prepare()",
        ) from error  # fmt: skip


def _read(source: Any, image: str, row: int) -> np.ndarray:
    return np.asarray(source[row][image])
