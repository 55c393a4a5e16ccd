"""Figures of a key-value bottleneck: how its keys are used, by which classes, and where they lie."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.report.plots import COLOURS, INK, MARKERS, new_figure
from jaxcl.typing import bad_argument, check_count, check_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def key_utilisation(usage: np.ndarray) -> "Figure":
    """The share of each codebook's keys that were fetched, and how evenly: two lines over the codebooks.

    Args:
        usage: [C, J], how often each key was.

    Raises:
        ValueError: another rank.
        ImportError: matplotlib is missing.
    """
    check_rank("usage", usage, 2)
    share = (usage > 0).mean(axis=1)
    chances = usage / np.maximum(usage.sum(axis=1, keepdims=True), 1)
    entropy = -np.sum(chances * np.log(np.where(chances > 0, chances, 1)), axis=1)
    figure, axes = _axes(9.0, 3.2)
    for number, (name, values) in enumerate(
        {"fetched at all": share, "perplexity / keys": np.exp(entropy) / usage.shape[1]}.items()
    ):
        axes.plot(np.arange(len(values)), 100 * np.sort(values)[::-1], color=COLOURS[number], label=name)
    axes.set_xlabel("codebooks, in the order of each line's values")
    axes.set_ylabel("% of keys")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=9)
    return figure


def keys_by_class(usage: np.ndarray) -> "Figure":
    """Which keys of one codebook which classes fetch: a row a class, a column a key, keys sorted by their main class.

    Args:
        usage: [K, J], how often examples of each class fetched each key.

    Raises:
        ValueError: another rank, or no class.
        ImportError: matplotlib is missing.
    """
    check_rank("usage", usage, 2)
    check_count("usage, its classes", len(usage), 1)
    used = usage[:, usage.sum(axis=0) > 0]
    shares = used / np.maximum(used.sum(axis=0), 1)
    order: Any = np.lexsort((-shares.max(axis=0, initial=0), shares.argmax(axis=0))) if shares.size else []
    figure, axes = _axes(9.0, max(2.4, 0.22 * len(usage) + 0.9))
    image = axes.imshow(shares[:, order], vmin=0, vmax=1, cmap="viridis", interpolation="nearest", aspect="auto")
    axes.set_xlabel(f"the {used.shape[1]} keys in use of {usage.shape[1]}, sorted by their main class")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of a key's fetches", pad=0.02)
    return figure


def keys_among_heads(heads: np.ndarray, labels: np.ndarray, keys: np.ndarray) -> "Figure":
    """Heads and keys of one codebook on the heads' two principal components; heads are coloured by class.

    Args:
        heads: [N, W].
        labels: [N].
        keys: [J, W].

    Raises:
        ValueError: other ranks or widths.
        ImportError: matplotlib is missing.
    """
    check_rank("heads", heads, 2)
    check_rank("keys", keys, 2)
    if heads.shape[1] != keys.shape[1] or len(heads) != len(labels):
        shapes = {"heads": heads.shape, "labels": np.shape(labels), "keys": keys.shape}
        raise bad_argument("heads", shapes, "pass [N, W], [N] and [J, W]")
    middle = heads.mean(axis=0)
    directions = np.linalg.svd(heads - middle, full_matrices=False)[2][:2].T
    figure, axes = _axes(6.4, 5.0)
    for number, label in enumerate(np.unique(labels)):
        points = (heads[labels == label] - middle) @ directions
        axes.scatter(
            points[:, 0], points[:, -1], s=5, alpha=0.5, linewidths=0, color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number // len(COLOURS) % len(MARKERS)], label=str(label),
        )  # fmt: skip
    places = (keys - middle) @ directions
    axes.scatter(places[:, 0], places[:, -1], s=16, facecolors="none", edgecolors=INK, linewidths=0.6, label="keys")
    axes.set_xlabel("first principal component of the heads")
    axes.set_ylabel("second")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8, ncols=1 + len(set(labels)) // 20)
    return figure


def distance_histograms(distances: Mapping[str, np.ndarray]) -> "Figure":
    """How far heads lie from the keys they fetch, a line for each set of examples, on a logarithmic axis.

    Args:
        distances: squared, of any shape; those of one name are taken together.

    Raises:
        ValueError: no distances.
        ImportError: matplotlib is missing.
    """
    if not distances or any(np.size(values) == 0 for values in distances.values()):
        raise bad_argument(
            "distances", {name: np.size(values) for name, values in distances.items()}, "pass some of each"
        )
    floor = 1e-12
    logarithms = {name: np.log10(np.maximum(np.ravel(values), floor)) for name, values in distances.items()}
    least, most = np.percentile(np.concatenate([*logarithms.values()]), (0.1, 99.9))
    edges = np.linspace(least - 1e-6, most + 1e-6, 81)
    figure, axes = _axes(9.0, 3.4)
    for number, (name, values) in enumerate(logarithms.items()):
        counts, _ = np.histogram(values, edges)
        axes.plot(
            10 ** ((edges[1:] + edges[:-1]) / 2), 100 * counts / len(values), color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number < len(COLOURS) else "--", label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("squared distance from a head to the key it fetches")
    axes.set_ylabel("% of heads")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
