"""Finished runs side by side: one table in the terminal, and one page with plots and the settings that differ.

Name the folders that experiments on tasks in turn have left (their --out), two or more. For example, to see what fewer
pairs cost:

python -m experiments.dkvb

python -m experiments.dkvb --pairs 64 --out runs/few

python -m experiments.compare runs/dkvb runs/few
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from experiments.card import Card
from experiments.common import run_command
from jaxcl import files, report
from jaxcl.typing import bad_argument

CARDS = {"RUN RUN ...": Card("seconds", "a table, and compare.html with figures and the settings that differ")}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare, and where the page goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint="")]
    """Folders of finished runs, with metrics.json and accuracy.csv; two or more."""
    out: Path = Path("runs/compare")
    """Folder for compare.html."""


class Run(NamedTuple):
    """What a finished run left."""

    name: str  # in tables and figures
    metrics: dict[str, Any]
    accuracy: dict[str, np.ndarray]  # {method: [S, I, T]}, in the order of metrics["results"]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, named after their folders; by their whole paths where those share a name.

    Raises:
        ValueError: fewer than two folders, one named twice, or one without the files of a finished run.
    """
    if len(folders) < 2:
        raise bad_argument("runs", f"{len(folders)} of them", "name the folders of two finished runs or more")
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise bad_argument("runs", f"{folder} more than once", "name each folder once")
    same = Counter(path.name for path in resolved)
    return [
        _read_run(folder, path.name if same[path.name] == 1 else str(folder))
        for folder, path in zip(folders, resolved, strict=True)
    ]


def results_of(runs: Sequence[Run], part: str) -> dict[str, Any]:
    """The entries of all runs' `part` of metrics.json, "results" or "costs", as {"run / method": metrics}."""
    return {f"{run.name} / {method}": entry for run in runs for method, entry in run.metrics[part].items()}


def table_of(runs: Sequence[Run]) -> list[list[str]]:
    """The table as cells: the headings, then a row a run and method."""
    headings, *rows = report.results_rows(results_of(runs, "results"), results_of(runs, "costs"))
    names = [[run.name, method] for run in runs for method in run.metrics["results"]]
    return [["run", *headings], *([*name, *cells] for name, (_, *cells) in zip(names, rows, strict=True))]


def settings_of(runs: Sequence[Run]) -> list[list[str]]:
    """The settings in which the runs differ, as cells: the headings, then a row a setting; "-" where a run lacks it."""
    settings = []
    for run in runs:
        config = {name: value for name, value in run.metrics["config"].items() if name != "out"}  # which names the run
        environment = {"environment": run.metrics["environment"]}
        settings.append(dict(report.flat_settings({"experiment": run.metrics["experiment"], **config, **environment})))
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    rows = [[name, *(of_run.get(name, "-") for of_run in settings)] for name in names]
    return [["setting", *(run.name for run in runs)], *(row for row in rows if len({*row[1:]}) > 1)]


def page_of(runs: Sequence[Run]) -> str:
    """The HTML page: table, figures, settings that differ."""
    results, costs = results_of(runs, "results"), results_of(runs, "costs")
    figures = {
        "ACC; whiskers are 95 % intervals over seeds": report.accuracy_bars(results),
        "ACC against what a seed took, compilation included": report.accuracy_against(results, costs),
    }
    notes = []
    tasks = {run.name: next(iter(run.accuracy.values())).shape[2] for run in runs}
    if len(set(tasks.values())) == 1:
        caption = "Mean accuracy over the tasks seen so far; bands are 95 % intervals over seeds"
        accuracy = {f"{run.name} / {method}": array for run in runs for method, array in run.accuracy.items()}
        figures = {caption: report.accuracy_over_tasks(accuracy)} | figures
    else:
        counts = ", ".join(f"{count} in {name}" for name, count in tasks.items())
        notes.append(report.html_note(f"No figure of accuracy over tasks, whose number differs: {counts}."))
    settings = settings_of(runs)
    summary = "; ".join(
        f"{run.name} is experiment {run.metrics['experiment']}, preset {run.metrics['preset']}" for run in runs
    )
    return report.html_page(
        f"{len(runs)} runs compared",
        f"{summary}.",
        {
            "Results": report.results_section(results, table_of(runs), names=2),
            "Figures": "\n".join([*notes, report.figures_section(figures)]),
            "Settings that differ": report.html_table(settings, "Settings that differ", kind="text")
            if len(settings) > 1
            else report.html_note("None."),
        },
    )


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Prints the table, writes the page and returns the table's cells."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    runs = read_runs(config.runs)
    rows, page = table_of(runs), page_of(runs)
    files.write_atomic(config.out / "compare.html", page)
    print(f"{report.legend(results_of(runs, 'results'))}\n\n{report.text_table(rows, names=2)}")
    print(f"Wrote {config.out}/compare.html.")
    return rows


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "metrics.json"
    if not path.exists():
        raise bad_argument(
            "runs", f"{folder} without metrics.json", "let the run finish, which writes it, or name another folder"
        )
    metrics = report.read_json(path)
    try:
        report.check_metrics(metrics if isinstance(metrics, dict) else {})
    except ValueError as error:
        raise bad_argument("runs", f"{path} ({error})", "make it anew by running again") from error
    if not (folder / "accuracy.csv").exists():
        raise bad_argument("runs", f"{folder} without accuracy.csv", "name runs that learn tasks in turn")
    accuracy = report.read_accuracy_csv(folder / "accuracy.csv")
    if set(accuracy) != set(metrics["results"]):
        raise bad_argument(
            "runs", f"{folder}, whose metrics.json and accuracy.csv name different methods", "make both anew by running"
        )
    return Run(name, metrics, {method: accuracy[method] for method in metrics["results"]})


if __name__ == "__main__":
    run_command(main)
