"""Figures of tokenizers."""

import numpy as np
import pytest

from jaxcl import report


def test_each_row_shows_its_images_and_name():
    images = {"original": np.random.default_rng(0).random((3, 4, 5, 1)), "vq:$8$": np.zeros((3, 4, 5, 1))}
    figure = report.image_rows(images)
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.texts] == ["original", "vq:$8$"]
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, images["original"][1, :, :, 0])
    assert report.to_svg(figure, "rows").count("<image") == 6
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 <= boxes[1].x0 and boxes[0].y0 >= boxes[3].y1 and min(box.y0 for box in boxes) >= 0


def test_colours_and_spectrograms_are_images_too():
    colours = np.random.default_rng(0).random((2, 4, 4, 3)) * 1.2
    picture = report.image_rows({"a": colours}).axes[0].images[0].get_array()
    np.testing.assert_allclose(picture, colours[0].clip(0, 1))
    assert len(report.image_rows({"a": colours[..., 0]}).axes) == 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"images: got \{\}; pass one row or more, all of one shape"):
        report.image_rows({})
    with pytest.raises(ValueError, match="images: got "):
        report.image_rows({"a": np.zeros((2, 3, 3)), "b": np.zeros((3, 3, 3))})
