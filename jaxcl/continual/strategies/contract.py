"""What a strategy is: what happens to gradients, updates and state as batches and tasks come by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Key, PyTree, bad_argument, check_count

Metrics = dict[str, Array]
Apply = Callable[[PyTree, Array], Any]  # (params, inputs [B, ...]) -> logits [B, K]


class Batch(NamedTuple):
    """What a step learns from. Rows that only fill the batch up have weight 0."""

    inputs: Array  # [B, ...]
    labels: Array  # [B] int32
    weights: Array  # [B] float32, 1 or 0
    eligible: Array  # [B, K] bool, the classes the answer may come from
    task: Array  # [] int32, the training stage


Loss = Callable[[Key, PyTree, PyTree, Batch], tuple[Array, Metrics]]  # (key, params, state, batch) -> scalar, metrics


def _no_state(key: Key, params: PyTree, batch: Batch) -> PyTree:
    return ()


def _same_at_begin(key: Key, params: PyTree, state: PyTree, task: Array) -> tuple[PyTree, PyTree]:
    return params, state


def _same_updates(
    key: Key, params: PyTree, state: PyTree, batch: Batch, grads: PyTree, updates: PyTree
) -> tuple[PyTree, PyTree]:
    return updates, state


def _same_with_batch(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
    return params, state


def _same_state(key: Key, params: PyTree, state: PyTree, batch: Batch) -> PyTree:
    return state


def _same_at_end(key: Key, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    return params, state


class Strategy(NamedTuple):
    """A continual-learning method: pure functions, called by the loop inside its compiled programs.

    Batch -> `gradients` -> optimizer -> `after_update` -> parameters. Only `gradients` and `predict` must be given;
    the others do nothing unless they are.
    """

    gradients: Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, Metrics]]
    # (key, params, state, batch) -> (grads, metrics); metrics are scalars, averaged over examples for the record
    predict: Callable[[PyTree, PyTree, Array, Array | None], Array]
    # (params, state, inputs [B, ...], task) -> logits [B, K]; task is None where the method is not told it
    init: Callable[[Key, PyTree, Batch], PyTree] = _no_state
    # (key, params, batch) -> state; the batch is there for its shapes and dtypes, not to learn from
    begin_task: Callable[[Key, PyTree, PyTree, Array], tuple[PyTree, PyTree]] = _same_at_begin
    # (key, params, state, task) -> (params, state)
    after_update: Callable[[Key, PyTree, PyTree, Batch, PyTree, PyTree], tuple[PyTree, PyTree]] = _same_updates
    # (key, params, state, batch, grads, updates) -> (updates, state); params are those before the update
    refresh: Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, PyTree]] = _same_with_batch
    # (key, params, state, batch) -> (params, state), after every `refresh_every` steps of a task, with the last batch
    observe: Callable[[Key, PyTree, PyTree, Batch], PyTree] = _same_state
    # (key, params, state, batch) -> state, for each batch of one more pass over a task that has been trained
    end_task: Callable[[Key, PyTree, PyTree], tuple[PyTree, PyTree]] = _same_at_end
    # (key, params, state) -> (params, state), after that pass
    refresh_every: int = 0  # steps; 0 is never
    fresh_optimizer: bool = False  # whether the optimizer's state begins anew with each task
    tasks: int | None = None  # how many the state has room for; None is any number


def does_nothing(strategy: Strategy, member: str) -> bool:
    """Whether a member of the strategy is the default that does nothing, so that it need not be called."""
    return getattr(strategy, member) is Strategy._field_defaults[member]


def gradients_of(loss: Loss) -> Callable[[Key, PyTree, PyTree, Batch], tuple[PyTree, Metrics]]:
    """`Strategy.gradients` of a loss: (key, params, state, batch) -> (scalar, metrics), in params."""

    def gradients(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        grads, metrics = jax.grad(lambda params: loss(key, params, state, batch), has_aux=True)(params)
        return grads, metrics

    return gradients


def in_microbatches(strategy: Strategy, count: int) -> Strategy:
    """The strategy with its gradients taken of `count` parts of each batch, one after another, and averaged.

    A step then keeps the activations of one part alone, and on CPU large networks may be faster. Gradients and metrics
    are those of the whole batch, up to rounding, where the loss is a mean over its examples and what does not depend on
    them; random numbers are drawn anew for each part. A loss that is a mean over tokens, as that of
    `nets.text_to_text`, becomes one over each part's, parts counting by their examples.

    Args:
        strategy: any.
        count: a divisor of the batch size. Example i goes into part i modulo `count`, so that of a batch split over
            devices each has its share in all parts.

    Raises:
        ValueError: a count below 1; in training, one that does not divide the batch size.
    """
    check_count("count", count, 1)

    def gradients(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        size = len(batch.weights)
        if size % count:
            raise bad_argument("count", count, f"pass a divisor of the batch size, {size}")
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1),
            batch._replace(task=jnp.broadcast_to(batch.task, size)),
        )
        shares = batch.weights.reshape(-1, count).sum(axis=0) / jnp.maximum(batch.weights.sum(), 1)

        def add_part(total: PyTree, item: tuple[Key, Array, Batch]) -> tuple[PyTree, None]:
            key, share, part = item
            found = strategy.gradients(key, params, state, part._replace(task=batch.task))
            return jax.tree.map(lambda total, value: total + share.astype(total.dtype) * value, total, found), None

        shapes = jax.eval_shape(strategy.gradients, key, params, state, batch)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add_part, nothing, (jax.random.split(key, count), shares, parts))
        return total

    return strategy if count == 1 else strategy._replace(gradients=gradients)


def predict_by(apply: Apply) -> Callable[[PyTree, PyTree, Array, Array | None], Array]:
    """`Strategy.predict` of a network that needs neither the strategy's state nor the task."""

    def predict(params: PyTree, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return apply(params, inputs)

    return predict


def cross_entropy(logits: Array, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Array, Metrics]:
    """Mean cross entropy in nats over the batch, and the metrics "loss" and "accuracy" (a fraction).

    Classes that are not eligible take no part; label smoothing spreads over those that are, the right one included.

    Args:
        logits: [B, K].
        batch: its labels, weights and eligible classes count.
        label_smoothing: share of the target that is spread evenly.
    """
    logits = eligible_logits(logits, batch)
    smooth = label_smoothing / jnp.maximum(batch.eligible.sum(axis=-1, keepdims=True), 1)
    target = jax.nn.one_hot(batch.labels, logits.shape[-1]) * (1 - label_smoothing) + smooth
    terms = jnp.where(batch.eligible, target * jax.nn.log_softmax(logits), 0)
    total = jnp.maximum(batch.weights.sum(), 1)
    loss = -jnp.sum(terms.sum(axis=-1) * batch.weights) / total
    right = jnp.argmax(logits, axis=-1) == batch.labels
    return loss, {"loss": loss, "accuracy": jnp.sum(right * batch.weights) / total}


def eligible_logits(logits: Array, batch: Batch) -> Array:
    """The logits [B, K] in float32, with the lowest finite number at classes that are not eligible."""
    check_outputs(logits, batch.eligible.shape[-1])
    return jnp.where(batch.eligible, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)


def check_outputs(logits: Array, classes: int) -> None:
    """Raises ValueError unless the logits are [B, K], K being the number of classes of the stream."""
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise bad_argument("logits", f"shape {logits.shape}", f"the network must have {classes} outputs, one a class")
