"""What a report is made of: the checks of its plain data, and the table of results and costs as rows and as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from jaxcl.typing import bad_argument

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # method -> metric -> {"mean", "std", "ci95", "values"}

# Fractions, shown in percent.
SHARES = (
    *("acc", "forgetting", "bwt", "fwt", "learning_accuracy"),
    *("utilisation", "classifier_accuracy", "kept_accuracy", "stoi_clips", "pesq_clips"),
    *("error", "error_of_mean", "error_of_draw"),
)
# Of a tokenizer or a compressed network; each in its own unit, to so many decimals.
DECIMALS = {
    "perplexity": 0, "psnr": 2, "ssim": 3, "frechet": 2, "mel_distance": 3, "si_sdr": 2, "stoi": 3, "pesq": 2,
    "kl_bits": 2, "spent_bits": 2, "overhead_bits": 2, "effective_sample_size": 1,
    "p_of_first": 3, "p_of_distance": 3, "mean_off": 3, "deviation_off": 3,
}  # fmt: skip
METRICS = (*SHARES, *DECIMALS, "parameters", "bytes", "seconds", "examples_per_second", "peak_memory")
# Where it is not the metric's name with spaces.
HEADINGS = {
    "examples_per_second": "examples/s", "psnr": "PSNR dB", "ssim": "SSIM", "frechet": "Frechet distance",
    "si_sdr": "SI-SDR dB", "stoi": "STOI", "pesq": "PESQ",
    "stoi_clips": "clips with STOI", "pesq_clips": "clips with PESQ",
    "kl_bits": "KL bits a block", "spent_bits": "spent bits a block", "overhead_bits": "bits beyond the KL",
    "p_of_first": "p of the first weight", "p_of_distance": "p of the distance",
}  # fmt: skip
KEYS = ("experiment", "preset", "config", "results", "costs", "environment", "seconds")  # of metrics.json
UNDEFINED = "-"
PLUS_MINUS = " ± "


def check_accuracy(accuracy: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The accuracy matrices as NumPy arrays, checked.

    Args:
        accuracy: for each method [S, I, T]: seeds, training stages, test tasks. I is T, or 1 for a method that is
            trained on all tasks at once. A fraction; NaN where there is none.

    Raises:
        ValueError: there is no method, a shape is not as above, methods differ in T, or a value is not in [0, 1].
    """
    if not accuracy:
        raise bad_argument("accuracy", "no method", "pass at least one")
    arrays = {method: np.asarray(values) for method, values in accuracy.items()}
    tasks = next(iter(arrays.values())).shape[-1:]
    for method, array in arrays.items():
        name, shape = f"accuracy[{method!r}]", f"shape {array.shape}"
        if array.ndim != 3 or not array.size or array.shape[1] not in (1, array.shape[2]):
            raise bad_argument(name, shape, "pass [S, T, T] or [S, 1, T]: seeds, training stages, test tasks")
        if array.shape[-1:] != tasks:
            raise bad_argument(name, shape, f"its last axis must be {tasks[0]}, the tasks of the first method")
        wrong = array[(array < 0) | (array > 1)]
        if wrong.size:
            raise bad_argument(name, f"the value {wrong[0]}", "pass fractions from 0 to 1")
    return arrays


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raises ValueError unless `metrics`, the document of metrics.json, has all its keys."""
    missing = [key for key in KEYS if key not in metrics]
    if missing:
        raise bad_argument("metrics", f"no {', '.join(map(repr, missing))}", f"pass a document with {', '.join(KEYS)}")


def results_rows(results: Results, costs: Results, metrics: Sequence[str] = METRICS) -> list[list[str]]:
    """The table of results and costs as cells of text: the headings, then a row a method in the order of `results`.

    Fractions, in percent, and what a tokenizer is judged by are "mean ± half-width of the 95 % interval" (the mean
    alone where the interval is undefined), all else (seconds, bytes, ...) are means over seeds, and "-" stands for what
    is undefined.

    Args:
        results: {method: {metric: {"mean", "std", "ci95", "values"}}}; None or NaN where undefined.
        costs: of the same form: what was measured. Methods may be missing.
        metrics: the columns, in this order; those that no method has are left out.

    Raises:
        ValueError: `results` is empty, or neither it nor `costs` has any of the `metrics`.
    """
    if not results:
        raise bad_argument("results", "no method", "pass at least one")
    both = {method: {**of_method, **costs.get(method, {})} for method, of_method in results.items()}
    columns = [metric for metric in metrics if any(metric in of_method for of_method in both.values())]
    if not columns:
        raise bad_argument("metrics", list(metrics), "name at least one metric that is in `results` or `costs`")
    headings = [f"{HEADINGS.get(column, column.replace('_', ' '))}{' %' * (column in SHARES)}" for column in columns]
    return [["method", *headings], *([method, *(_cell(column, of_method) for column in columns)]
                                     for method, of_method in both.items())]  # fmt: skip


def results_table(results: Results, costs: Results, metrics: Sequence[str] = METRICS) -> str:
    """The table of results and costs as aligned plain text for a terminal, under a line that says what it shows.

    Arguments and errors are those of `results_rows`.
    """
    table = text_table(results_rows(results, costs, metrics))
    return f"{legend(results)}\n\n{table}"


def text_table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Rows of cells, the first of them headings, as aligned plain text.

    Args:
        rows: all of one length.
        names: how many columns, the first ones, hold names, which stand left; numbers stand right.
    """
    columns = list(zip(*rows, strict=True))
    left = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns[:names]]
    heading, *lines = ["  ".join(row).rstrip() for row in zip(*left, *map(_aligned, columns[names:]), strict=True)]
    return "\n".join([heading, "-" * max(map(len, [heading, *lines])), *lines, ""])


def legend(results: Results) -> str:
    """One line on what the numbers of the table are: means over how many seeds, and what ± is."""
    if _seed_range(results)[1] == 1:
        return "One seed, so without intervals."
    return f"Means over {seeds(results)}; ± is the half-width of the 95 % interval of the mean."


def seeds(results: Results) -> str:
    """How many seeds the methods were run with, in words: "1 seed", "5 seeds", "1 to 5 seeds"."""
    low, high = _seed_range(results)
    return f"{high} seed{'s' * (high != 1)}" if low == high else f"{low} to {high} seeds"


def _seed_range(results: Results) -> tuple[int, int]:
    counts = [
        max((len(metric["values"]) for metric in of_method.values()), default=0) for of_method in results.values()
    ]
    return min(counts), max(counts)


def _cell(metric: str, of_method: Mapping[str, Mapping[str, Any]]) -> str:
    statistics = of_method.get(metric, {})
    mean, half_width = statistics.get("mean"), statistics.get("ci95")
    if not _defined(mean):
        return UNDEFINED
    if metric in SHARES or metric in DECIMALS:
        factor, digits = (100, 1) if metric in SHARES else (1, DECIMALS[metric])
        spread = f"{PLUS_MINUS}{factor * half_width:,.{digits}f}" if _defined(half_width) else ""
        return f"{factor * mean:z,.{digits}f}{spread}"
    if metric == "seconds":
        return f"{mean:,.1f}"
    return _humanised(mean, "B" if metric in ("bytes", "peak_memory") else "")


def _defined(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _humanised(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 89.6 k, 1.31 MB."""
    rounded = float(f"{value:.3g}")
    power = (len(f"{abs(rounded):.0f}") - 1) // 3
    return f"{rounded / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}{unit}".rstrip()


def _aligned(column: Sequence[str]) -> list[str]:
    """The heading and the cells of a column of numbers, padded so that each ± stands below the other."""
    heading, *cells = column
    parts = [cell.partition(PLUS_MINUS) for cell in cells]
    width = max(len(half_width) for _, _, half_width in parts)
    gap = len(PLUS_MINUS) if width else 0
    padded = [f"{mean}{sign.ljust(gap)}{half_width.rjust(width)}" for mean, sign, half_width in parts]
    return [cell.rjust(max(map(len, [heading, *padded]))) for cell in [heading, *padded]]
