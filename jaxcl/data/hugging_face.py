"""Data sets of Hugging Face's `datasets`, or whatever has rows and columns as they have."""

from functools import partial
from typing import Any, Protocol

import numpy as np

from jaxcl.data.folders import rgb
from jaxcl.data.lazy import Lazy, as_the_first
from jaxcl.data.sources import Split, labelled
from jaxcl.typing import check_choice


class Table(Protocol):
    """What is used of a `datasets.Dataset`."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, key: Any, /) -> Any:
        """A row of an int, as a dict of its columns; the values of a column of its name."""


def from_hugging_face(train: Table, test: Table, *, image: str = "image", label: str = "label") -> Split:
    """Two data sets as a split, lazily: images [N, H, W, 3], or [N, H, W] if the first is gray, and labels [N] int32.

    Rows hold Pillow images or arrays. Arrays are taken as they are. Of Pillow images gray ones stay gray and all
    others become RGB; transparency is dropped. All must be like the first: where gray and colour are mixed,
    convert first with ``train.cast_column("image", datasets.Image(mode="RGB"))``.

    Args:
        train: rows to learn from.
        test: rows to be tested on.
        image: the column of inputs.
        label: the column of classes.

    Raises:
        ValueError: no rows, no such column, labels that are not class numbers; or, when it is asked for, an image
            unlike the first in shape or dtype, or with more than 8 bits a channel.
    """

    def part(argument: str, table: Table) -> tuple[Lazy, np.ndarray]:
        inputs = as_the_first(argument, partial(_read, table, image), len(table))
        check_choice("label", label, sorted(table[0]))
        return inputs, np.asarray(list(table[label]))

    return labelled(*part("train", train), *part("test", test))


def _read(table: Table, image: str, row: int) -> np.ndarray:
    columns = table[row]
    check_choice("image", image, sorted(columns))
    pixels = columns[image]
    if hasattr(pixels, "convert") and pixels.mode != "L":
        pixels = rgb(pixels)
    return np.asarray(pixels)
