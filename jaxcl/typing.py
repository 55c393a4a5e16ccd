"""Types, the legend of axis letters, and argument checks whose errors say what to do.

Axis letters, in docstrings and in the comment beside every field of a state:

====== ======================================================
``B``  batch: examples in one step
``N``  vectors, their leading axes flattened; examples in a set
``D``  width of a feature or code vector
``K``  codes in a codebook; classes of a classifier
``C``  codebooks of a key-value bottleneck
``J``  key-value pairs in a codebook
``W``  width of a key
``V``  width of a value
``T``  tasks
``R``  rank of a low-rank map
``S``  seeds that share each step
====== ======================================================
"""

from collections.abc import Collection
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
Key = jax.Array  # a `jax.random.key`: a function that takes one consumes it
PyTree = Any  # tuples, lists, dicts and registered dataclasses with arrays at the leaves


class RandomAccess(Protocol):
    """Examples that stay where they are, in a file say, until rows of them are asked for, as those of a memmap do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...), as of an array."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of what is read."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """Examples [M, ...] of the rows [M], which are integers in [0, N), in their order; threads may ask at once."""


def is_resident(inputs: ArrayLike | RandomAccess) -> bool:
    """Whether inputs [N, ...] are an array in memory, of the host or of a device; a memmap is not."""
    return isinstance(inputs, np.ndarray | jax.Array) and not isinstance(inputs, np.memmap)


class ArgumentError(ValueError):
    """An argument is wrong: the message says all there is to say, without a traceback."""


def bad_argument(argument: str, value: object, fix: str) -> ArgumentError:
    """The one form of jaxcl's errors: which argument, the value it had, what would be right."""
    return ArgumentError(f"{argument}: got {value}; {fix}")


def check_array(argument: str, array: object) -> None:
    """Raises ValueError for lists, tuples and all else without a shape."""
    if not hasattr(array, "shape"):
        raise bad_argument(argument, f"type {type(array).__name__}", "pass an array")


def check_rank(argument: str, array: ArrayLike | RandomAccess, *ranks: int) -> None:
    """Raises ValueError unless `array` is one, and has one of the `ranks` (its number of axes)."""
    check_array(argument, array)
    if len(array.shape) not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise bad_argument(argument, f"shape {tuple(array.shape)}", f"pass an array with {wanted} axes")


def check_width(argument: str, array: ArrayLike, width: int, owner: str) -> None:
    """Raises ValueError unless the last axis of `array` [..., D] is `width`, the width that `owner` has."""
    if array.ndim < 1 or array.shape[-1] != width:
        raise bad_argument(
            argument, f"shape {tuple(array.shape)}", f"its last axis must be {width}, the width of {owner}"
        )


def check_count(argument: str, value: object, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer, `minimum` or more."""
    if not isinstance(value, int | np.integer):
        raise bad_argument(argument, repr(value), f"pass an integer, {minimum} or more")
    check_at_least(argument, int(value), minimum)


def check_at_least(argument: str, value: float, minimum: float) -> None:
    """Raises ValueError if `value` is below `minimum` (or is NaN)."""
    if not value >= minimum:
        raise bad_argument(argument, value, f"pass {minimum} or more")


def check_between(argument: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise bad_argument(argument, value, f"pass a number from {low} to {high}")


def check_choice(argument: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise bad_argument(argument, repr(value), f"choose one of {', '.join(repr(c) for c in choices)}")


def check_finite(argument: str, array: ArrayLike) -> None:
    """Raises ValueError if a concrete `array` holds NaN or infinity; names how many and where the first is.

    Values are looked at, so this is for data on the host (streams, feature caches), not for traced arrays.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):  # which knows bfloat16
        return
    wrong = ~np.isfinite(np.asarray(array))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise bad_argument(
            argument, f"{int(wrong.sum())} values that are NaN or infinite, the first at {first}",
            "remove or repair those examples",
        )  # fmt: skip


def check_labels(argument: str, labels: ArrayLike, classes: int) -> None:
    """Raises ValueError unless concrete `labels` [N] are integers in `[0, classes)`."""
    check_rank(argument, labels, 1)
    if not np.issubdtype(labels.dtype, np.integer):
        raise bad_argument(argument, f"dtype {labels.dtype}", "pass integer class numbers")
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise bad_argument(
            argument, f"values from {int(labels.min())} to {int(labels.max())}",
            f"labels must lie in [0, {classes}): renumber them",
        )  # fmt: skip
