"""Figures of keys: what they draw, from their axes, and the errors for what they cannot."""

import numpy as np
import pytest

from jaxcl import report


def test_utilisation_is_sorted_percentages():
    usage = np.array([[1, 0, 0, 0], [2, 2, 2, 2], [9, 1, 0, 0]])
    share, perplexity = report.key_utilisation(usage).axes[0].get_lines()
    np.testing.assert_allclose(share.get_ydata(), [100, 50, 25])
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(perplexity.get_ydata(), 100 * np.array([4, np.exp(entropy), 1]) / 4)


def test_keys_are_sorted_by_their_main_class_and_unused_ones_left_out():
    usage = np.array([[0, 3, 0, 1, 0], [4, 1, 0, 1, 2]])
    axes = report.keys_by_class(usage).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.5, 0, 0], [0.25, 0.5, 1, 1]])
    assert axes.get_xlabel().startswith("the 4 keys in use of 5")


def test_heads_and_keys_lie_on_the_heads_principal_components():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(200, 3)) * [0.1, 5, 1]
    axes = report.keys_among_heads(heads, np.arange(200) % 4, heads[:7]).axes[0]
    *classes, keys = axes.collections
    assert len(classes) == 4
    points = np.concatenate([part.get_offsets() for part in classes])
    assert abs(points[:, 0].std() - heads[:, 1].std()) < 0.05 and abs(points[:, 1].std() - heads[:, 2].std()) < 0.05
    np.testing.assert_allclose(keys.get_offsets()[0], classes[0].get_offsets()[0])
    assert report.keys_among_heads(heads[:, :1], np.arange(200) % 4, heads[:7, :1]).axes


def test_histograms_add_up_to_all_heads():
    rng = np.random.default_rng(0)
    axes = report.distance_histograms({"old": rng.gamma(2, size=(50, 40)), "new": rng.gamma(9, size=2000)}).axes[0]
    for line in axes.get_lines():
        assert 99 < line.get_ydata().sum() <= 100
    peaks = [line.get_xdata()[line.get_ydata().argmax()] for line in axes.get_lines()]
    assert peaks[0] < peaks[1] and axes.get_xscale() == "log"
    assert report.distance_histograms({"all at once": np.zeros(5)}).axes


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: report.key_utilisation(np.ones(3)), "usage: got shape"),
        (lambda: report.keys_by_class(np.ones((0, 3))), "usage, its classes: got 0"),
        (lambda: report.keys_among_heads(np.ones((4, 3)), np.ones(4), np.ones((2, 2))), "heads: got .*pass"),
        (lambda: report.distance_histograms({}), "distances: got {}; pass some of each"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
