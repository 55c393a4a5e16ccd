"""TensorFlow Datasets without TensorFlow: data sets that were prepared for random access."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.lazy import Lazy, as_the_first
from jaxcl.data.sources import Split, labelled
from jaxcl.typing import bad_argument, check_choice


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
    try:
        import tensorflow_datasets  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('from_tfds needs tensorflow-datasets: pip install "jaxcl[tfds]"') from error

    def part(argument: str, split: str) -> tuple[Lazy, np.ndarray]:
        source = open_source(split)
        features = sorted(source.dataset_info.features)
        check_choice("image", image, features)
        check_choice("label", label, features)
        rows = open_source(split, decoders={image: tensorflow_datasets.decode.SkipDecoding()})
        labels = np.array([row[label] for row in rows])
        return as_the_first(argument, partial(_read, source, image), len(source)), labels

    def open_source(split: str, **options: Any) -> Any:
        try:
            return tensorflow_datasets.data_source(name, split=split, data_dir=data_dir, download=False, **options)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]  # what follows may be a list of all data sets
            raise bad_argument(
                "name", f"{name!r}, split {split!r} ({reason})",
                f"choose a split that it has, or prepare it: tfds.builder({name!r}, data_dir=..., "
                "file_format='array_record').download_and_prepare()",
            ) from error  # fmt: skip

    return labelled(*part("train", train), *part("test", test))


def _read(source: Any, image: str, row: int) -> np.ndarray:
    return np.asarray(source[row][image])
