"""Inputs that stay where they are until rows of them are asked for: each class here is a `typing.RandomAccess`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcl.typing import ArrayLike, RandomAccess, bad_argument, is_resident


@dataclass(frozen=True, eq=False)
class Lazy:
    """Examples that are read one by one; it can be pickled if `read` can."""

    read: Callable[[int], np.ndarray]  # row -> example [...], all of one shape and dtype
    shape: tuple[int, ...]  # (N, ...)
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        batch = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for place, row in enumerate(rows):
            example = self.read(int(row))
            if example.shape != self.shape[1:] or example.dtype != self.dtype:
                raise bad_argument(
                    "inputs", f"{example.dtype} of shape {example.shape} in row {row}",
                    f"all must be {self.dtype} of shape {self.shape[1:]}, as the first is: convert or resize them",
                )  # fmt: skip
            batch[place] = example
        return batch


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a source, in the order given."""

    source: ArrayLike | RandomAccess  # [N, ...]
    rows: np.ndarray  # [M]

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, ...)."""
        return (len(self.rows), *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the source."""
        return self.source.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        return np.asarray(self.source[self.rows[rows]])


def as_the_first(argument: str, read: Callable[[int], np.ndarray], count: int) -> Lazy:
    """`count` examples [...] with the shape and dtype of the first, which is read here; ValueError if there is none."""
    if not count:
        raise bad_argument(argument, "no examples", "pass one example or more")
    first = read(0)
    return Lazy(read, (count, *first.shape), first.dtype)


def take(inputs: ArrayLike | RandomAccess, rows: np.ndarray) -> np.ndarray | Subset:
    """Rows [M] of inputs [N, ...], as inputs [M, ...]: an array of an array in memory, else as lazy as they were."""
    return np.asarray(inputs)[rows] if is_resident(inputs) else Subset(inputs, rows)


def read_all(inputs: ArrayLike | RandomAccess) -> np.ndarray:
    """Inputs [N, ...] as an array in memory."""
    return np.asarray(inputs) if isinstance(inputs, np.ndarray | jax.Array) else inputs[np.arange(len(inputs))]
