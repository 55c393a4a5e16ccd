"""What experiments share whose table has rows that are trained each for itself, with seeds in turn."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import over_seeds

History = Sequence[Mapping[str, float]]  # what was recorded at some steps


def columns(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each metric over the seeds, of what each seed came to."""
    return over_seeds(**{name: [one[name] for one in of_seeds] for name in of_seeds[0]})


def history_csv(histories: Mapping[str, History]) -> str:
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
