"""Subspaces that a new task keeps off: their bases, how much of a matrix lies in one, angles between two."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxcl.adapters.contract import product
from jaxcl.typing import Array, check_rank

_NEGLIGIBLE = 1e-6  # of the largest eigenvalue: below it a direction is rounding
_NOTHING = 1e-24  # a squared length: a quotient by less has no gradient that float32 holds


class Protected(NamedTuple):
    """A subspace of N dimensions, and the sum that it is the principal part of."""

    gram: Array  # [N, N], sum of v v^T over the vectors protected so far
    basis: Array  # [N, M], orthonormal columns; those beyond the sum's rank are 0


def nothing_protected(width: int, most: int) -> Protected:
    """No direction of `width` yet, with room for `most`."""
    return Protected(jnp.zeros((width, width)), jnp.zeros((width, min(most, width))))


def protect(protected: Protected, gram: Array) -> Protected:
    """The subspace [N, M] with the vectors of a sum [N, N] of v v^T in it too: the principal M directions of all."""
    total = protected.gram + gram
    values, vectors = jnp.linalg.eigh(total)
    count = protected.basis.shape[1]
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    return Protected(total, jnp.where(values > _NEGLIGIBLE * jnp.maximum(values[0], 1e-30), vectors, 0))


def kept_off(basis: Array, columns: Array) -> Array:
    """Columns [N, R] without what of them lies in the span of an orthonormal basis [N, M].

    Taken off twice: what rounding leaves of the first time, where a column lies all but inside, goes with the second.
    """
    once = columns - product(basis, product(basis.T, columns))
    return once - product(basis, product(basis.T, once))


def overlap(basis: Array, columns: Array) -> Array:
    """The share of the squared length of columns [N, R] in the span of an orthonormal basis [N, M], [], from 0 to 1.

    Whatever the width and the scale of the columns; 0, and without a gradient, where they are all but 0.
    """
    whole = jnp.square(columns).sum()
    some = whole > _NOTHING
    inside = jnp.square(product(basis.T, jnp.where(some, columns, 0))).sum()
    return inside / jnp.where(some, whole, 1)


def cosines(first: Array, second: Array) -> Array:
    """Cosines of the principal angles between the spans of columns [N, P] and [N, Q], [min(P, Q)], largest first.

    Columns count alike, however long, but those of 0 as absent. The largest is 0 where the spans are orthogonal.
    """
    check_rank("first", first, 2)
    check_rank("second", second, 2)
    return jnp.clip(jnp.linalg.svd(product(_orthonormal(first).T, _orthonormal(second)), compute_uv=False), 0, 1)


def _orthonormal(columns: Array) -> Array:
    """An orthonormal basis [N, P] of the span of columns [N, P]; the columns beyond its rank are 0."""
    lengths = jnp.linalg.norm(columns, axis=0)
    left, values, _ = jnp.linalg.svd(columns / jnp.where(lengths > 0, lengths, 1), full_matrices=False)
    rounding = max(columns.shape) * jnp.finfo(columns.dtype).eps  # of the largest
    return jnp.where(values > rounding * jnp.maximum(values[0], 1e-30), left, 0)
