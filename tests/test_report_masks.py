"""Figures of masks: what they draw, from their axes, and the errors for what they cannot."""

import numpy as np
import pytest

from jaxcl import report


def test_bars_add_up_to_all_weights():
    usage = {"first": np.array([[0.2, 0.0, 0.8], [0.1, 0.15, 0.7]]), "second": np.array([[0.5, 0, 0.5], [0, 0, 0.5]])}
    figure = report.weight_usage_bars(usage)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["first", "second"]
    new, reused, others, free = ([bar.get_height() for bar in bars] for bars in figure.axes[0].containers)
    np.testing.assert_allclose([new, reused, others, free], [[20, 10], [0, 15], [0, 5], [80, 70]], atol=1e-9)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "new", "re-used", "kept by others", "free",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: report.weight_usage_bars({}), "usage: got {}; pass"),
        (lambda: report.weight_usage_bars({"a": np.ones((3, 2))}), r"usage: got {'a': \(3, 2\)}; pass \[T, 3\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
