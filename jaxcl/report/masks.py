"""Figures of mask methods: what tasks keep of each layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxcl.report.plots import COLOURS, new_figure
from jaxcl.typing import bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weight_usage_bars(usage: Mapping[str, np.ndarray]) -> "Figure":
    """For each layer a bar a task: which share of its weights was new to the task, re-used, not used, and still free.

    Args:
        usage: by layer, [T, 3], as `masks.weight_usage` gives it.

    Raises:
        ValueError: no layer, or one of another shape.
        ImportError: matplotlib is missing.
    """
    if not usage or any(np.ndim(shares) != 2 or np.shape(shares)[1] != 3 for shares in usage.values()):
        shapes = {name: np.shape(shares) for name, shares in usage.items()}
        raise bad_argument("usage", shapes, "pass [T, 3] for each layer, of one or more")
    figure = new_figure(9.0, 0.5 + 1.5 * len(usage))
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(len(usage), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, shares) in zip(all_axes, usage.items(), strict=True):
        new, reused, free = 100 * np.asarray(shares).T
        parts = {"new": new, "re-used": reused, "kept by others": 100 - new - reused - free, "free": free}
        bottom = np.zeros(len(new))
        for (label, part), colour in zip(parts.items(), (*COLOURS[:2], "#bdbdbd", "#efefef"), strict=True):
            axes.bar(np.arange(1, len(new) + 1), part, bottom=bottom, color=colour, label=label, width=0.85)
            bottom += part
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of weights")
        axes.set_title(name, fontsize=9, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("task")
    all_axes[-1].locator_params(axis="x", integer=True)
    all_axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    return figure
