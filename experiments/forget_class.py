"""Deleting a class from a trained key-value bottleneck: what it costs the class, and what it costs the others.

The bottleneck of experiments.dkvb learns all classes in turn. Then each class is deleted from it, one at a time, by
bottleneck.forget_class, which looks only at what the class's training examples fetch: nothing is trained again.

What is removed: every value of which the class's examples made half of the fetches or more, as a whole; and in all
other values the class's own entry, which is put below every other, so that the class is never the answer. What stays:
the keys, which may lie where the class's examples were; how the class's examples moved other classes' entries in values
that they shared; and, outside the bottleneck, the encoder, checkpoints and cached features.

Another class may fall, where its examples fetched values that were removed; and it may rise, since examples that were
taken for the deleted class no longer are. Columns show the largest of both, over seeds and classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import class_incremental, dkvb
from experiments.card import Card
from experiments.class_incremental import Config
from experiments.common import Run, over_seeds, parse_command, run_command
from experiments.keys import Indexed
from experiments.sweep import run_grid
from jaxcl import bottleneck, report
from jaxcl.bottleneck import Bottleneck
from jaxcl.typing import PyTree, bad_argument

CARDS = {
    "--preset smoke": Card("10 s", "that it runs"),
    "--preset cpu": Card("30 s", "digits: a deleted class falls to 0 %, others change by one example of 34 at most"),
    "--preset cpu --data mnist": Card(
        "3 min", "a deleted class falls to 0 %, no other by more than 0.11 points; they rise by up to 2.95"
    ),
    "--preset paper": Card("not measured", "nothing is published on deleting classes"),
}


def preset(name: str, data: str) -> Config:
    """The presets of `experiments.dkvb`, the bottleneck alone."""
    return dataclasses.replace(dkvb.preset(name, data), methods=("dkvb",), out=Path("runs/forget_class"))


def delete_each(
    layer: Bottleneck, indexed: Indexed, params: PyTree, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy of each class [K] before, and [K, K] of each class (columns) after each one's deletion (rows)."""
    train, test = indexed.stream.train, indexed.stream.test
    fetched, shown, answers = jnp.asarray(train.inputs), jnp.asarray(test.inputs), np.asarray(test.labels)
    state = layer.count_usage(indexed.state, fetched)

    @jax.jit
    def predict(params: PyTree) -> jax.Array:
        return jnp.argmax(bottleneck.vote(layer.read(params, shown))[..., :classes], axis=-1)

    def by_class(params: PyTree) -> np.ndarray:
        right = np.asarray(predict(params)) == answers
        return np.array([right[answers == label].mean() for label in range(classes)])

    after = []
    for label in range(classes):
        without, _ = bottleneck.forget_class(params, state, label, fetched[labels == label])
        after.append(by_class(without))
    return by_class(params), np.stack(after)


def run_experiment(config: Config) -> dict[str, Any]:
    """Trains, deletes each class, prints the table, writes the files and returns what is in metrics.json."""
    if config.methods != ("dkvb",) or config.decoder != "voting":
        raise bad_argument("methods", (config.methods, config.decoder), "leave dkvb alone, with the voting decoder")
    run = Run(config, "forget_class")
    if document := run.finished():
        return document
    tasks, init_keys, keys = class_incremental.prepare(config)
    layer = class_incremental.make_layer(config, tasks[0])
    source = class_incremental.key_source(config, tasks[0])
    indexed = class_incremental.train_dkvb(run, config, layer, source, tasks, init_keys, keys)
    classes = tasks[0].eligible.shape[1]
    found = [
        delete_each(layer, of_seed, result.params, np.asarray(stream.train.labels), classes)
        for of_seed, result, stream in zip(indexed, run.results["dkvb"], tasks, strict=True)
    ]
    before, after = (np.stack(part) for part in zip(*found, strict=True))  # [S, K], [S, K, K]
    change = np.where(np.eye(classes, dtype=bool), 0, after - before[:, None])
    fall, rise = np.maximum(-change, 0), np.maximum(change, 0)
    rows = [["class", "before %", "after its deletion %", "largest fall of another class, points", "largest rise"]]
    for label in range(classes):
        shares = before[:, label].mean(), after[:, label, label].mean()
        extremes = fall[:, label].max(), rise[:, label].max()
        rows.append([str(label), *(f"{100 * x:.1f}" for x in shares), *(f"{100 * x:.2f}" for x in extremes)])
    run.findings["deletion"] = over_seeds(
        accuracy_of_the_deleted=np.diagonal(after, axis1=1, axis2=2).mean(axis=1).tolist(),
        largest_fall_of_another=fall.max(axis=(1, 2)).tolist(),
        largest_rise_of_another=rise.max(axis=(1, 2)).tolist(),
    )
    run.tell(report.text_table(rows))
    return run.finish()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, or its last point in a sweep; returns what is in metrics.json."""
    config = parse_command(preset, data=dkvb.DATA, argv=argv, description=__doc__ or "")
    return run_grid(config, run_experiment)[-1]


if __name__ == "__main__":
    run_command(main)
