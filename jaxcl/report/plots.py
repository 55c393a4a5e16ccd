"""Plots of accuracy and cost as matplotlib figures, without pyplot and its global state, and as inline SVG."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcl.continual.metrics import interval95
from jaxcl.report.tables import Results, check_accuracy
from jaxcl.typing import bad_argument, check_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the yellow that is lost on white; with one
# marker more than there are colours, 56 methods look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"


def accuracy_matrices(accuracy: Mapping[str, np.ndarray]) -> "Figure":
    """A heat map a method: accuracy on each task (columns) after each training stage (rows), the mean over seeds.

    All maps share the scale 0 to 1. Up to 10 tasks the percentages stand in the cells; an undefined cell is grey.

    Args:
        accuracy: for each method [S, I, T]: seeds, training stages, test tasks. I is T, or 1 for a method that is
            trained on all tasks at once, which is drawn as a single row. A fraction; NaN where there is none.

    Raises:
        ValueError: `accuracy` is not as above.
        ImportError: matplotlib is missing.
    """
    means = {method: _mean_over_seeds(array) for method, array in check_accuracy(accuracy).items()}
    tasks = next(iter(means.values())).shape[1]
    side = min(max(0.36 * tasks, 1.4), 3.6)  # of a square map; inches, as all lengths here
    sides = [side if len(matrix) == tasks else max(side / tasks, 0.22) for matrix in means.values()]
    columns = min(len(means), int(9 / (side + 0.75)))
    rows = [max(sides[first : first + columns]) + 0.85 for first in range(0, len(means), columns)]
    width, height = columns * (side + 0.75) + 0.8, sum(rows)

    def box(left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return left / width, 1 - (top + high) / height, wide / width, high / height

    figure = new_figure(width, height)
    for number, (method, matrix) in enumerate(means.items()):
        stages, (row, column) = len(matrix), divmod(number, columns)
        axes = figure.add_axes(box(column * (side + 0.75) + 0.6, sum(rows[:row]) + 0.3, side, sides[number]))
        image = axes.imshow(
            matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest", aspect="auto",
            extent=(0.5, tasks + 0.5, stages + 0.5, 0.5),
        )  # fmt: skip
        axes.set_facecolor("#d9d9d9")
        axes.set_title(method, fontsize=10, parse_math=False)
        axes.set_xlabel("accuracy on task")
        axes.set_xticks(_ticks(tasks))
        if stages == tasks:
            axes.set_ylabel("after training task")
            axes.set_yticks(_ticks(tasks))
        else:
            axes.set_yticks([1], ["all"])
        for (i, j), value in np.ndenumerate(matrix):
            if tasks <= 10 and np.isfinite(value):
                red, green, blue, _ = image.to_rgba(value)
                colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                axes.text(j + 1, i + 1, f"{100 * value:.0f}", color=colour, fontsize=8, ha="center", va="center")
    bar = figure.add_axes(box(columns * (side + 0.75) + 0.05, 0.3, 0.14, max(sides[:columns])))
    figure.colorbar(image, cax=bar, format=_percent).outline.set_visible(False)
    return figure


def accuracy_over_tasks(accuracy: Mapping[str, np.ndarray]) -> "Figure":
    """A line a method: the mean accuracy over the tasks seen so far, against their number.

    At stage i that is the mean over j <= i of `accuracy[s, i, j]`, then over seeds; the shade is the 95 % interval over
    seeds (Student's t), absent for a single seed. A method with one joint stage is a dashed line at its mean accuracy
    over all tasks. A method of which nothing is defined has no line and no label.

    Args:
        accuracy: for each method [S, I, T]: seeds, training stages, test tasks. I is T, or 1 for a method that is
            trained on all tasks at once. A fraction; a seed's mean over tasks that holds a NaN is left out.

    Raises:
        ValueError: `accuracy` is not as above.
        ImportError: matplotlib is missing.
    """
    arrays = check_accuracy(accuracy)
    curves = {method: _seen_so_far(array) for method, array in arrays.items()}
    means = {method: _mean_over_seeds(curve) for method, curve in curves.items()}
    tasks = next(iter(arrays.values())).shape[2]
    seen = np.arange(1, tasks + 1)
    figure, axes, gap = _with_names_on_the_right(len(curves))
    axes.set_xlabel("tasks seen so far")
    axes.set_ylabel("mean accuracy on those tasks")
    axes.set_xticks(_ticks(tasks))
    axes.set_xlim(1 - 0.04 * max(tasks - 1, 1), tasks + 0.02 * max(tasks - 1, 1))
    axes.grid(axis="y", color="#e6e6e6")
    # Each line is named beside its last point; `ends` holds that point's index, none if nothing is defined.
    ends = [np.flatnonzero(np.isfinite(mean))[-1:] for mean in means.values()]
    last = [float(mean[end].sum()) for mean, end in zip(means.values(), ends, strict=True)]
    heights = _spread(last, gap)
    for number, (method, mean) in enumerate(means.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker, line = (None, "--") if arrays[method].shape[1] < tasks else (MARKERS[number % len(MARKERS)], "-")
        half_width = interval95(curves[method], axis=0)
        low, high = np.clip([mean - half_width, mean + half_width], 0, 1)
        axes.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            seen, mean, color=colour, linestyle=line, linewidth=1.8, label=method,
            marker=marker, markersize=5, markevery=(_step(tasks) - 1, _step(tasks)),
        )  # fmt: skip
        for end in ends[number]:
            axes.annotate(
                method, (seen[end], mean[end]), (1.03, heights[number]), textcoords=axes.get_yaxis_transform(),
                va="center", color=INK, parse_math=False, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 2, "shrinkB": 4},
            )  # fmt: skip
    _make_room_for_names(figure)
    return figure


def accuracy_bars(results: Results) -> "Figure":
    """A bar a method, in the order of `results` from the top: ACC, with the 95 % interval over seeds as whiskers.

    A method whose ACC is undefined has its name and no bar.

    Args:
        results: as for `jaxcl.report.results_rows`.

    Raises:
        ValueError: there is no method.
        ImportError: matplotlib is missing.
    """
    means, reach = _accuracies(results)
    height = 0.3 * len(results) + 0.8
    figure = new_figure(9.0, height)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.barh(
        range(len(results)), means, xerr=reach, height=0.7, alpha=0.6, ecolor=INK, capsize=3,
        color=[COLOURS[number % len(COLOURS)] for number in range(len(results))],
    )  # fmt: skip
    for number, method in enumerate(results):
        axes.text(
            -0.015, number, method, transform=axes.get_yaxis_transform(), ha="right", va="center", color=INK,
            parse_math=False,
        )  # fmt: skip
    axes.set_yticks([])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(_percent)
    axes.set_xlabel("ACC, mean accuracy on all tasks at the end")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    left = max(text.get_window_extent().width / figure.dpi for text in axes.texts) + 0.3  # whatever the names' length
    width = left + 6.5
    figure.set_figwidth(width)
    axes.set_position((left / width, 0.6 / height, 6.3 / width, 1 - 0.7 / height))
    return figure


def accuracy_against(
    results: Results, costs: Results, cost: str = "seconds", label: str = "seconds a seed"
) -> "Figure":
    """A point a method: ACC, with its 95 % interval over seeds, against the mean of a cost, on a log scale.

    Each is named on the right, at the height of its point or near it. A method of which either is undefined, or that
    cost nothing, is left out.

    Args:
        results: as for `jaxcl.report.results_rows`.
        costs: as for `jaxcl.report.results_rows`.
        cost: which of them.
        label: what it is, with its unit.

    Raises:
        ValueError: there is no method.
        ImportError: matplotlib is missing.
    """
    means, reach = _accuracies(results)
    spent, _ = _statistics({method: costs.get(method, {}) for method in results}, cost)
    shown = np.flatnonzero(np.isfinite(means) & np.isfinite(spent) & (spent > 0))
    figure, axes, gap = _with_names_on_the_right(len(results))
    axes.set_xscale("log", subs=(2, 5))
    axes.set_xlabel(label)
    axes.set_ylabel("ACC, mean accuracy on all tasks at the end")
    axes.xaxis.set_major_formatter(_plain_number)
    axes.xaxis.set_minor_formatter(_plain_number)
    axes.grid(color="#e6e6e6")
    if len(shown):  # whole decades, so that there are numbers on the axis however alike the costs are
        low, high = np.floor(np.log10([spent[shown].min(), spent[shown].max()]))
        axes.set_xlim(10.0**low, 10.0 ** (high + 1))
        heights = _spread(list(means[shown]), gap)
    for place, number in enumerate(shown):
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 7,
            "clip_on": False,
        }  # fmt: skip
        axes.errorbar(spent[number], means[number], yerr=reach[:, [number]], capsize=3, **look)
        axes.plot(1.04, heights[place], transform=axes.transAxes, **look)
        axes.text(
            1.06, heights[place], list(results)[number], transform=axes.transAxes, va="center", color=INK,
            parse_math=False,
        )  # fmt: skip
    _make_room_for_names(figure)
    return figure


def line_plot(curves: Mapping[str, np.ndarray], over: str, label: str) -> "Figure":
    """A line for each name, such as the share of codes in use while a tokenizer is trained.

    Args:
        curves: for each name [2, P], places (whole numbers) and values of P points; a value that is not finite leaves
            a gap.
        over: what the places are, as "training step".
        label: what the values are, with their unit.

    Raises:
        ValueError: no curve, or one that is not [2, P].
        ImportError: matplotlib is missing.
    """
    if not curves or any(np.ndim(curve) != 2 or len(curve) != 2 for curve in curves.values()):
        raise bad_argument(
            "curves", {name: np.shape(curve) for name, curve in curves.items()}, "pass one [2, P] or more"
        )
    height = max(3.6, 0.24 * len(curves) + 0.8)
    figure = new_figure(9.0, height)
    axes = figure.add_axes((0.08, 0.5 / height, 0.66, 1 - 0.65 / height))
    for number, (name, (steps, values)) in enumerate(curves.items()):
        axes.plot(
            steps, values, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
            markersize=4, linewidth=1.6, label=name,
        )  # fmt: skip
    axes.set_xlabel(over)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(label)
    if not any(np.any(values < 0) for _, values in curves.values()):
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure


def heat_map(values: np.ndarray, label: str, *, names: Sequence[str] | None = None, most: float = 1) -> "Figure":
    """A square for each row and task, such as how far the masks of each two tasks overlap.

    Args:
        values: [rows, T].
        label: what they are.
        names: of the rows; None numbers them as tasks.
        most: what the brightest colour stands for; the darkest is 0.

    Raises:
        ValueError: another rank, or not one name a row.
        ImportError: matplotlib is missing.
    """
    check_rank("values", values, 2)
    rows, tasks = values.shape
    if names is not None and len(names) != rows:
        raise bad_argument("names", list(names), f"pass one for each of {rows} rows")
    figure = new_figure(5.4 if names is None else 9.0, 4.4 if names is None else max(2.4, 0.3 * rows + 1))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        values, vmin=0, vmax=most, cmap="viridis", extent=(0.5, tasks + 0.5, rows + 0.5, 0.5),
        aspect="equal" if names is None else "auto",
    )  # fmt: skip
    axes.set_xlabel("task")
    axes.locator_params(axis="x", integer=True)
    if names is None:
        axes.set_ylabel("task")
    else:
        axes.set_yticks(range(1, rows + 1), names, parse_math=False, fontsize=9)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def to_svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element to stand in an HTML page, the same text for the same figure and `title`.

    Text stays text, `title` is what a screen reader says, and nothing outside is referred to. Two figures of a page
    need different titles, because the identifiers within the SVG are made from them.
    """
    import matplotlib  # noqa: PLC0415

    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), dpi=200)
    drawing = svg.getvalue()
    drawing = drawing[drawing.index("<svg") :].strip()  # without the XML heading, which HTML does not allow
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # names such as axes_1 would not be unique in the page
    name = html.escape(title)
    opening, rest = drawing.removeprefix("<svg").split(">", 1)
    return f'<svg role="img" aria-label="{name}"{opening}>\n<title>{name}</title>{rest}'


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "jaxcl[experiments]"') from error
    return Figure(figsize=(width, height))


def _with_names_on_the_right(methods: int) -> "tuple[Figure, Axes, float]":
    """A figure, its axes for accuracies, and how far apart, in heights of the axes, names beside them must be."""
    height = max(4.2, 0.3 * methods)
    figure = new_figure(9.0, height)
    axes = figure.add_axes((0.75 / 9.0, 0.55 / height, 7.2 / 9.0, 1 - 0.7 / height))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(_percent)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes, 0.2 / (height - 0.7)


def _make_room_for_names(figure: "Figure") -> None:
    """Widens the figure to the longest name beside its axes, which stay as large as they are."""
    (axes,) = figure.axes
    width = max([text.get_window_extent().x1 / figure.dpi for text in axes.texts], default=8.0) + 0.15
    figure.set_figwidth(width)
    height = figure.get_figheight()
    axes.set_position((0.75 / width, 0.55 / height, 7.2 / width, 1 - 0.7 / height))


def _statistics(of_methods: Results, metric: str) -> np.ndarray:
    """[2, methods]: mean and half-width of the 95 % interval, NaN where undefined."""
    statistics = [metrics.get(metric, {}) for metrics in of_methods.values()]
    return np.asarray([[one.get("mean"), one.get("ci95")] for one in statistics], np.float64).T


def _accuracies(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """ACC [methods], and how far its interval reaches below and above within 0 to 1 [2, methods]."""
    if not results:
        raise bad_argument("results", "no method", "pass at least one")
    means, half_widths = _statistics(results, "acc")
    low, high = np.clip([means - half_widths, means + half_widths], 0, 1)
    return means, np.stack([means - low, high - means])


def _mean_over_seeds(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    return np.where(count > 0, np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _seen_so_far(accuracy: np.ndarray) -> np.ndarray:
    """[S, T]: for each seed the mean accuracy over the tasks seen at each stage; a joint method has seen them all."""
    _, stages, tasks = accuracy.shape
    if stages < tasks:
        return np.repeat(accuracy.mean(axis=2), tasks, axis=1)
    return np.stack([accuracy[:, i, : i + 1].mean(axis=1) for i in range(tasks)], axis=1)


def _spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Heights for labels, in the order of the given ones and near them, but `gap` apart and within 0 to 1."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    free = np.asarray(heights, np.float64)[order] - steps
    pushed = (np.maximum.accumulate(free) + np.minimum.accumulate(free[::-1])[::-1]) / 2
    placed = np.empty(len(order))
    placed[order] = np.clip(pushed, 0, 1 - steps[-1]) + steps
    return placed


def _ticks(tasks: int) -> np.ndarray:
    """At most 10 of the task numbers from 1 to `tasks`."""
    return np.arange(_step(tasks), tasks + 1, _step(tasks))


def _step(tasks: int) -> int:
    return -(-tasks // 10)


def _plain_number(value: float, _: object) -> str:
    return f"{value:,g}"


def _percent(value: float, _: object) -> str:
    return f"{value:.0%}"
