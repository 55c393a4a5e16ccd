"""The Frechet distance between what a feature network makes of two sets of images, or of anything else."""

from typing import NamedTuple

import numpy as np

from jaxcl.typing import ArrayLike, bad_argument, check_count, check_finite, check_rank


class FeatureStatistics(NamedTuple):
    """Sample statistics of features, in float64 on the host."""

    examples: int  # N
    mean: np.ndarray  # [D]
    scatter: np.ndarray  # [D, D], sum over examples of (x - mean) (x - mean)^T


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Statistics of features [N, D].

    Of a set that is too large for one array: `functools.reduce(merge_statistics, map(feature_statistics, batches))`.

    Raises:
        ValueError: wrong rank, no example, or values that are NaN or infinite.
    """
    check_rank("features", features, 2)
    check_count("features rows", features.shape[0], 1)
    check_finite("features", features)
    values = np.asarray(features, np.float64)
    mean = values.mean(axis=0)
    centred = values - mean
    return FeatureStatistics(len(values), mean, centred.T @ centred)


def merge_statistics(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Statistics of two sets taken together, whose means are [D] each (Chan et al. 1983).

    Deviations are from each set's own mean, so that no digits are lost where means are large beside deviations.

    Raises:
        ValueError: the widths D differ.
    """
    _check_widths(a, b)
    examples = a.examples + b.examples
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift * (a.examples * b.examples / examples))
    return FeatureStatistics(examples, a.mean + shift * (b.examples / examples), scatter)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians of two sets of features (Heusel et al. 2017, eq. 6).

    `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, with covariances over N - 1. The trace of the root is that of
    `(S_a^(1/2) S_b S_a^(1/2))^(1/2)`, the sum of singular values of `S_a^(1/2) S_b^(1/2)`: real, the same in either
    order, and sound where N is below D and covariances lack full rank. The authors' code takes the root of a product
    that is not symmetric, and adds 1e-6 to both diagonals where that fails.

    It may be called the Frechet Inception Distance (FID) only if the features are the 2,048 pooled ones of the
    published Inception-v3 weights and the sets have the customary size (50,000 examples). Otherwise say which features
    and how many examples. Few examples make it too large, by an amount that depends on their number: compare only
    values from equal numbers.

    Args:
        a: statistics of one set, mean [D].
        b: statistics of the other, mean [D].

    Returns:
        The distance, 0 or more, in squared units of the features.

    Raises:
        ValueError: the widths D differ, or a set has fewer than 2 examples.
    """
    _check_widths(a, b)
    for name, statistics in (("a.examples", a), ("b.examples", b)):
        check_count(name, statistics.examples, 2)
    first, second = _factor(a), _factor(b)
    of_root = np.linalg.svd(first.T @ second, compute_uv=False).sum()
    traces = np.square(first).sum() + np.square(second).sum()
    return max(float(np.square(a.mean - b.mean).sum() + traces - 2 * of_root), 0.0)


def _factor(statistics: FeatureStatistics) -> np.ndarray:
    """F [D, rank] with F F^T the covariance: its eigenvectors times the roots of its eigenvalues."""
    values, vectors = np.linalg.eigh(statistics.scatter / (statistics.examples - 1))
    # The root of rounding errors, some 1e-16, would be 1e-8: such eigenvalues are zero.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _check_widths(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise bad_argument(
            "b", f"features of width {b.mean.size}", f"pass those of the same network, of width {a.mean.size}"
        )
