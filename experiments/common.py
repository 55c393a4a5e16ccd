"""What every experiment shares: its command line, a course that can be interrupted, and the folder it leaves."""

import argparse
import csv
import dataclasses
import io
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import optax
import tyro
from tqdm import tqdm

from jaxcl import continual, files, report
from jaxcl.continual import Checkpoint, Progress, Result, Strategy, Stream, metrics, sharding
from jaxcl.typing import ArgumentError, Key, PyTree, bad_argument, check_at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Config = TypeVar("Config", bound="BaseConfig")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Settings that every experiment has; the defaults shown are those of the preset."""

    preset: Literal["smoke", "cpu", "paper"] = "cpu"
    """Starting point of all other settings: smoke takes a minute or two, cpu minutes on two cores, paper is as
    published."""
    out: Path = Path("runs")
    """Folder for metrics.json, config.json, report.html, tables as CSV and the checkpoints. If it holds an unfinished
    run of the same settings, the run goes on from there."""
    seeds: int = 5
    """How many seeds, from 0 on; each has its own class order, initial parameters and data order."""
    checkpoint_seconds: float = 60.0
    """How often to save the state: so much is lost at most if the run is killed."""


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseConfig):
    """Settings of every continual-learning experiment; the defaults shown are those of the preset."""

    tensorboard: bool = False
    """Write event files to the folder tensorboard in --out."""
    mesh: str | None = None
    """Devices to use, such as data=4,model=2: batches are split over data, parameters over model. One if not given."""
    distributed: bool = False
    """One of several processes: found out by JAX on TPU pods and under SLURM, else from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. All need the same --out; only the first writes results."""


# Where a run and its features lie and how it is watched is not what it is.
_ELSEWHERE = {"out", "checkpoint_seconds", "tensorboard", "features"}


def parse_command(
    presets: Callable[[str, str], Config], *, data: Sequence[str], argv: Sequence[str] | None, description: str
) -> Config:
    """The configuration that a command line asks for: a preset, with whatever options are given put over it.

    The default of `out` ends in the data set and the preset, where these are not the default: so one command does not
    meet the run of another.

    Args:
        presets: (preset, data) -> configuration, a dataclass with fields `preset` and `data` among others.
        data: names of data sets, the default first; as folder:PATH where something has to be put after the colon.
        argv: arguments; those of the process if None.
        description: what ``--help`` begins with.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=("smoke", "cpu", "paper"), default="cpu")
    first.add_argument("--data", default=data[0])
    chosen, _ = first.parse_known_args(argv)
    kinds = {known.partition(":")[0]: ":" in known for known in data}
    kind, _, place = chosen.data.partition(":")
    if kinds.get(kind) != bool(place):
        raise bad_argument("data", repr(chosen.data), f"choose one of {', '.join(data)}")
    default = presets(chosen.preset, chosen.data)
    ending = "".join(f"_{part}" for part in (kind, chosen.preset) if part not in (next(iter(kinds)), "cpu"))
    default = dataclasses.replace(default, out=default.out.with_name(default.out.name + ending))
    return tyro.cli(type(default), default=default, args=argv, description=description)


def run_command(main: Callable[[], object]) -> None:
    """Runs `main` for a command line: wrong arguments, files and packages end it with a message, and no traceback."""
    try:
        main()
    except (ArgumentError, FloatingPointError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from what was saved")


def claim_folder(config: BaseConfig, *, writes: bool = True) -> dict[str, Any]:
    """The settings as plain data, kept as config.json in the folder of the run.

    Args:
        config: with the folder, `out`.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    settings = settings_for_folder(config)
    if writes and not (path := config.out / "config.json").exists():
        report.write_json(path, settings)
    return settings


def settings_for_folder(config: BaseConfig) -> dict[str, Any]:
    """What `claim_folder` keeps, without claiming: for as long as nothing is begun that could meet another run.

    Raises:
        ValueError: as `claim_folder`.
    """
    settings = plain_settings(config)
    path = config.out / "config.json"
    before = report.read_json(path) if path.exists() else settings
    if other := different_settings(before, settings):
        differences = "other settings than this experiment has"
        if before.keys() == settings.keys():
            differences = ", ".join(f"{name} {before[name]} (now {settings[name]})" for name in other)
        raise bad_argument(
            "out", f"{config.out}, which holds a run with {differences}",
            "choose another folder, or give that run's settings to go on with it",
        )  # fmt: skip
    return settings


def different_settings(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of settings that make another run, of two as plain data."""
    names = sorted((set(before) | set(settings)) - _ELSEWHERE)
    return [name for name in names if before.get(name) != settings.get(name)]


def finished_before(out: Path, *, tell: Callable[[str], None] = print) -> dict[str, Any] | None:
    """What metrics.json in `out` holds if the run there was finished before, which is then told."""
    path = out / "metrics.json"
    if not path.exists():
        return None
    document: dict[str, Any] = report.read_json(path)
    tell(f"{out} holds this run, finished; remove it, or choose another --out, to run again.\n")
    tell(report.results_table(document["results"], document["costs"]))
    return document


def environment() -> dict[str, Any]:
    """On what a run was made, for metrics.json."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def over_seeds(**values: Sequence[float]) -> dict[str, Any]:
    """Each metric as {"mean", "std", "ci95", "values"}."""
    return {name: metrics.summarise(of_seeds) for name, of_seeds in values.items()}


class FeatureStage(NamedTuple):
    """What a frozen feature stage before training took."""

    bytes: int  # that it keeps
    seconds: float


class Run:
    """One run of an experiment in its folder: it trains methods, remembers their results, and writes them in the end.

    Args:
        config: what to do; kept as config.json.
        experiment: its name.

    Raises:
        ValueError: the folder holds a run of another configuration, no seeds are asked for, or several processes
            without a mesh.
    """

    def __init__(self, config: RunConfig, experiment: str) -> None:
        check_at_least("seeds", config.seeds, 1)
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells the course of each save, and errors twice
        if config.distributed:
            if not config.mesh:
                raise bad_argument("distributed", True, "say with --mesh, as data=8, what each of all devices is for")
            _join_processes()
        self._config, self._experiment, self._began = config, experiment, time.perf_counter()
        self._writes = jax.process_index() == 0
        self._mesh = sharding.make_mesh(_axes(config.mesh)) if config.mesh else None
        self.results: dict[str, list[Result]] = {}  # of each method, one a seed
        self._costs: dict[str, dict[str, Any]] = {}
        # What an experiment adds to the report: figures by caption, and to metrics.json under names of its own.
        self.figures: dict[str, Figure] = {}
        self.findings: dict[str, Any] = {}
        self._settings = settings_for_folder(config)

    def finished(self) -> dict[str, Any] | None:
        """What metrics.json holds if the run was finished before; it is told, and not done again."""
        return finished_before(self._config.out, tell=self.tell)

    def train(
        self,
        name: str,
        strategy: Strategy,
        tx: optax.GradientTransformation,
        params: Sequence[PyTree],
        streams: Sequence[Stream],
        keys: Key,
        *,
        epochs: int,
        batch_size: int,
        steps_per_call: int | None = None,
        stages: Sequence[FeatureStage] = (),
    ) -> None:
        """`continual.run_seeds`, together, with checkpoints, a bar and TensorBoard; keeps the results under `name`.

        `stages`, one a seed, is what was done to the streams before, and counts towards bytes and seconds.
        """
        out = self._config.out
        with ExitStack() as stack:
            watchers: list[Callable[[Progress], None]] = []

            def watch(progress: Progress) -> None:
                for watcher in watchers:
                    watcher(progress)

            if self._writes:
                watchers.append(stack.enter_context(ProgressBar(name, self._config.seeds)))
                if self._config.tensorboard:
                    watchers.append(stack.enter_context(report.TensorBoard(out / "tensorboard" / name)))
            results = continual.run_seeds(
                keys, strategy, tx, params, streams, epochs=epochs, batch_size=batch_size,
                steps_per_call=steps_per_call, together=True, mesh=self._mesh,
                checkpoint=Checkpoint(self.checkpoints(name), self._config.checkpoint_seconds),
                callback=watch,
            )  # fmt: skip
        self.keep(name, results, stages)

    def keep(self, name: str, results: list[Result], stages: Sequence[FeatureStage] = ()) -> None:
        """Keeps results, one a seed, under `name`; `stages` count towards bytes and seconds, as in `train`."""
        for seed, stage in enumerate(stages):
            result = results[seed]
            results[seed] = result._replace(bytes=result.bytes + stage.bytes, seconds=result.seconds + stage.seconds)
        self.results[name] = results
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._costs[name] = over_seeds(
            seconds=[r.seconds for r in results],
            examples_per_second=[r.examples / r.seconds for r in results],
            peak_memory=[peak for _ in results],
            compilations=[sum(r.compilations.values()) for r in results],
        )

    def checkpoints(self, name: str) -> Path:
        """The folder for the checkpoints of method `name`; that of the run is claimed now that something is begun."""
        claim_folder(self._config, writes=self._writes)
        return self._config.out / "checkpoints" / name

    def due(self, written: float) -> bool:
        """Whether this process is to write a checkpoint, the last one being of `written` (by `time.perf_counter`)."""
        return self._writes and time.perf_counter() - written >= self._config.checkpoint_seconds

    def finish(self) -> dict[str, Any]:
        """Writes metrics.json, accuracy.csv, history.csv and report.html; returns what is in metrics.json."""
        accuracy = {method: np.stack([r.accuracy for r in of_seeds]) for method, of_seeds in self.results.items()}
        document: dict[str, Any] = {
            "experiment": self._experiment,
            "preset": self._config.preset,
            "config": self._settings,
            "results": {method: _results(of_seeds) for method, of_seeds in self.results.items()},
            "costs": self._costs,
            "environment": environment(),
            "seconds": time.perf_counter() - self._began,
        } | self.findings
        if self._writes:
            figures = {
                "Mean accuracy over the tasks seen so far; bands are 95 % intervals over seeds": (
                    report.accuracy_over_tasks(accuracy)
                ),
                "Accuracy on each task after each training task, mean over seeds": report.accuracy_matrices(accuracy),
            } | self.figures
            out = self._config.out
            report.write_accuracy_csv(out / "accuracy.csv", accuracy, seeds=range(self._config.seeds))
            files.write_atomic(out / "history.csv", self._history())
            files.write_atomic(out / "report.html", report.html_report(document, figures))
            report.write_json(out / "metrics.json", document)  # last: it says that the run is finished
        self.tell(report.results_table(document["results"], document["costs"]))
        self.tell(f"\nWrote {self._config.out}/report.html, metrics.json, config.json, accuracy.csv and history.csv.")
        return document

    def bar(self, name: str, total: int, unit: str) -> "tqdm[Any]":
        """A progress bar for what is not training; shown by the first process only."""
        return tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, disable=not self._writes)

    def _history(self) -> str:
        """What each epoch came to, as CSV: method, seed, stage, epoch, metric, value."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "seed", "stage", "epoch", "metric", "value"])
        for method, of_seeds in self.results.items():
            for seed, result in enumerate(of_seeds):
                for entry in result.history:
                    values = {name: value for name, value in entry.items() if name not in ("stage", "epoch")}
                    for name, value in values.items():
                        writer.writerow([method, seed, entry["stage"], entry["epoch"], name, repr(value)])
        return text.getvalue()

    def tell(self, text: str) -> None:
        """Prints, in the first process."""
        if self._writes:
            print(text)


class ProgressBar:
    """One bar for all epochs of a method on all seeds: time left, the newest metrics, examples a second."""

    def __init__(self, name: str, seeds: int) -> None:
        self._seeds, self._bar = seeds, tqdm(desc=name, unit="epoch", dynamic_ncols=True)
        self._done: dict[int, int] = {}  # epochs, by first seed: some are trained at the same time

    def __call__(self, progress: Progress) -> None:
        """The callback of `jaxcl.continual.run_seeds`."""
        bar = self._bar
        bar.total = self._seeds * progress.stages * progress.epochs
        shown = {name: f"{value:.3f}" for name, value in progress.metrics.items()}
        shown["examples/s"] = f"{progress.examples / progress.seconds:,.0f}"
        self._done[progress.seed] = progress.seeds * (progress.stage * progress.epochs + progress.epoch + 1)
        bar.set_postfix(shown, refresh=False)
        bar.update(sum(self._done.values()) - bar.n)

    def __enter__(self) -> "ProgressBar":
        """Nothing to open: the bar shows at once."""
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Leaves the bar on screen; what an earlier process trained is not told here, and counts as done in the end."""
        if kind is None and self._bar.total:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


def _results(results: Sequence[Result]) -> dict[str, Any]:
    """The entry of one method in metrics.json: what a repeated run gives again, bit for bit."""
    return over_seeds(
        acc=[metrics.average_accuracy(r.accuracy) for r in results],
        bwt=[metrics.backward_transfer(r.accuracy) for r in results],
        fwt=[metrics.forward_transfer(r.accuracy, r.untrained) for r in results],
        forgetting=[metrics.forgetting(r.accuracy) for r in results],
        learning_accuracy=[metrics.learning_accuracy(r.accuracy) for r in results],
        average_anytime_accuracy=[metrics.average_anytime_accuracy(r.accuracy) for r in results],
        parameters=[r.parameters for r in results],
        bytes=[r.bytes for r in results],
    )


def _join_processes() -> None:
    """Joins the other processes of the run; what the environment does not say is left to JAX to find out."""
    count, own = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(own) if own else None,
        heartbeat_timeout_seconds=30,  # a process that is silent for so long counts as dead, and all others stop
    )


def _axes(mesh: str) -> dict[str, int]:
    """`data=4,model=2` as a mapping."""
    try:
        return {name: int(size) for name, size in (part.split("=") for part in mesh.split(","))}
    except ValueError as error:
        raise bad_argument("mesh", mesh, "write it as data=4,model=2") from error


def plain_settings(config: BaseConfig) -> dict[str, Any]:
    """The settings as JSON will give them back."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return settings
