"""What the figures of several runs show: bars of ACC, and ACC against seconds."""

import numpy as np
import pytest

from jaxcl import report
from jaxcl.continual.metrics import summarise
from jaxcl.report.plots import COLOURS, MARKERS

NAMES = ["naive", "dkvb $x$", "_joint", "unknown"]


@pytest.fixture
def results():
    """The second method has an interval, the third one seed; of the last nothing is known."""
    values = [[0.2, 0.2], [0.90, 0.92], [0.97], [float("nan")]]
    return {name: {"acc": summarise(of_seeds)} for name, of_seeds in zip(NAMES, values, strict=True)}


@pytest.fixture
def costs():
    return {name: {"seconds": summarise([s])} for name, s in zip(NAMES, [1.5, 30.0, 300.0, 2.0], strict=True)}


def test_bars_are_acc_with_intervals_and_names(results):
    (axes,) = report.accuracy_bars(results).axes
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [0.2, 0.91, 0.97, np.nan])
    (whiskers,) = (c for c in axes.collections if len(c.get_segments()) == len(NAMES))
    # t(0.975; 1) = 12.7062 times the standard error 0.01; what lies outside 0 to 1 is cut off.
    np.testing.assert_allclose(whiskers.get_segments()[1][:, 0], [0.91 - 0.127062, 1.0], atol=1e-6)
    assert [text.get_text() for text in axes.texts] == NAMES
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is the uppermost
    assert axes.get_xlim() == (0, 1.02)


@pytest.mark.parametrize("name", ["a", "m" * 100])
def test_bars_have_one_length_beside_names_of_any_length(name):
    figure = report.accuracy_bars({name: {"acc": summarise([0.5])}})
    (axes,) = figure.axes
    assert axes.get_position().width * figure.get_figwidth() == pytest.approx(6.3)
    assert 0 < axes.texts[0].get_window_extent().x0 / figure.dpi < 0.5


def test_points_are_acc_against_seconds(results, costs):
    figure = report.accuracy_against(results, costs)
    (axes,) = figure.axes
    points = [(*line.get_data(), line.get_color(), line.get_marker()) for line in (c[0] for c in axes.containers)]
    assert [(x[0], y[0]) for x, y, _, _ in points] == [(1.5, 0.2), (30.0, pytest.approx(0.91)), (300.0, 0.97)]
    assert [look for _, _, *look in points] == [[COLOURS[k], MARKERS[k]] for k in range(3)]
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1.0, 1000.0)
    assert {text.get_text() for text in axes.texts} == set(NAMES[:3])  # nothing is known of the last
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["naive"] < heights["dkvb $x$"] < heights["_joint"]
    keys = {line.get_ydata()[0]: line.get_marker() for line in axes.lines if line.get_xdata()[0] == 1.04}
    assert keys == {heights[name]: marker for name, marker in zip(NAMES, MARKERS, strict=False) if name in heights}
    assert "dkvb $x$" in report.to_svg(figure, "points")


def test_points_need_a_cost_and_the_axis_has_numbers_for_one(results, costs):
    free = {"naive": {"seconds": summarise([3.0])}, "dkvb $x$": {}, "_joint": {"seconds": summarise([0.0])}}
    figure = report.accuracy_against(results, free)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["naive"]
    assert axes.get_xlim() == (1.0, 10.0)
    svg = report.to_svg(figure, "one")
    assert all(f">{number}</text>" in svg for number in (1, 2, 5, 10))
    assert not report.accuracy_against(results, {}).axes[0].texts


def test_figures_want_a_method():
    for draw in (lambda: report.accuracy_bars({}), lambda: report.accuracy_against({}, {})):
        with pytest.raises(ValueError, match="results: got no method; pass at least one"):
            draw()
