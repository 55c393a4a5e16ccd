"""The key-value bottleneck in two stages, as several experiments train it: keys are fitted, then only values learn."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import FeatureStage, Run
from jaxcl import bottleneck, continual, trees
from jaxcl.bottleneck import Bottleneck
from jaxcl.continual import Stream, streams
from jaxcl.typing import ArrayLike, Key, PyTree


def train_bottleneck(
    run: Run,
    layer: Bottleneck,
    learning_rate: float,
    tasks: Sequence[Stream],
    init_keys: Sequence[Key],
    keys: Key,
    *,
    classes: int,
    key_epochs: int,
    key_batch_size: int,
    **steps: Any,
) -> None:
    """Fits the keys to the features of the first seed's stream without labels, then trains the values of each seed.

    Args:
        run: keeps the results as "dkvb".
        layer: the bottleneck.
        learning_rate: of gradient descent on the values; the global norm is clipped to 1.
        tasks: one stream a seed, of features [N, D].
        init_keys: one a seed; consumed.
        keys: [S], one a seed, for training; consumed.
        classes: K, which values may be wider than.
        key_epochs: passes over the features.
        key_batch_size: examples in a step of key fitting.
        steps: further arguments of `Run.train`.
    """
    features = jnp.asarray(tasks[0].train.inputs)
    params, indexed, stages = _fit_and_look_up(
        run, layer, features, tasks, init_keys, epochs=key_epochs, batch_size=key_batch_size
    )
    tx = bottleneck.sparse_sgd(learning_rate, max_norm=1.0)
    strategy = continual.key_value_bottleneck(layer, classes=classes)
    run.train("dkvb", strategy, tx, params, indexed, keys, stages=stages, **steps)


def _fit_and_look_up(
    run: Run,
    layer: Bottleneck,
    features: ArrayLike,
    tasks: Sequence[Stream],
    keys: Sequence[Key],
    *,
    epochs: int,
    batch_size: int,
) -> tuple[list[PyTree], list[Stream], list[FeatureStage]]:
    """For each seed: the bottleneck's initial params, the stream of indices [N, C, top_k] uint16, and what it took."""
    lookup = jax.jit(layer.lookup)
    params, indexed, stages = [], [], []
    with run.bar("dkvb keys", len(tasks) * (epochs + 1), "epoch") as bar:
        for key, stream in zip(keys, tasks, strict=True):
            began = time.perf_counter()
            init_key, *epoch_keys = jax.random.split(key, 1 + epochs)
            values, state = layer.init(init_key)
            for epoch_key in epoch_keys:
                state = bottleneck.fit_epoch(epoch_key, layer, values, state, features, batch_size=batch_size)
                jax.block_until_ready(state)
                bar.update()
            # Keys never move again, so what each example fetches is known for good: train on that.
            indexed.append(streams.map_inputs(stream, lambda x: lookup(values, state, x).astype(jnp.uint16)))  # noqa: B023
            bar.update()
            params.append(values)
            kept = trees.byte_count((state.projection, state.keys.codebook))
            stages.append(FeatureStage(kept, time.perf_counter() - began))
    return params, indexed, stages
