"""The optimizer of values: gradient descent on the rows that a batch fetched."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcl.trees import Rows, is_rows
from jaxcl.typing import Array, PyTree, check_at_least


def sparse_sgd(learning_rate: float, *, max_norm: float | None = None) -> optax.GradientTransformation:
    """Gradient descent for gradients that may hold `trees.Rows`: the dense rule, at the cost of the rows alone.

    Equal to ``optax.chain(clip, optax.sgd(learning_rate))`` on the dense gradient, where ``clip`` scales by
    ``min(1, max_norm / (norm + 1e-6))``, PyTorch's rule and the authors', and the norm is over all leaves. Apply its
    updates with `trees.apply_updates`. For momentum see `continual.key_value_bottleneck`.

    The norm of a sum of rows needs rows that coincide to be added up first, which costs more than all the rest of a
    step. But no norm exceeds the sum of the examples' own, in which no rows coincide: only where that bound passes
    `max_norm` is the norm itself worked out. So `Rows` that are clipped must be as `Bottleneck.read` fetches them,
    [..., C, top_k, V]: in the last axes but V, no row twice.

    Args:
        learning_rate: constant.
        max_norm: global norm above which gradients are scaled down; None never does.

    Raises:
        ValueError: a negative learning rate or norm.
    """
    for name, value in (("learning_rate", learning_rate), ("max_norm", max_norm)):
        if isinstance(value, int | float):  # traced values cannot be looked at
            check_at_least(name, value, 0)

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        factor = jnp.float32(-learning_rate)
        if max_norm is not None:
            leaves = jax.tree.leaves(updates, is_leaf=is_rows)
            bound = sum((_norm_bound(leaf) for leaf in leaves), jnp.float32(0))
            factor *= _clip_factor(bound, leaves, jnp.float32(max_norm))

        def scale(update: Array | Rows) -> Array | Rows:
            return update._replace(values=update.values * factor) if isinstance(update, Rows) else update * factor

        return jax.tree.map(scale, updates, is_leaf=is_rows), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@jax.custom_batching.custom_vmap
def _clip_factor(bound: Array, gradients: list[Array | Rows], max_norm: Array) -> Array:
    """min(1, max_norm / norm), where `bound`, an upper bound of the norm, may save working it out."""
    return lax.cond(bound + 1e-6 <= max_norm, lambda *_: jnp.float32(1), _exact_clip_factor, gradients, max_norm)


@_clip_factor.def_vmap
def _clip_factors(
    size: int, batched: PyTree, bounds: Array, gradients: list[Array | Rows], max_norms: Array
) -> tuple[Array, bool]:
    """Under `vmap` a condition would take both branches; here the norms are worked out only if one is needed."""
    bounds, gradients, max_norms = jax.tree.map(
        lambda leaf, is_batched: leaf if is_batched else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))),
        (bounds, gradients, max_norms),
        tuple(batched),
    )
    enough = jnp.all(bounds + 1e-6 <= max_norms)
    factors = lax.cond(
        enough, lambda *_: jnp.ones(size, jnp.float32), jax.vmap(_exact_clip_factor), gradients, max_norms
    )
    return factors, True


def _exact_clip_factor(gradients: list[Array | Rows], max_norm: Array) -> Array:
    factor = jnp.minimum(1.0, max_norm / (jnp.sqrt(sum(map(_squared_norm, gradients))) + 1e-6))
    return factor.astype(jnp.float32)  # which values of float64 do not change


def _norm_bound(gradient: Array | Rows) -> Array:
    """An upper bound of the norm, exact for a dense gradient: the sum of the norms of parts without equal rows.

    Such are the pairs [C, top_k] that one position of one example fetches, each with its row [V].
    """
    if not isinstance(gradient, Rows):
        return jnp.sqrt(_squared_norm(gradient))
    rank = gradient.values.ndim
    return jnp.sqrt(jnp.sum(jnp.square(gradient.values), axis=range(max(1, rank - 3), rank))).sum()


def _squared_norm(gradient: Array | Rows) -> Array:
    if not isinstance(gradient, Rows):
        return jnp.sum(jnp.square(gradient))
    numbers = gradient.numbers.reshape(-1)
    order = jnp.argsort(numbers)
    numbers = numbers[order]
    group = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (numbers[1:] != numbers[:-1]).astype(jnp.int32)]))
    rows = gradient.values.reshape(numbers.size, -1)
    return jnp.sum(jnp.square(jnp.zeros_like(rows).at[group].add(rows[order], indices_are_sorted=True)))
