"""Figures of tokenizers: originals beside reconstructions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxcl.report.plots import new_figure
from jaxcl.typing import bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_rows(images: Mapping[str, np.ndarray]) -> "Figure":
    """A row of pictures for each name, the same ones in each: originals and what was made of them.

    Args:
        images: for each name [N, H, W, C] or [N, H, W] from 0 to 1, C being 1 or 3, all of one shape. Spectrograms are
            images too, time along W; their highest value is white.

    Raises:
        ValueError: no row, or rows of different shapes.
        ImportError: matplotlib is missing.
    """
    shapes = {name: array.shape for name, array in images.items()}
    if len(set(shapes.values())) != 1:
        raise bad_argument("images", shapes, "pass one row or more, all of one shape")
    (count, height, width, *_) = next(iter(shapes.values()))
    side = min(9.0 / count, 1.2)  # inches, as all lengths here
    high, left = side * height / width, 1.9
    figure = new_figure(left + count * side, len(images) * (high + 0.06) + 0.1)
    for row, (name, pictures) in enumerate(images.items()):
        top = 0.05 + row * (high + 0.06)
        for column, picture in enumerate(pictures):
            axes = figure.add_axes(_box(figure, left + column * side, top, side - 0.04, high))
            shown = np.clip(picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture, 0, 1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        figure.text(
            (left - 0.1) / figure.get_figwidth(), 1 - (top + high / 2) / figure.get_figheight(), name,
            ha="right", va="center", fontsize=9, parse_math=False,
        )  # fmt: skip
    return figure


def _box(figure: "Figure", left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
    width, height = figure.get_figwidth(), figure.get_figheight()
    return left / width, 1 - (top + high) / height, wide / width, high / height
