"""All five systems on handwritten digits, a few minutes, one table and one page.

DKVB meets five tasks of two new classes each, IBM the same tasks with the task told, OA-Adapter permuted digits through
a small transformer, each beside sequential training. SimVQ and VQ make digits into tokens. Mean-KL compresses a
classifier of digits into a file, which is read again to be tested. Digits come with scikit-learn, not from the net.

Each system is an experiment of its own (--help of `experiments.dkvb`, `ibm`, `simvq_image`, `miracle` and
`oa_adapter`), with more methods and data; here it has a folder in --out, with its own report.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from experiments import dkvb, ibm, miracle, oa_adapter, simvq_image
from experiments.card import Card
from experiments.common import BaseConfig, claim_folder, environment, parse_command, run_command
from jaxcl import files, report
from jaxcl.typing import bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card(
        "2 min, with other work beside it", "that it runs: accuracies after so few epochs say nothing"
    ),
    "--preset cpu": Card(
        "3 min",
        "accuracy %: DKVB 96.9, naive 20.0, IBM 99.0 in 18 kB, Mean-KL 96.3 in 369 B; SimVQ uses 73 % of codes, VQ 4 %",
    ),
    "--preset paper": Card("refused", "nothing is published for digits"),
}
System = Literal["dkvb", "ibm", "simvq", "mean_kl", "oa_adapter"]


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings of the quickstart."""

    data: Literal["digits"] = "digits"
    """The digits of scikit-learn."""
    systems: tuple[System, ...] = get_args(System)
    """Which systems to show."""


class Row(NamedTuple):
    """A line of the table; None where a number has no meaning."""

    method: str
    accuracy: float | None
    forgetting: float | None
    bytes: float | None
    seconds: float  # of a seed
    beside: str = ""  # what else is to be said


class Show(NamedTuple):
    """How a system is shown."""

    title: str
    run: Callable[[Sequence[str]], dict[str, Any]]  # of its experiment, with arguments; returns what metrics.json holds
    arguments: tuple[str, ...]
    rows: Callable[[Mapping[str, Any], Path], list[Row]]  # (what metrics.json holds, folder)


def _mean(document: Mapping[str, Any], part: str, method: str, metric: str) -> Any:
    """None where it is undefined: metrics.json says so by null, what a run returns by NaN."""
    value = document[part][method][metric]["mean"]
    return None if value is None or math.isnan(value) else value


def _learners(document: Mapping[str, Any], folder: Path) -> list[Row]:
    """Of methods that meet tasks in turn."""
    return [
        Row(
            method, _mean(document, "results", method, "acc"), _mean(document, "results", method, "forgetting"),
            _mean(document, "results", method, "bytes"), _mean(document, "costs", method, "seconds"),
        )
        for method in document["results"]
    ]  # fmt: skip


def _masked(document: Mapping[str, Any], folder: Path) -> list[Row]:
    rows = []
    for row in _learners(document, folder):
        if (masks := document["masks"].get(row.method)) is None:
            rows.append(row)
            continue
        size = (folder / "masks" / f"{row.method}_0.masks").stat().st_size
        kept, bits = 100 * masks["kept_by_a_task"]["mean"], masks["bits"]["mean"]
        beside = f"{kept:.0f} % of the weights a task, {bits:.2f} bits each"
        rows.append(row._replace(bytes=size, beside=beside))
    return rows


def _adapted(document: Mapping[str, Any], folder: Path) -> list[Row]:
    return [
        row._replace(beside=f"{found['active_rank']['mean']:.1f} ranks a site and task") if "active_rank" in found
        else row
        for row, found in zip(_learners(document, folder), document["adapters"].values(), strict=True)
    ]  # fmt: skip


def _tokenizers(document: Mapping[str, Any], _: Path) -> list[Row]:
    return [
        Row(
            method, None, None, None, _mean(document, "costs", method, "seconds"),
            f"{100 * _mean(document, 'results', method, 'utilisation'):.1f} % of codes in use, "
            f"{_mean(document, 'results', method, 'psnr'):.1f} dB",
        )
        for method in document["results"]
    ]  # fmt: skip


def _compressed(document: Mapping[str, Any], _: Path) -> list[Row]:
    return [
        Row(
            method, 1 - _mean(document, "results", method, "error"), None, _mean(document, "results", method, "bytes"),
            _mean(document, "costs", method, "seconds"), "answers of the network that was read from its file",
        )
        for method in document["results"]
    ]  # fmt: skip


SHOWS: dict[System, Show] = {
    "dkvb": Show("DKVB: two new classes a task", dkvb.main, ("--methods", "naive", "dkvb", "joint"), _learners),
    "ibm": Show(
        "IBM: two classes a task, the task told", ibm.main,
        ("--stream", "split", "--tasks", "5", "--methods", "naive", "wsn", "ibm"), _masked,
    ),
    "simvq": Show("SimVQ: digits as tokens", simvq_image.main, ("--rows", "vq:1024", "simvq:1024"), _tokenizers),
    "mean_kl": Show("Mean-KL: a classifier in a file", miracle.main, ("--rows", "mean_kl:400"), _compressed),
    "oa_adapter": Show(
        "OA-Adapter: permuted digits", oa_adapter.main, ("--methods", "frozen", "lora", "oa_inputs"), _adapted
    ),
}  # fmt: skip


def preset(name: Any, _: str) -> Config:
    """The settings of preset `name`; those of the five experiments go by it too."""
    if name == "paper":
        raise bad_argument("preset", name, "nothing is published for digits: take cpu, or an experiment's own paper")
    return Config(preset=name, out=Path("runs/quickstart"), seeds=1 if name == "smoke" else 2)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the five experiments, prints the table, and returns what is in metrics.json."""
    config = parse_command(preset, data=("digits",), argv=argv, description=__doc__ or "")
    began, settings = time.perf_counter(), claim_folder(config)
    path = config.out / "metrics.json"
    if path.exists():
        document: dict[str, Any] = report.read_json(path)
        rows = {name: [Row(**row) for row in of_system] for name, of_system in document["systems"].items()}
        print(f"{config.out} holds this run, finished; remove it, or choose another --out, to run again.\n")
        print(report.text_table(table_of(rows), names=2))
        return document
    rows = {}
    for name in config.systems:
        show, folder = SHOWS[name], config.out / name
        print(f"\n{show.title}\n")
        found = show.run([
            "--preset", config.preset, "--seeds", str(config.seeds), "--out", str(folder), "--checkpoint-seconds",
            str(config.checkpoint_seconds), *show.arguments,
        ])  # fmt: skip
        rows[name] = show.rows(found, folder)
    cells = table_of(rows)
    document = {
        "experiment": "quickstart", "preset": config.preset, "config": settings, "environment": environment(),
        "systems": {name: [row._asdict() for row in of_system] for name, of_system in rows.items()},
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    files.write_atomic(config.out / "report.html", _page(config, cells))
    report.write_json(config.out / "metrics.json", document)
    print(f"\n{report.text_table(cells, names=2)}\nWrote {config.out}/report.html and metrics.json.")
    return document


def _page(config: Config, cells: Sequence[Sequence[str]]) -> str:
    """The HTML page: the table, and for each system a figure, if it meets tasks in turn, and where its report is."""
    sections = {"Results": report.html_table(cells, "Table of results", names=2)}
    for name in config.systems:
        folder = config.out / name
        link = f'<p><a href="{name}/report.html">The whole report of this system</a></p>'
        figures: dict[str, Figure] = {}
        if (folder / "accuracy.csv").exists():
            caption = f"{SHOWS[name].title}; mean accuracy over the tasks seen so far"
            figures[caption] = report.accuracy_over_tasks(report.read_accuracy_csv(folder / "accuracy.csv"))
        sections[SHOWS[name].title] = f"{report.figures_section(figures)}\n{link}"
    return report.html_page("Five systems on handwritten digits", f"Means over {config.seeds} seeds.", sections)


def table_of(rows: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """The table as cells: the headings, then a row a system and method; means over seeds."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    cells = [["system", "method", "accuracy %", "forgetting %", "bytes", "seconds a seed", ""]]
    for name, of_system in rows.items():
        for row in of_system:
            size = "-" if row.bytes is None else f"{row.bytes:,.0f}"
            shown = (percent(row.accuracy), percent(row.forgetting), size, f"{row.seconds:.1f}", row.beside)
            cells.append([name, row.method, *shown])
    return cells


if __name__ == "__main__":
    run_command(main)
