"""What every experiment shares: its command line, progress bars, and the files it leaves."""

import argparse
import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxcl import report
from jaxcl.continual import Progress, Result, metrics

Config = TypeVar("Config")


def parse_command(
    presets: Callable[[str, str], Config], *, data: Sequence[str], argv: Sequence[str] | None, description: str
) -> Config:
    """The configuration that a command line asks for: a preset, with whatever options are given put over it.

    Args:
        presets: (preset, data) -> configuration, a dataclass with fields `preset` and `data` among others.
        data: names of data sets, the default first.
        argv: arguments; those of the process if None.
        description: what ``--help`` begins with.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=("smoke", "cpu", "paper"), default="cpu")
    first.add_argument("--data", choices=data, default=data[0])
    chosen, _ = first.parse_known_args(argv)
    return tyro.cli(
        type(default := presets(chosen.preset, chosen.data)), default=default, args=argv, description=description
    )


class ProgressBar:
    """One bar for all epochs of a method, of `runs` seeds or groups of seeds; shows the newest loss and accuracy."""

    def __init__(self, name: str, runs: int) -> None:
        self._runs, self._bar = runs, tqdm(desc=name, unit="epoch", dynamic_ncols=True)

    def __call__(self, progress: Progress) -> None:
        """The callback of `jaxcl.continual.run_seeds`."""
        self._bar.total = self._runs * progress.stages * progress.epochs
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in progress.metrics.items()}, refresh=False)
        self._bar.update()

    def __enter__(self) -> "ProgressBar":
        """Nothing to open: the bar shows at once."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the bar on screen as it stands."""
        self._bar.close()


def summarise_method(results: Sequence[Result]) -> dict[str, Any]:
    """The entry of one method in metrics.json: each metric over seeds, as {"mean", "std", "ci95", "values"}."""
    values: dict[str, list[float]] = {
        "acc": [metrics.average_accuracy(r.accuracy) for r in results],
        "bwt": [metrics.backward_transfer(r.accuracy) for r in results],
        "fwt": [metrics.forward_transfer(r.accuracy, r.untrained) for r in results],
        "forgetting": [metrics.forgetting(r.accuracy) for r in results],
        "learning_accuracy": [metrics.learning_accuracy(r.accuracy) for r in results],
        "average_anytime_accuracy": [metrics.average_anytime_accuracy(r.accuracy) for r in results],
        "seconds": [r.seconds for r in results],
        "parameters": [r.parameters for r in results],
        "bytes": [r.bytes for r in results],
        "compilations": [sum(r.compilations.values()) for r in results],
    }
    return {name: metrics.summarise(of_seeds) for name, of_seeds in values.items()}


def write_outputs(
    out: Path,
    *,
    experiment: str,
    config: Any,
    results: Mapping[str, Any],
    accuracy: Mapping[str, np.ndarray],
    figures: Mapping[str, Figure],
    seconds: float,
) -> dict[str, Any]:
    """Writes metrics.json, config.json, accuracy.csv and report.html to `out`, and returns what is in metrics.json.

    Args:
        out: the folder; made if need be.
        experiment: its name.
        config: the configuration, a dataclass with fields `preset` and `seeds`.
        results: {method: what `summarise_method` gave}.
        accuracy: {method: [S, I, T]}.
        figures: {caption: figure} for the page.
        seconds: wall time of it all.
    """
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    document = {
        "experiment": experiment,
        "preset": config.preset,
        "config": settings,
        "results": results,
        "environment": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "devices": [device.device_kind for device in jax.devices()],
        },
        "seconds": seconds,
    }
    report.write_json(out / "config.json", settings)
    report.write_json(out / "metrics.json", document)
    report.write_accuracy_csv(out / "accuracy.csv", accuracy, seeds=range(config.seeds))
    report.write_atomic(out / "report.html", report.html_report(document, figures))
    return document
