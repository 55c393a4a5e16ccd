"""Strategies that keep some examples of the past, in a memory of fixed size filled by reservoir sampling.

Inputs are remembered as they came by: augmented in training steps (`er`, `der_plus_plus`), if the stream augments, and
not in the pass over a task at its end (`a_gem`).
"""

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
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_count


class Memory(NamedTuple):
    """A uniform sample of the examples that have come by (M slots)."""

    inputs: Array  # [M, ...]
    labels: Array  # [M] int32
    eligible: Array  # [M, K] bool
    logits: Array  # [M, K] float32, the answers at the time, where the method keeps them; else [M, 0]
    seen: Array  # [] int32, examples that have come by


def empty_memory(batch: Batch, size: int, *, logits: bool) -> Memory:
    """A memory of `size` slots for examples like those of `batch`, with or without their logits."""

    def slots(leaf: Array) -> Array:
        return jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)

    classes = batch.eligible.shape[-1]
    kept = jnp.zeros((size, classes if logits else 0), jnp.float32)
    return Memory(slots(batch.inputs), slots(batch.labels), slots(batch.eligible), kept, jnp.int32(0))


def remember(key: Key, memory: Memory, batch: Batch, logits: Array | None = None) -> Memory:
    """The memory after a batch has come by: reservoir sampling (Vitter 1985, algorithm R), one example after another.

    The n-th example (from 0) takes slot n while there is room, then a uniform one of n + 1 places, if that is a slot.

    Args:
        key: consumed.
        memory: M slots.
        batch: B examples; those of weight 0 do not come by.
        logits: [B, K], where the memory keeps them.
    """
    size, count = len(memory.labels), len(batch.labels)
    real = batch.weights > 0
    number = memory.seen + jnp.cumsum(real, dtype=jnp.int32) - 1
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(number, 0) + 1)
    slot = jnp.where(number < size, number, drawn)
    slot = jnp.where(real & (slot < size), slot, size)  # past the end: dropped
    # Of examples that fall on one slot the last stays.
    order = jnp.arange(count)
    last = jnp.full(size, -1).at[slot].max(order, mode="drop")
    slot = jnp.where(last.at[slot].get(mode="fill", fill_value=-1) == order, slot, size)

    def put(slots: Array, leaf: Array) -> Array:
        return slots.at[slot].set(leaf.astype(slots.dtype), mode="drop")

    return Memory(
        put(memory.inputs, batch.inputs),
        put(memory.labels, batch.labels),
        put(memory.eligible, batch.eligible),
        memory.logits if logits is None else put(memory.logits, logits),
        memory.seen + real.sum(dtype=jnp.int32),
    )


def recall(key: Key, memory: Memory, count: int, task: Array) -> tuple[Batch, Array]:
    """A batch of `count` examples from the memory, uniform with replacement, and their logits [count, K].

    Weights are 0 where the memory is empty. The authors of the methods here draw without replacement.
    """
    filled = jnp.minimum(memory.seen, len(memory.labels))
    rows = jax.random.randint(key, (count,), 0, jnp.maximum(filled, 1))
    weights = jnp.full(count, filled > 0, jnp.float32)
    batch = Batch(memory.inputs[rows], memory.labels[rows], weights, memory.eligible[rows], task)
    return batch, memory.logits[rows]


def er(apply: Apply, *, memory_size: int, memory_batch_size: int) -> Strategy:
    """Experience replay (Riemer et al. 2019; Chaudhry et al. 2019): each batch is joined by one from the memory.

    The loss is the mean cross entropy over both. The memory is a reservoir over the whole stream, this task's examples
    included.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        memory_size: examples kept.
        memory_batch_size: examples replayed in each step.
    """
    _check_sizes(memory_size, memory_batch_size)

    def init(key: Key, params: PyTree, batch: Batch) -> Memory:
        return empty_memory(batch, memory_size, logits=False)

    def loss(key: Key, params: PyTree, state: Memory, batch: Batch) -> tuple[Array, Metrics]:
        replayed, _ = recall(key, state, memory_batch_size, batch.task)
        per_example = ("inputs", "labels", "weights", "eligible")
        both = batch._replace(
            **{name: jnp.concatenate([getattr(batch, name), getattr(replayed, name)]) for name in per_example}
        )
        logits = apply(params, both.inputs)
        value, _ = cross_entropy(logits, both)
        return value, cross_entropy(logits[: len(batch.labels)], batch)[1]

    def after_update(
        key: Key, params: PyTree, state: Memory, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, Memory]:
        return updates, remember(key, state, batch)

    return Strategy(gradients_of(loss), predict_by(apply), init, after_update=after_update)


def der_plus_plus(
    apply: Apply, *, memory_size: int, memory_batch_size: int, logits_strength: float, labels_strength: float
) -> Strategy:
    """Dark experience replay with labels (Buzzega et al. 2020, DER++, eq. 6).

    The loss is cross entropy on the batch, plus `logits_strength` times the mean squared difference between the logits
    of remembered examples and those they had when they came by, plus `labels_strength` times cross entropy on a second
    draw from the memory. The mean is over examples and classes, as in the authors' code; the paper sums over classes.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        memory_size: examples kept.
        memory_batch_size: examples in each of the two draws.
        logits_strength: alpha.
        labels_strength: beta.
    """
    _check_sizes(memory_size, memory_batch_size)
    check_at_least("logits_strength", logits_strength, 0)
    check_at_least("labels_strength", labels_strength, 0)

    def init(key: Key, params: PyTree, batch: Batch) -> Memory:
        return empty_memory(batch, memory_size, logits=True)

    def loss(key: Key, params: PyTree, state: Memory, batch: Batch) -> tuple[Array, Metrics]:
        first, second = jax.random.split(key)
        value, metrics = cross_entropy(apply(params, batch.inputs), batch)
        old, old_logits = recall(first, state, memory_batch_size, batch.task)
        moved = jnp.mean(jnp.square(apply(params, old.inputs) - old_logits) * old.weights[:, None])
        other, _ = recall(second, state, memory_batch_size, batch.task)
        again, _ = cross_entropy(apply(params, other.inputs), other)
        return value + logits_strength * moved + labels_strength * again, metrics

    def after_update(
        key: Key, params: PyTree, state: Memory, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, Memory]:
        # The same logits as in the loss: the compiler computes them once.
        return updates, remember(key, state, batch, apply(params, batch.inputs))

    return Strategy(gradients_of(loss), predict_by(apply), init, after_update=after_update)


def a_gem(apply: Apply, *, memory_size: int, memory_batch_size: int) -> Strategy:
    """Averaged gradient episodic memory (Chaudhry et al. 2019, eq. 11): no step against the memory's gradient.

    Where the batch's gradient g and the gradient r of a batch from the memory disagree, g loses its part along r:
    `g - (g.r / r.r) r`. The memory is a reservoir over the earlier tasks, filled after each; the authors keep as many
    examples of each class.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        memory_size: examples kept.
        memory_batch_size: examples in the reference gradient of each step.
    """
    _check_sizes(memory_size, memory_batch_size)

    def init(key: Key, params: PyTree, batch: Batch) -> Memory:
        return empty_memory(batch, memory_size, logits=False)

    def loss(params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        return cross_entropy(apply(params, batch.inputs), batch)

    def gradients(key: Key, params: PyTree, state: Memory, batch: Batch) -> tuple[PyTree, Metrics]:
        grads, metrics = jax.grad(loss, has_aux=True)(params, batch)
        replayed, _ = recall(key, state, memory_batch_size, batch.task)
        reference, _ = jax.grad(loss, has_aux=True)(params, replayed)
        product, length = _dot(grads, reference), _dot(reference, reference)
        against = (product < 0) & (length > 0)
        share = jnp.where(against, product / jnp.where(against, length, 1), 0)
        projected = jax.tree.map(lambda grad, other: (grad - share * other).astype(grad.dtype), grads, reference)
        return projected, metrics | {"projected": against.astype(jnp.float32)}

    def observe(key: Key, params: PyTree, state: Memory, batch: Batch) -> Memory:
        return remember(key, state, batch)

    return Strategy(gradients, predict_by(apply), init, observe=observe)


def _check_sizes(memory_size: int, memory_batch_size: int) -> None:
    check_count("memory_size", memory_size, 1)
    check_count("memory_batch_size", memory_batch_size, 1)


def _dot(first: PyTree, second: PyTree) -> Array:
    # Not a dot product, which TPUs round to bfloat16: the sign of this sum decides.
    products = jax.tree.map(lambda one, other: jnp.sum(one.astype(jnp.float32) * other), first, second)
    return sum(jax.tree.leaves(products), jnp.float32(0))
