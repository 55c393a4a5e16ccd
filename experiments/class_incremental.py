"""Class-incremental learning: naive, joint, linear probe and the key-value bottleneck on one set of streams.

This is the body that `experiments.quickstart` and `experiments.dkvb` give presets to.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.common import Run, RunConfig, load_features
from experiments.keys import train_bottleneck
from jaxcl import bottleneck, continual, nets
from jaxcl.continual import Stream, streams
from jaxcl.typing import Key


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a class-incremental experiment; the defaults shown are those of the preset."""

    data: Literal["digits", "mnist"] = "digits"
    """Image set: digits comes with scikit-learn, mnist is read from the folder that JAXCL_DATA names."""
    classes_per_task: int = 2
    """New classes in each task."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""

    codebooks: int = 64
    """Key-value bottleneck: codebooks (C)."""
    pairs: int = 256
    """Key-value bottleneck: key-value pairs in each codebook (J)."""
    key_width: int = 8
    """Key-value bottleneck: width of a key (W)."""
    top_k: int = 1
    """Key-value bottleneck: pairs fetched from each codebook."""
    key_epochs: int = 10
    """Key-value bottleneck: passes over the unlabelled training features that fit the keys."""
    key_batch_size: int = 256
    """Key-value bottleneck: examples in a step of key fitting."""
    learning_rate: float = 0.3
    """Key-value bottleneck: of gradient descent on the values; the global norm is clipped to 1."""
    epochs: int = 30
    """Key-value bottleneck: passes over each task."""

    hidden: tuple[int, ...] = (64,)
    """Naive and joint training: widths of the hidden layers of the MLP."""
    baseline_learning_rate: float = 1e-3
    """Naive, joint and linear probe: of Adam."""
    baseline_epochs: int = 10
    """Naive, joint and linear probe: passes over each task (joint: over all of them together)."""
    batch_size: int = 32
    """All methods: examples in a step."""


def run(config: Config, *, experiment: str) -> dict[str, Any]:
    """Runs all methods on all seeds, prints the table, writes the files and returns what is in metrics.json."""
    run = Run(config, experiment)
    if document := run.finished():
        return document
    split = load_features(config.data, validation=config.validation, limit=config.limit)
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    tasks = [
        streams.class_incremental(stream_key, *split, classes_per_task=config.classes_per_task)
        for stream_key, _, _ in keys
    ]
    init_keys, run_keys = [key[1] for key in keys], jnp.stack([key[2] for key in keys])
    _mlp(run, config, "naive", tasks, init_keys, run_keys)
    _linear_probe(run, config, tasks, run_keys)
    _bottleneck(run, config, tasks, init_keys, run_keys)
    _mlp(run, config, "joint", [streams.joint(stream) for stream in tasks], init_keys, run_keys)
    return run.finish()


def _mlp(run: Run, config: Config, name: str, tasks: Sequence[Stream], init_keys: Sequence[Key], keys: Key) -> None:
    net = nets.MLP(config.hidden, classes=tasks[0].eligible.shape[1])
    width = tasks[0].train.inputs.shape[1]
    params = [net.init(key, jnp.zeros((1, width))) for key in init_keys]
    run.train(
        name, continual.naive(net.apply), optax.adam(config.baseline_learning_rate), params, tasks, keys,
        epochs=config.baseline_epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip


def _linear_probe(run: Run, config: Config, tasks: Sequence[Stream], keys: Key) -> None:
    classes, width = tasks[0].eligible.shape[1], tasks[0].train.inputs.shape[1]
    params = [{"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}] * len(tasks)
    run.train(
        "linear_probe", continual.linear_probe(), optax.adam(config.baseline_learning_rate), params, tasks, keys,
        epochs=config.baseline_epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip


def _bottleneck(run: Run, config: Config, tasks: Sequence[Stream], init_keys: Sequence[Key], keys: Key) -> None:
    layer = bottleneck.discrete_key_value_bottleneck(
        tasks[0].train.inputs.shape[1],
        tasks[0].eligible.shape[1],
        codebooks=config.codebooks,
        pairs=config.pairs,
        key_width=config.key_width,
        top_k=config.top_k,
    )
    train_bottleneck(
        run, layer, config.learning_rate, tasks, init_keys, keys,
        key_epochs=config.key_epochs, key_batch_size=config.key_batch_size,
        epochs=config.epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip
