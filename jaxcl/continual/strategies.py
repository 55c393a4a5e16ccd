"""Continual-learning methods as strategies: what happens to gradients, updates and state as tasks come by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.bottleneck import Bottleneck, pair_numbers, vote
from jaxcl.trees import Rows
from jaxcl.typing import Array, Key, PyTree, check_between

Metrics = dict[str, Array]
Apply = Callable[[PyTree, Array], Any]  # (params, inputs [B, ...]) -> logits [B, K]


class Batch(NamedTuple):
    """What a step learns from. Rows that only fill the batch up have weight 0."""

    inputs: Array  # [B, ...]
    labels: Array  # [B] int32
    weights: Array  # [B] float32, 1 or 0
    eligible: Array  # [B, K] bool, the classes the answer may come from
    task: Array  # [] int32, the training stage


def _no_state(key: Key, params: PyTree) -> PyTree:
    return ()


def _same_at_begin(key: Key, params: PyTree, state: PyTree, task: Array) -> tuple[PyTree, PyTree]:
    return params, state


def _same_with_batches(key: Key, params: PyTree, state: PyTree, batches: Batch) -> tuple[PyTree, PyTree]:
    return params, state


def _same_updates(
    key: Key, params: PyTree, state: PyTree, batch: Batch, grads: PyTree, updates: PyTree
) -> tuple[PyTree, PyTree]:
    return updates, state


class Strategy(NamedTuple):
    """A continual-learning method: pure functions, called by the loop inside its compiled programs.

    Batch -> `gradients` -> optimizer -> `after_update` -> parameters. Only `gradients` and `predict` must be given;
    the others do nothing unless they are. `batches` is a `Batch` whose leaves have a leading axis, one entry for each
    batch of the current epoch (entries past the last have weight 0 throughout).
    """

    gradients: Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, Metrics]]
    # (key, params, state, batch) -> (grads, metrics); metrics are scalars, averaged over examples for the record
    predict: Callable[[PyTree, PyTree, Array, Array | None], Array]
    # (params, state, inputs [B, ...], task) -> logits [B, K]; task is None where the method is not told it
    init: Callable[[Key, PyTree], PyTree] = _no_state  # (key, params) -> state
    begin_task: Callable[[Key, PyTree, PyTree, Array], tuple[PyTree, PyTree]] = _same_at_begin
    # (key, params, state, task) -> (params, state)
    after_update: Callable[[Key, PyTree, PyTree, Batch, PyTree, PyTree], tuple[PyTree, PyTree]] = _same_updates
    # (key, params, state, batch, grads, updates) -> (updates, state)
    refresh: Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, PyTree]] = _same_with_batches
    # (key, params, state, batches) -> (params, state), after every `refresh_every` steps of a task
    end_task: Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, PyTree]] = _same_with_batches
    # (key, params, state, batches) -> (params, state)
    refresh_every: int = 0  # steps; 0 is never


def gradients_of(
    loss: Callable[[Key, PyTree, PyTree, Batch], tuple[Array, Metrics]],
) -> Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, Metrics]]:
    """`Strategy.gradients` of a loss: (key, params, state, batch) -> (scalar, metrics), in params."""

    def gradients(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        grads, metrics = jax.grad(lambda params: loss(key, params, state, batch), has_aux=True)(params)
        return grads, metrics

    return gradients


def cross_entropy(logits: Array, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Array, Metrics]:
    """Mean cross entropy in nats over the batch, and the metrics "loss" and "accuracy" (a fraction).

    Classes that are not eligible take no part; label smoothing spreads over those that are, the right one included.

    Args:
        logits: [B, K].
        batch: its labels, weights and eligible classes count.
        label_smoothing: share of the target that is spread evenly.
    """
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where(batch.eligible, logits.astype(jnp.float32), lowest)
    smooth = label_smoothing / batch.eligible.sum(axis=-1, keepdims=True)
    target = jax.nn.one_hot(batch.labels, logits.shape[-1]) * (1 - label_smoothing) + smooth
    terms = jnp.where(batch.eligible, target * jax.nn.log_softmax(logits), 0)
    total = jnp.maximum(batch.weights.sum(), 1)
    loss = -jnp.sum(terms.sum(axis=-1) * batch.weights) / total
    right = jnp.argmax(logits, axis=-1) == batch.labels
    return loss, {"loss": loss, "accuracy": jnp.sum(right * batch.weights) / total}


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

    def predict(params: PyTree, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return apply(params, inputs)

    return Strategy(gradients_of(loss), predict)


def linear_probe(*, label_smoothing: float = 0.0) -> Strategy:
    """One linear layer on frozen features, trained in turn: params ``{"kernel": [D, K], "bias": [K]}``, inputs [B, D].

    The problem is convex, so zeros are the usual start. `label_smoothing` as in `cross_entropy`.
    """

    def apply(params: PyTree, features: Array) -> Array:
        logits: Array = features.reshape(len(features), -1) @ params["kernel"] + params["bias"]
        return logits

    return naive(apply, label_smoothing=label_smoothing)


class Momentum(NamedTuple):
    """Momentum of a table of which few rows change a step, brought up to date only where it is read."""

    velocity: Array  # [C, J, V], as of the step a pair was last fetched
    touched: Array  # [C, J] int32, that step
    step: Array  # [] int32, steps taken


def key_value_bottleneck(
    bottleneck: Bottleneck, *, classes: int | None = None, label_smoothing: float = 0.1, momentum: float = 0.0
) -> Strategy:
    """The values of a discrete key-value bottleneck learn, on indices looked up beforehand, and vote.

    Inputs are indices [B, C, top_k] (any integer dtype; see `streams.map_inputs`), params the bottleneck's. Gradients
    are `trees.Rows`, so the optimizer is `bottleneck.sparse_sgd`; equal to the dense rule, at the cost of the rows.

    Momentum would move every value at every step. But a value that is not fetched coasts: under velocity w, the sum of
    past updates decayed by mu a step, it will come to rest at q = p + mu w / (1 - mu), and an update u moves q by
    u / (1 - mu) and nothing else does. So the table holds q, and a fetched row's p follows from q and its own w. The
    learning rate must be constant.

    Args:
        bottleneck: what `bottleneck.discrete_key_value_bottleneck` made.
        classes: K, where values are wider than that and the rest of them is padding; None takes V.
        label_smoothing: see `cross_entropy`; 0.1 is published.
        momentum: mu, from 0 to below 1; the published recipe has none.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)
    check_between("momentum", momentum, 0, 1 - 1e-6)
    coasting = momentum / (1 - momentum)

    def numbers_of(state: PyTree, params: PyTree, indices: Array) -> Array:
        return pair_numbers(indices, params["values"].shape[1])

    def velocity_at(state: Momentum, numbers: Array) -> Array:
        width = state.velocity.shape[-1]
        age = state.step - state.touched.reshape(-1)[numbers]
        return state.velocity.reshape(-1, width)[numbers] * momentum ** age[..., None].astype(jnp.float32)

    def fetch(params: PyTree, state: PyTree, indices: Array) -> Array:
        values = bottleneck.read(params, indices)
        if momentum:
            values -= coasting * velocity_at(state, numbers_of(state, params, indices))
        return values

    def answer(values: Array) -> Array:
        if classes is not None:
            check_between("classes", classes, 1, values.shape[-1])
        return vote(values)[..., :classes]

    def init(key: Key, params: PyTree) -> PyTree:
        if not momentum:
            return ()
        values = params["values"]
        return Momentum(jnp.zeros_like(values), jnp.zeros(values.shape[:2], jnp.int32), jnp.int32(0))

    def gradients(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        def loss(values: Array) -> tuple[Array, Metrics]:
            return cross_entropy(answer(values), batch, label_smoothing=label_smoothing)

        grads, metrics = jax.grad(loss, has_aux=True)(fetch(params, state, batch.inputs))
        return {"values": Rows(numbers_of(state, params, batch.inputs), grads)}, metrics

    def after_update(
        key: Key, params: PyTree, state: PyTree, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        if not momentum:
            return updates, state
        numbers, change = updates["values"]
        state = state._replace(step=state.step + 1)
        velocity = state.velocity.reshape(-1, change.shape[-1])
        # Rows fetched twice in a batch are set twice to the same decayed velocity, then each update is added.
        velocity = velocity.at[numbers].set(velocity_at(state, numbers)).at[numbers].add(change)
        touched = state.touched.reshape(-1).at[numbers].set(state.step).reshape(state.touched.shape)
        state = state._replace(velocity=velocity.reshape(state.velocity.shape), touched=touched)
        return {"values": Rows(numbers, change / (1 - momentum))}, state

    def predict(params: PyTree, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return answer(fetch(params, state, inputs))

    return Strategy(gradients, predict, init, after_update=after_update)
