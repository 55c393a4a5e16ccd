"""What an accuracy matrix says: transfer, forgetting, and intervals over seeds.

`accuracy[i, j]` is the accuracy, a fraction, on task j's test set after training stage i. The diagonal metrics need a
stage for each task; where they are undefined (a single task, or one joint stage over many tasks) they are NaN, so that
a table shows a gap rather than a flattering zero. Host code: NumPy in, Python floats out.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit  # SciPy comes with JAX

from jaxcl.typing import ArrayLike, bad_argument, check_rank, check_width


def average_accuracy(accuracy: ArrayLike) -> float:
    """ACC: the mean of the last row of `accuracy` [I, T]. NaN if there is no task."""
    accuracy = _matrix(accuracy)
    return float(accuracy[-1].mean()) if accuracy.size else float("nan")


def backward_transfer(accuracy: ArrayLike) -> float:
    """BWT of `accuracy` [T, T]: mean over j < T-1 of `accuracy[T-1, j] - accuracy[j, j]` (Lopez-Paz & Ranzato 2017).

    NaN for a single task, and where there is not one training stage a task.
    """
    accuracy = _matrix(accuracy)
    if not _has_history(accuracy):
        return float("nan")
    return float((accuracy[-1, :-1] - np.diagonal(accuracy)[:-1]).mean())


def forward_transfer(accuracy: ArrayLike, untrained: ArrayLike) -> float:
    """FWT: mean over j > 0 of `accuracy[j-1, j] - untrained[j]` (Lopez-Paz & Ranzato 2017, eq. 4).

    `accuracy` is [T, T], `untrained` [T] the accuracies before any training. NaN for a single task, and where there is
    not one training stage a task. Raises ValueError if the two disagree on T.
    """
    accuracy, untrained = _matrix(accuracy), np.asarray(untrained, np.float64)
    check_rank("untrained", untrained, 1)
    check_width("untrained", untrained, accuracy.shape[1], "accuracy")
    if not _has_history(accuracy):
        return float("nan")
    return float((np.diagonal(accuracy, 1) - untrained[1:]).mean())


def forgetting(accuracy: ArrayLike) -> float:
    """Mean over j < T-1 of the best earlier accuracy on task j less the final one (Chaudhry et al. 2018, eq. 3).

    `accuracy` is [T, T]. NaN for a single task, and where there is not one training stage a task.
    """
    accuracy = _matrix(accuracy)
    if not _has_history(accuracy):
        return float("nan")
    return float((accuracy[:-1, :-1].max(axis=0) - accuracy[-1, :-1]).mean())


def learning_accuracy(accuracy: ArrayLike) -> float:
    """Mean of the diagonal of `accuracy` [T, T]: how well each task is learned at its own time. NaN if not square."""
    accuracy = _matrix(accuracy)
    if not accuracy.size or accuracy.shape[0] != accuracy.shape[1]:
        return float("nan")
    return float(np.diagonal(accuracy).mean())


def average_anytime_accuracy(accuracy: ArrayLike) -> float:
    """Mean over stages i of the mean over tasks j <= i of `accuracy` [T, T] (Caccia et al. 2021). NaN if not square."""
    accuracy = _matrix(accuracy)
    if not accuracy.size or accuracy.shape[0] != accuracy.shape[1]:
        return float("nan")
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(accuracy)]))


def interval95(values: ArrayLike, axis: int = 0) -> np.ndarray:
    """Half-width of the 95 % confidence interval of the mean along `axis` (Student's t); same axes less that one.

    NaN values are left out; NaN comes back where fewer than two values are left.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0)
    mean = total.sum(axis=axis, keepdims=True) / np.maximum(finite.sum(axis=axis, keepdims=True), 1)
    variance = (np.where(finite, values - mean, 0.0) ** 2).sum(axis=axis) / np.maximum(count - 1, 1)
    half_width = stdtrit(np.maximum(count - 1, 1), 0.975) * np.sqrt(variance / np.maximum(count, 1))
    return np.where(count >= 2, half_width, np.nan)


def summarise(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean, sample standard deviation and half-width of the 95 % interval of one metric over seeds.

    Args:
        values: one value a seed; NaN where undefined, and then left out of the statistics.

    Returns:
        {"mean", "std", "ci95", "values"}; NaN where too few values are defined.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise bad_argument("values", "no values", "pass one value a seed")
    finite = np.asarray([v for v in values if np.isfinite(v)], np.float64)
    return {
        "mean": float(finite.mean()) if finite.size else float("nan"),
        "std": float(finite.std(ddof=1)) if finite.size > 1 else float("nan"),
        "ci95": float(interval95(finite)),
        "values": [float(v) for v in values],
    }


def _matrix(accuracy: ArrayLike) -> np.ndarray:
    accuracy = np.asarray(accuracy, np.float64)
    check_rank("accuracy", accuracy, 2)
    return accuracy


def _has_history(accuracy: np.ndarray) -> bool:
    return accuracy.shape[0] == accuracy.shape[1] and accuracy.shape[0] > 1
