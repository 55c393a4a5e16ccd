"""Strategies that keep nothing of the past: what the others are compared with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.continual.strategies.contract import (
    Apply,
    Batch,
    Metrics,
    Strategy,
    cross_entropy,
    gradients_of,
    predict_by,
)
from jaxcl.trees import bank, commit, pick
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_between, check_count


def naive(apply: Apply, *, label_smoothing: float = 0.0) -> Strategy:
    """Sequential fine-tuning: each batch's gradient and nothing else, the floor that other methods are compared with.

    On `streams.joint` it is joint training, the ceiling.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        label_smoothing: see `cross_entropy`.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)

    def loss(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        return cross_entropy(apply(params, batch.inputs), batch, label_smoothing=label_smoothing)

    return Strategy(gradients_of(loss), predict_by(apply))


class Networks(NamedTuple):
    """The networks of the tasks that are done, and what each begins as."""

    first: PyTree  # parameters
    kept: PyTree  # parameters, each leaf [T, ...]
    committed: Array  # [] int32


def independent(apply: Apply, tasks: int, *, label_smoothing: float = 0.0) -> Strategy:
    """One network a task, each from the same start: nothing is forgotten and nothing passed on, at T times the cost.

    The task must be told at test time. Tasks that are not done yet are answered by the network in training.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        tasks: T.
        label_smoothing: see `cross_entropy`.

    Raises:
        ValueError: an option out of range; in use, a task that is not told.
    """
    check_count("tasks", tasks, 1)

    def init(key: Key, params: PyTree, batch: Batch) -> Networks:
        return Networks(params, bank(params, tasks), jnp.int32(0))

    def begin_task(key: Key, params: PyTree, state: Networks, task: Array) -> tuple[PyTree, Networks]:
        return state.first, state

    def end_task(key: Key, params: PyTree, state: Networks) -> tuple[PyTree, Networks]:
        kept = commit(state.kept, state.committed, params)
        return params, state._replace(kept=kept, committed=state.committed + 1)

    def predict(params: PyTree, state: Networks, inputs: Array, task: Array | None) -> Array:
        if task is None:
            raise bad_argument("task", task, "networks go by task: pass a stream that tells it, task_known=True")
        done = task < state.committed
        own: Array = apply(
            jax.tree.map(lambda old, now: jnp.where(done, old, now), pick(state.kept, task), params), inputs
        )
        return own

    return naive(apply, label_smoothing=label_smoothing)._replace(
        predict=predict, init=init, begin_task=begin_task, end_task=end_task, fresh_optimizer=True, tasks=tasks
    )


def linear_probe(*, label_smoothing: float = 0.0) -> Strategy:
    """One linear layer on frozen features, trained in turn: params ``{"kernel": [D, K], "bias": [K]}``, inputs [B, D].

    The problem is convex, so zeros are the usual start. `label_smoothing` as in `cross_entropy`.
    """

    def apply(params: PyTree, features: Array) -> Array:
        logits: Array = features.reshape(len(features), -1) @ params["kernel"] + params["bias"]
        return logits

    return naive(apply, label_smoothing=label_smoothing)
