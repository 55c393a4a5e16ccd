"""Metrics: matrices small enough for the arithmetic to stand in a comment, and SciPy for the intervals."""

import numpy as np
import pytest
from scipy import stats

from jaxcl.continual import metrics

pytestmark = pytest.mark.core

FIRST = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.7, 1.0]]
FIRST_UNTRAINED = [0.1, 0.15, 0.05]
# Task 0 is best after stage 1, and the last stage helps task 1: forgetting is not the negative of backward transfer.
SECOND = [[0.6, 0.1, 0.0], [0.8, 0.7, 0.2], [0.5, 0.8, 0.4]]
SECOND_UNTRAINED = [0.1, 0.1, 0.1]
# Task 1 is best before it is trained: that, too, is an earlier stage (Chaudhry et al. 2018, eq. 3).
THIRD = [[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 0.3, 0.6]]


@pytest.mark.parametrize("kind", [list, np.asarray, lambda m: np.asarray(m, np.float32)])
@pytest.mark.parametrize(
    ("metric", "matrix", "expected"),
    [
        (metrics.average_accuracy, FIRST, (0.5 + 0.7 + 1.0) / 3),
        (metrics.average_accuracy, SECOND, (0.5 + 0.8 + 0.4) / 3),
        # ((0.5 - 0.9) + (0.7 - 0.8)) / 2
        (metrics.backward_transfer, FIRST, -0.25),
        # ((0.5 - 0.6) + (0.8 - 0.7)) / 2
        (metrics.backward_transfer, SECOND, 0.0),
        # ((max(0.9, 0.6) - 0.5) + (max(0.2, 0.8) - 0.7)) / 2
        (metrics.forgetting, FIRST, 0.25),
        # ((max(0.6, 0.8) - 0.5) + (max(0.1, 0.7) - 0.8)) / 2 = (0.3 - 0.1) / 2
        (metrics.forgetting, SECOND, 0.1),
        # ((max(0.5, 0.5) - 0.5) + (max(0.9, 0.4) - 0.3)) / 2
        (metrics.forgetting, THIRD, 0.3),
        (metrics.learning_accuracy, FIRST, (0.9 + 0.8 + 1.0) / 3),
        (metrics.learning_accuracy, SECOND, (0.6 + 0.7 + 0.4) / 3),
        # rows up to the diagonal: 0.9; (0.6 + 0.8) / 2 = 0.7; (0.5 + 0.7 + 1.0) / 3
        (metrics.average_anytime_accuracy, FIRST, (0.9 + 0.7 + 2.2 / 3) / 3),
        # 0.6; (0.8 + 0.7) / 2 = 0.75; (0.5 + 0.8 + 0.4) / 3
        (metrics.average_anytime_accuracy, SECOND, (0.6 + 0.75 + 1.7 / 3) / 3),
    ],
)
def test_matrix_metrics_by_hand(metric, matrix, expected, kind):
    value = metric(kind(matrix))
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("matrix", "untrained", "expected"),
    [
        # ((0.2 - 0.15) + (0.3 - 0.05)) / 2
        (FIRST, FIRST_UNTRAINED, 0.15),
        # ((0.1 - 0.1) + (0.2 - 0.1)) / 2
        (SECOND, SECOND_UNTRAINED, 0.05),
    ],
)
def test_forward_transfer_by_hand(matrix, untrained, expected):
    value = metrics.forward_transfer(matrix, untrained)
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-12)


DIAGONAL = [metrics.learning_accuracy, metrics.average_anytime_accuracy]
HISTORY = [
    metrics.backward_transfer,
    metrics.forgetting,
    lambda matrix: metrics.forward_transfer(matrix, np.zeros(np.shape(matrix)[1])),
]


def test_one_task_has_accuracy_and_no_history():
    """With a single task every mean over earlier tasks is over nothing: NaN, as documented."""
    assert [metric([[0.7]]) for metric in [metrics.average_accuracy, *DIAGONAL]] == [0.7, 0.7, 0.7]
    assert all(np.isnan(metric([[0.7]])) for metric in HISTORY)


def test_joint_training_has_accuracy_only():
    """One stage over three tasks, [1, 3]: no diagonal, so everything but the last row's mean is undefined."""
    joint = [[0.6, 0.8, 1.0]]
    assert metrics.average_accuracy(joint) == pytest.approx(0.8)
    assert all(np.isnan(metric(joint)) for metric in [*DIAGONAL, *HISTORY])


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 0)])
@pytest.mark.parametrize("metric", [metrics.average_accuracy, *DIAGONAL, *HISTORY])
def test_no_task_or_no_stage_is_nan(metric, shape):
    assert np.isnan(metric(np.zeros(shape)))


@pytest.mark.parametrize("metric", [metrics.average_accuracy, *DIAGONAL, *HISTORY[:2]])
def test_a_matrix_has_two_axes(metric):
    with pytest.raises(ValueError, match=r"^accuracy: got shape \(3,\); pass an array with 2 axes$"):
        metric([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("untrained", "message"),
    [
        ([0.1, 0.2], r"^untrained: got shape \(2,\); its last axis must be 3, the width of accuracy$"),
        ([[0.1, 0.2, 0.3]], r"^untrained: got shape \(1, 3\); pass an array with 1 axes$"),
    ],
)
def test_forward_transfer_wants_one_untrained_accuracy_a_task(untrained, message):
    with pytest.raises(ValueError, match=message):
        metrics.forward_transfer(FIRST, untrained)


# Intervals over seeds


def half_width(values):
    """SciPy's own interval of the mean."""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return (high - low) / 2


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_interval95_is_student_t(count):
    values = np.random.default_rng(count).normal(0.7, 0.1, count)
    assert metrics.interval95(values) == pytest.approx(half_width(values), rel=1e-9)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_interval95_reduces_one_axis(axis):
    values = np.random.default_rng(0).normal(size=(4, 3, 2))
    expected = np.apply_along_axis(half_width, axis, values)
    np.testing.assert_allclose(metrics.interval95(values, axis=axis), expected, rtol=1e-9)


def test_interval95_leaves_nan_out():
    """Columns with four, two, one and no values defined: SciPy on what is left, NaN under two values."""
    values = np.asarray([[1.0, 2.0, 3.0, np.nan], [2.0, np.nan, np.nan, np.nan], [4.0, 5.0, np.nan, np.nan]])
    expected = [half_width([1.0, 2.0, 4.0]), half_width([2.0, 5.0]), np.nan, np.nan]
    np.testing.assert_allclose(metrics.interval95(values), expected, rtol=1e-9)


def test_interval95_of_equal_values_is_zero():
    assert metrics.interval95([0.5, 0.5, 0.5]) == 0


def test_summarise():
    """Mean of 0.6, 0.7, 0.8 is 0.7; the deviations are -0.1, 0, 0.1: sample variance 0.02 / 2, so std 0.1."""
    summary = metrics.summarise([0.6, 0.7, 0.8])
    assert list(summary) == ["mean", "std", "ci95", "values"]
    assert summary["mean"] == pytest.approx(0.7)
    assert summary["std"] == pytest.approx(0.1)
    assert summary["ci95"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3))
    assert summary["values"] == [0.6, 0.7, 0.8]
    assert all(type(summary[name]) is float for name in ("mean", "std", "ci95"))


def test_summarise_leaves_nan_out_of_statistics_and_keeps_it_in_values():
    """Of 1, NaN, 3: mean 2, std sqrt(2)."""
    summary = metrics.summarise([1.0, float("nan"), 3.0])
    assert summary["mean"] == 2.0
    assert summary["std"] == pytest.approx(np.sqrt(2))
    assert summary["ci95"] == pytest.approx(half_width([1.0, 3.0]))
    np.testing.assert_array_equal(summary["values"], [1.0, np.nan, 3.0])


@pytest.mark.parametrize(("values", "mean"), [([0.4], 0.4), ([0.4, float("nan")], 0.4), ([float("nan")], np.nan)])
def test_summarise_of_one_value_or_none_has_no_spread(values, mean):
    summary = metrics.summarise(values)
    np.testing.assert_equal(summary["mean"], mean)
    assert np.isnan(summary["std"])
    assert np.isnan(summary["ci95"])


def test_summarise_needs_a_value():
    with pytest.raises(ValueError, match=r"^values: got no values; pass one value a seed$"):
        metrics.summarise([])
