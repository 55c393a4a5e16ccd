"""What experiments share whose table has rows that are worked out each for itself, with seeds in turn."""

import csv
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common import BaseConfig, environment, over_seeds
from jaxcl import files, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]  # what was recorded at some steps
Outcome = dict[str, Any]  # of a row with one seed: "results" and "costs", each {metric: number}, and what else is drawn


def kept(path: Path, work: Callable[[], Outcome]) -> Outcome:
    """What the file holds, or, where there is none, what `work` comes to, which is then kept in it."""
    if not path.exists():
        report.write_json(path, work())
    outcome: Outcome = _numbers(report.read_json(path))
    return outcome


def _numbers(value: Any) -> Any:
    """What a file has as null was no finite number."""
    if isinstance(value, dict):
        return {name: _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return math.nan if value is None else value


def finish(
    config: BaseConfig, experiment: str, settings: Mapping[str, Any], found: Mapping[str, Sequence[Outcome]],
    began: float, figures: "Callable[[], Mapping[str, Figure]]", histories: Mapping[str, History] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes report.html, metrics.json and history.csv, prints the table, and returns what is in metrics.json.

    Args:
        config: of the run.
        experiment: its name.
        settings: as `claim_folder` gives them.
        found: by row, the outcome of each seed.
        began: when, by `time.perf_counter`.
        figures: makes those of the report.
        histories: by row, of the first seed; None writes no history.csv.
    """
    results, costs = (
        {row: _columns([one[part] for one in of_seeds]) for row, of_seeds in found.items()}
        for part in ("results", "costs")
    )
    document = {
        "experiment": experiment,
        "preset": config.preset,
        "config": settings,
        "results": results,
        "costs": costs,
        "environment": environment(),
        "seconds": time.perf_counter() - began,
    }
    if histories is not None:
        files.write_atomic(config.out / "history.csv", _history_csv(histories))
    files.write_atomic(config.out / "report.html", report.html_report(document, figures()))
    report.write_json(config.out / "metrics.json", document)  # last: it says that the run is finished
    print(report.results_table(results, costs))
    written = ["report.html", "metrics.json", *(["history.csv"] if histories is not None else [])]
    print(f"\nWrote {config.out}/{', '.join(written)} and config.json.")
    return document


def _columns(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each metric over the seeds, of what each seed came to."""
    return over_seeds(**{name: [one[name] for one in of_seeds] for name in of_seeds[0]})


def _history_csv(histories: Mapping[str, History]) -> str:
    """CSV of the histories of rows: row, step, metric, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "step", "metric", "value"])
    for name, history in histories.items():
        for entry in history:
            for metric, value in entry.items():
                if metric != "step":
                    writer.writerow([name, entry["step"], metric, repr(value)])
    return text.getvalue()


def file_name(row: str) -> str:
    """A row's name as that of a file."""
    return row.replace(":", "-")
