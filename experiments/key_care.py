"""Keys under drift: a key-value bottleneck whose keys are cared for, beside the same one whose keys stay as fitted.

Keys are fitted, without labels, to what the first task shows, but for a fifth, which tells how far from the keys such
data lie; then other data streams in: the same images turned, or other classes. Values learn on all of it. Key care puts
spare keys where the new data is and lets each begin with the value of the key that was nearest
(bottleneck.care_for_keys). Three ways are compared:

* all_keys: no care, and no key spared: all are fitted to the first task;

* spare_asleep: no care, and the keys that care has in reserve stay out of play;

* care: the same reserve, looked after every --refresh-every steps.

old is the accuracy at the end on the first task, which has not been seen since, and new that on what came after.
decisions.csv tells what each check found and did.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.card import Card
from experiments.common import Run, RunConfig, over_seeds, parse_command, run_command
from experiments.features import load_features
from experiments.keys import KeyFitting, fit_keys
from jaxcl import bottleneck, continual, files, report
from jaxcl.bottleneck import Bottleneck, KeyPolicy, KeyState
from jaxcl.continual import Checkpoint, Examples, Result, Stream, streams
from jaxcl.typing import Key, bad_argument, check_at_least, check_between

CARDS = {
    "--preset smoke": Card("20 s", "that it runs"),
    "--preset cpu": Card(
        "3 min", "accuracy on turned digits 95.1 ± 1.2 % with care, 89.9 ± 1.2 without; on upright ones 95.5 and 94.7 %"
    ),
    "--preset cpu --data mnist": Card(
        "9 min", "accuracy on turned images 66.6 ± 1.9 % with care, 48.3 ± 1.7 without; on upright ones 85.1 and 82.9 %"
    ),
    "--preset paper": Card("as cpu", "nothing is published on key care"),
}
METHODS = ("all_keys", "spare_asleep", "care")


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment on key care; the defaults shown are those of the preset."""

    data: Literal["digits", "mnist"] = "digits"
    """Images, as raw pixels; mnist lies in the folder that JAXCL_DATA names."""
    drift: Literal["rotated", "classes"] = "rotated"
    """What comes after the first task: the same images turned, or the other half of the classes."""
    degrees: float = 90.0
    """How far images are turned."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""
    codebooks: int = 32
    """Codebooks (C)."""
    pairs: int = 256
    """Key-value pairs in each codebook (J), spare ones included."""
    spare: int = 128
    """How many of them are kept in reserve."""
    key_width: int = 8
    """Width of a key (W)."""
    key_epochs: int = 5
    """Passes over the first task's features that fit the keys."""
    refresh_every: int = 20
    """Steps from one check of the keys to the next."""
    shift: float = 0.15
    """A codebook is cared for if its shift is above this, and above chance: see bottleneck.KeyPolicy."""
    far: float = 0.9
    """Heads that lie farther out than this share of the first task's may become keys."""
    most: int = 16
    """Keys that are placed in one check, in each codebook."""
    learning_rate: float = 3.0
    """Of gradient descent on the values; the global norm is clipped to 1."""
    epochs: int = 5
    """Passes over each task."""
    batch_size: int = 256
    """Examples in a step."""


def preset(name: str, data: str) -> Config:
    """The settings of preset `name` for a data set."""
    shared: dict[str, Any] = {"preset": name, "data": data, "out": Path("runs/key_care")}
    if name == "smoke":
        return Config(
            **shared, seeds=2, limit=600, codebooks=8, pairs=32, spare=16, key_epochs=2, epochs=2, batch_size=32
        )
    if data == "mnist":
        return Config(**shared, limit=20_000, key_width=112)
    return Config(**shared, epochs=30, batch_size=32)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns what is in metrics.json."""
    config = parse_command(preset, data=("digits", "mnist"), argv=argv, description=__doc__ or "")
    check_between("spare", config.spare, 1, config.pairs - 1)
    check_at_least("refresh_every", config.refresh_every, 1)
    check_at_least("key_epochs", config.key_epochs, 0)
    check_between("shift", config.shift, 0, 1)
    check_between("far", config.far, 0, 1)
    check_at_least("most", config.most, 1)
    if config.mesh or config.tensorboard:
        raise bad_argument(
            "mesh",
            config.mesh,
            "keys are cared for on one device, and no event files are written: leave --mesh and --tensorboard out",
        )
    run = Run(config, "key_care")
    if document := run.finished():
        return document
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    tasks = [_stream(config, key[0]) for key in keys]
    policy = KeyPolicy(config.shift, config.far, config.most)
    fitting = KeyFitting(config.key_epochs, config.batch_size)
    figures: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for method in METHODS:
        width, classes = tasks[0].train.inputs.shape[1], tasks[0].eligible.shape[1]
        layer = bottleneck.discrete_key_value_bottleneck(
            width, classes, codebooks=config.codebooks, pairs=config.pairs, key_width=config.key_width,
            spare=0 if method == "all_keys" else config.spare,
        )  # fmt: skip
        results: list[Result] = []
        with run.bar(method, config.seeds * (config.key_epochs + 2 * config.epochs), "epoch") as bar:
            for seed, (stream, (_, init_key, run_key)) in enumerate(zip(tasks, keys, strict=True)):
                first = jnp.asarray(stream.train.inputs[stream.train_sets[0].rows])
                held_out, shown = jnp.split(first, [len(first) // 5])
                values, state, _ = fit_keys(run, method, layer, fitting, shown, init_key, seed, bar)
                reference = jax.jit(bottleneck.reference_distances, static_argnums=0)(layer, values, state, held_out)
                strategy = continual.cared_key_value_bottleneck(
                    layer,
                    state,
                    reference,
                    refresh_every=config.refresh_every if method == "care" else 0,
                    policy=policy,
                )
                result = continual.run(
                    run_key, strategy, bottleneck.sparse_sgd(config.learning_rate, max_norm=1.0), values, stream,
                    epochs=config.epochs, batch_size=config.batch_size, steps_per_call=16,
                    checkpoint=Checkpoint(run.checkpoints(method) / f"seed_{seed}", config.checkpoint_seconds),
                    callback=lambda progress: bar.update(),
                )  # fmt: skip
                results.append(result)
                if method == "care" and seed == 0:
                    figures = _shifts(config, result, stream)
                    figures |= _distances(layer, state, result.strategy_state.keys, stream)
        run.keep(method, results)
    rows = [["keys", "old %", "new %", "keys placed in each codebook"]]
    for method in METHODS:
        final = [result.accuracy[-1] for result in run.results[method]]
        placed = [float(result.strategy_state.placed.mean()) for result in run.results[method]]
        found[method] = over_seeds(old=[a[0] for a in final], new=[a[1] for a in final], placed=placed)
        old, new = (f"{100 * np.mean([a[task] for a in final]):.1f}" for task in (0, 1))
        rows.append([method, old, new, f"{np.mean(placed):.0f}"])
    files.write_atomic(config.out / "decisions.csv", _decisions(run.results["care"]))
    run.findings["key_care"] = found
    run.figures |= figures
    run.tell(report.text_table(rows))
    return run.finish()


def _stream(config: Config, key: Key) -> Stream:
    """Two tasks of features: what the keys are fitted to, and what comes after."""
    split = load_features(config.data, validation=config.validation, limit=config.limit)
    if config.drift == "classes":
        return streams.class_incremental(key, *split, classes_per_task=5)
    side = int(split.train.inputs.shape[1] ** 0.5)
    images = (Examples(np.asarray(part.inputs).reshape(-1, side, side), part.labels) for part in split)
    stream = streams.rotated(*images, degrees=[0.0, config.degrees])
    return streams.map_inputs(stream, jax.jit(lambda images: images.reshape(len(images), -1)))


def _decisions(results: Sequence[Result]) -> str:
    """What each check of the keys did and why, as CSV: seed, check, codebook, placed, free, cause."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["seed", "check", "codebook", "placed", "free", "cause"], lineterminator="\n")
    writer.writeheader()
    for seed, result in enumerate(results):
        for number, care in continual.key_decisions(result.strategy_state):
            writer.writerows({"seed": seed, "check": number} | record for record in bottleneck.describe_care(care))
    return text.getvalue()


def _shifts(config: Config, result: Result, stream: Stream) -> dict[str, Any]:
    """The shift score at each check, of the codebook where it is largest and of the one in the middle."""
    steps: list[int] = []
    begin = 0
    for part in stream.train_sets:  # checks are counted from the beginning of a task
        end = begin + config.epochs * -(-len(part.rows) // config.batch_size)
        steps += range(begin + config.refresh_every, end + 1, config.refresh_every)
        begin = end
    decisions = continual.key_decisions(result.strategy_state)
    if not decisions:
        return {}
    at = [steps[number] for number, _ in decisions]
    shift = np.stack([care.health.shift for _, care in decisions], axis=1)
    lines = {
        "largest": shift.max(axis=0),
        "median": np.median(shift, axis=0),
        "threshold": [float(care.above) for _, care in decisions],
    }
    figure = report.line_plot({name: np.array([at, line]) for name, line in lines.items()}, "training step", "shift")
    return {"How far the data shifted, over codebooks (first seed, with care)": figure}


def _distances(layer: Bottleneck, before: KeyState, after: KeyState, stream: Stream) -> dict[str, Any]:
    """Histograms of how far test heads of both tasks are from their keys, before and after the stream."""
    lookup = jax.jit(lambda state, x: layer.distances(state, x, layer.lookup((), state, x)))
    found = {}
    for name, state in (("as fitted", before), ("cared for", after)):
        for task, selection in zip(("old", "new"), stream.test_sets, strict=True):
            found[f"{task} data, keys {name}"] = np.asarray(
                lookup(state, jnp.asarray(stream.test.inputs[selection.rows]))
            )
    return {"How far heads of test examples are from their keys (first seed)": report.distance_histograms(found)}


if __name__ == "__main__":
    run_command(main)
