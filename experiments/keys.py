"""The key-value bottleneck's feature stage, which several experiments share: keys are fitted, then looked up once."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.common import FeatureStage, Run
from jaxcl import bottleneck, trees
from jaxcl.bottleneck import Bottleneck
from jaxcl.continual import Stream, streams
from jaxcl.typing import ArrayLike, Key, PyTree


def fit_and_look_up(
    run: Run,
    layer: Bottleneck,
    features: ArrayLike,
    tasks: Sequence[Stream],
    keys: Sequence[Key],
    *,
    epochs: int,
    batch_size: int,
) -> tuple[list[PyTree], list[Stream], list[FeatureStage]]:
    """For each seed: the bottleneck's initial params, the stream of indices [N, C, top_k] uint16, and what it took.

    Args:
        run: shows the progress.
        layer: the bottleneck.
        features: [N, D], which its keys are fitted to without labels.
        tasks: one stream a seed, of features [N, D].
        keys: one a seed; consumed.
        epochs: passes over the features.
        batch_size: examples in a step of key fitting.
    """
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
