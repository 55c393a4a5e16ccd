"""Class-incremental learning: naive, joint, linear probe and the key-value bottleneck on one set of streams.

This is the body that `experiments.quickstart` and `experiments.dkvb` give presets to.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.common import ProgressBar, summarise_method, write_outputs
from jaxcl import bottleneck, continual, data, nets, report, trees
from jaxcl.continual import Examples, Result, Strategy, Stream, streams
from jaxcl.typing import Key, PyTree, check_at_least


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a class-incremental experiment; the defaults shown are those of the preset."""

    preset: Literal["smoke", "cpu", "paper"] = "cpu"
    """Starting point of all other settings: smoke takes seconds, cpu minutes on two cores, paper is as published."""
    data: Literal["digits", "mnist"] = "digits"
    """Image set: digits comes with scikit-learn, mnist is read from the folder that JAXCL_DATA names."""
    out: Path = Path("runs/class_incremental")
    """Folder for metrics.json, config.json, accuracy.csv and report.html."""
    seeds: int = 5
    """How many seeds, from 0 on; each has its own class order, initial parameters and data order."""
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
    check_at_least("seeds", config.seeds, 1)
    began = time.perf_counter()
    split = _split(config)
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    tasks = [
        streams.class_incremental(stream_key, *split, classes_per_task=config.classes_per_task)
        for stream_key, _, _ in keys
    ]
    init_keys, run_keys = [key[1] for key in keys], jnp.stack([key[2] for key in keys])

    results = {
        "naive": _mlp(config, "naive", tasks, init_keys, run_keys),
        "linear_probe": _linear_probe(config, tasks, run_keys),
        "dkvb": _bottleneck(config, tasks, init_keys, run_keys),
        "joint": _mlp(config, "joint", [streams.joint(stream) for stream in tasks], init_keys, run_keys),
    }
    accuracy = {method: np.stack([r.accuracy for r in of_seeds]) for method, of_seeds in results.items()}
    figures = {
        "Mean accuracy over the tasks seen so far; bands are 95 % intervals over seeds": report.accuracy_over_tasks(
            accuracy
        ),
        "Accuracy on each task after each training task, mean over seeds": report.accuracy_matrices(accuracy),
    }
    document = write_outputs(
        config.out,
        experiment=experiment,
        config=config,
        results={method: summarise_method(of_seeds) for method, of_seeds in results.items()},
        accuracy=accuracy,
        figures=figures,
        seconds=time.perf_counter() - began,
    )
    print(report.results_table(document["results"]))
    print(f"\nWrote {config.out}/report.html, metrics.json, config.json and accuracy.csv.")
    return document


def _split(config: Config) -> data.Split:
    split = data.load(config.data)
    if config.validation:
        split = data.Split(*data.hold_out(split.train, share=0.2))
    if config.limit is not None:
        check_at_least("limit", config.limit, 1)
        split = data.Split(_first(split.train, config.limit), _first(split.test, -(-config.limit // 5)))
    return data.flat_features(split)


def _first(examples: Examples, count: int) -> Examples:
    return Examples(examples.inputs[:count], examples.labels[:count])


def _train(
    config: Config,
    name: str,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: Sequence[PyTree],
    tasks: Sequence[Stream],
    keys: Key,
    *,
    epochs: int,
    together: bool = False,
) -> list[Result]:
    with ProgressBar(name, 1 if together else config.seeds) as bar:
        # No convolutions here, so many steps a call are faster on CPU too.
        return continual.run_seeds(
            keys, strategy, tx, params, tasks, epochs=epochs, batch_size=config.batch_size, steps_per_call=64,
            together=together, callback=bar,
        )  # fmt: skip


def _mlp(config: Config, name: str, tasks: Sequence[Stream], init_keys: Sequence[Key], keys: Key) -> list[Result]:
    net = nets.MLP(config.hidden, classes=tasks[0].eligible.shape[1])
    params = [net.init(key, stream.train.inputs[:1]) for key, stream in zip(init_keys, tasks, strict=True)]
    tx = optax.adam(config.baseline_learning_rate)
    return _train(config, name, continual.naive(net.apply), tx, params, tasks, keys, epochs=config.baseline_epochs)


def _linear_probe(config: Config, tasks: Sequence[Stream], keys: Key) -> list[Result]:
    classes, width = tasks[0].eligible.shape[1], tasks[0].train.inputs.shape[1]
    params = [{"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}] * len(tasks)
    tx = optax.adam(config.baseline_learning_rate)
    probe = continual.linear_probe()
    # So little arithmetic that seeds together are faster than in turn, unlike the other methods (measured on CPU).
    return _train(config, "linear_probe", probe, tx, params, tasks, keys, epochs=config.baseline_epochs, together=True)


def _bottleneck(config: Config, tasks: Sequence[Stream], init_keys: Sequence[Key], keys: Key) -> list[Result]:
    features = jnp.asarray(tasks[0].train.inputs)
    layer = bottleneck.discrete_key_value_bottleneck(
        features.shape[1],
        tasks[0].eligible.shape[1],
        codebooks=config.codebooks,
        pairs=config.pairs,
        key_width=config.key_width,
        top_k=config.top_k,
    )
    lookup = jax.jit(layer.lookup)
    params, indexed, frozen_bytes, frozen_seconds = [], [], [], []
    with tqdm(total=config.seeds * (config.key_epochs + 1), desc="dkvb keys", unit="epoch", dynamic_ncols=True) as bar:
        for key, stream in zip(init_keys, tasks, strict=True):
            began = time.perf_counter()
            init_key, *epoch_keys = jax.random.split(key, 1 + config.key_epochs)
            values, state = layer.init(init_key)
            for epoch_key in epoch_keys:
                state = bottleneck.fit_epoch(
                    epoch_key, layer, values, state, features, batch_size=config.key_batch_size
                )
                jax.block_until_ready(state)
                bar.update()
            # Keys never move again, so what each example fetches is known for good: train on that.
            indexed.append(streams.map_inputs(stream, lambda x: lookup(values, state, x).astype(jnp.uint16)))  # noqa: B023
            bar.update()
            params.append(values)
            frozen_bytes.append(trees.byte_count((state.projection, state.keys.codebook)))
            frozen_seconds.append(time.perf_counter() - began)
    results = _train(
        config,
        "dkvb",
        continual.key_value_bottleneck(layer),
        bottleneck.sparse_sgd(config.learning_rate, max_norm=1.0),
        params,
        indexed,
        keys,
        epochs=config.epochs,
    )
    return [
        result._replace(bytes=result.bytes + extra_bytes, seconds=result.seconds + extra_seconds)
        for result, extra_bytes, extra_seconds in zip(results, frozen_bytes, frozen_seconds, strict=True)
    ]
