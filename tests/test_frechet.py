"""The Frechet distance against SciPy's matrix root, and its statistics against NumPy's."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy.linalg import sqrtm

from jaxcl.reconstruction import FeatureStatistics, feature_statistics, frechet_distance, merge_statistics

pytestmark = pytest.mark.core


def features(seed, count, width, *, rank=None, offset=0.0):
    """Correlated features [count, width] in a space of `rank` dimensions."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, rank or width)) @ rng.normal(size=(rank or width, width)) + offset


def reference(x, y):
    """Heusel et al. 2017, eq. 6, with the root of the product itself."""
    covariances = [np.cov(values, rowvar=False) for values in (x, y)]
    shift = x.mean(axis=0) - y.mean(axis=0)
    root = sqrtm(covariances[0] @ covariances[1])
    return shift @ shift + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(root).real


def distance(x, y):
    return frechet_distance(feature_statistics(x), feature_statistics(y))


@pytest.mark.parametrize("width", [1, 2, 7, 30])
def test_the_distance_is_its_formula(width):
    if width == 1:  # where the formula is (m - n)^2 + (s - t)^2
        x, y = features(0, 50, 1), features(1, 60, 1, offset=0.3)
        expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    else:
        x, y = features(0, 3 * width, width), features(1, 4 * width, width, offset=0.3)
        expected = reference(x, y)
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-12)
    assert isinstance(distance(x, y), float)


def test_covariances_that_commute_have_a_closed_form():
    """Diagonal ones: the sum of squared differences of means and of deviations."""
    rng = np.random.default_rng(0)
    means, spreads = rng.normal(size=(2, 9)), rng.uniform(0, 3, size=(2, 9))
    spreads[0, :4] = 0
    first, second = (
        FeatureStatistics(11, mean, 10 * np.diag(spread**2)) for mean, spread in zip(means, spreads, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2 + (spreads[0] - spreads[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "rank"), [(5, None), (200, 3)])
def test_covariances_without_full_rank_are_sound(count, rank):
    """Rotated into the few dimensions that the two sets fill, the distance is an ordinary one of full rank."""
    x, y = features(0, count, 40, rank=rank), features(1, count, 40, rank=rank, offset=0.1)
    together = np.concatenate([x - x.mean(axis=0), y - y.mean(axis=0)])
    _, sizes, basis = np.linalg.svd(together, full_matrices=False)
    basis = basis[sizes > 1e-9 * sizes[0]]
    within = [values @ basis.T + 1e-7 * np.random.default_rng(2).normal(size=(count, len(basis))) for values in (x, y)]
    covariances = [np.cov(values, rowvar=False) for values in within]
    outside = x.mean(axis=0) - y.mean(axis=0)
    trace = np.trace(covariances[0] + covariances[1])
    expected = outside @ outside + trace - 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real
    assert distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert 0 <= distance(x, x) < 1e-12 * trace


def test_a_set_is_at_no_distance_from_itself_whatever_its_scale():
    for scale in (1e-6, 1.0, 1e6):
        x = scale * features(0, 300, 64, offset=5.0)
        assert 0 <= distance(x, x) < 1e-10 * np.trace(np.cov(x, rowvar=False))


def test_a_shift_and_a_scale_count_as_known():
    x = features(0, 200, 12)
    assert distance(x, x + 2) == pytest.approx(4 * 12, rel=1e-9)
    centred = x - x.mean(axis=0)
    assert distance(centred, 3 * centred) == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)), rel=1e-9)


def test_constant_features_have_a_distance():
    x, y = np.ones((5, 3)), np.zeros((4, 3))
    assert distance(x, y) == 3
    assert distance(x, x) == 0


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_those_of_all_batches_together(offset):
    x = features(0, 103, 6, offset=offset)
    batches = np.split(x, [1, 20, 21, 64])
    merged = reduce(merge_statistics, map(feature_statistics, batches))
    assert merged.examples == 103
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12)
    # About the mean in extended precision: what a sum of squares would lose at 1e6 is all of it.
    centred = x.astype(np.longdouble) - x.astype(np.longdouble).mean(axis=0)
    scatter = (centred[:, :, None] * centred[:, None, :]).sum(axis=0).astype(np.float64)
    np.testing.assert_allclose(merged.scatter, scatter, rtol=1e-7, atol=1e-7 * scatter.max())
    whole = feature_statistics(x)
    np.testing.assert_allclose(whole.scatter, scatter, rtol=1e-7, atol=1e-7 * scatter.max())
    other = merge_statistics(feature_statistics(x[:50]), feature_statistics(x[50:]))
    assert_close(other.scatter, merge_statistics(feature_statistics(x[50:]), feature_statistics(x[:50])).scatter, 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_features_of_any_float_are_summed_in_float64(dtype):
    values = jnp.asarray(features(0, 500, 4, offset=1000), dtype)
    statistics = feature_statistics(values)
    assert statistics.mean.dtype == statistics.scatter.dtype == np.float64
    exact = np.asarray(values).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.scatter / 499, np.cov(exact, rowvar=False), rtol=1e-9)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"features: got shape \(3,\); pass an array with 2 axes"):
        feature_statistics(np.zeros(3))
    with pytest.raises(ValueError, match="features rows: got 0; pass 1 or more"):
        feature_statistics(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="features: got 1 values that are NaN or infinite"):
        feature_statistics(np.array([[1.0, np.nan]]))


def test_statistics_that_do_not_compare_are_refused():
    two, three = feature_statistics(np.zeros((4, 2))), feature_statistics(np.zeros((4, 3)))
    for function in (frechet_distance, merge_statistics):
        with pytest.raises(ValueError, match="b: got features of width 3; pass those of the same network, of width 2"):
            function(two, three)
    with pytest.raises(ValueError, match=r"b.examples: got 1; pass 2 or more"):
        frechet_distance(two, feature_statistics(np.zeros((1, 2))))
