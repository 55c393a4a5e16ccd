"""Quantizers made of several of one kind: in a row, each on what the ones before left, or side by side.

Params and states are those of the single one stacked on a new leading axis. Indices get a new last axis; losses are
summed. What is composed may be composed itself. The single ones run one after another in one compiled loop.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.quantize.contract import Quantized, Quantizer
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least


def residual(quantizer: Quantizer, depth: int) -> Quantizer:
    """Residual quantization (Zeghidour et al. 2021, SoundStream): each quantizer's input is what is left of x.

    The code is the sum of all `depth` codes, indices are [..., depth], and every commitment loss moves x. The gradient
    of the sum passes the first choice only, by the quantizer's own rule: with "straight_through" x gets it once. Adding
    the gradients of all choices up, as vector-quantize-pytorch 1.32 does, would give it `depth` times.

    Args:
        quantizer: the single one, of vectors [..., D].
        depth: how many.

    Raises:
        ValueError: a depth below 1; in use, what the single one raises, and indices whose last axis is not `depth`.
    """
    check_at_least("depth", depth, 1)

    def quantize(params: PyTree, state: PyTree, x: Array) -> Quantized:
        def step(left: Array, own: tuple[PyTree, PyTree]) -> tuple[Array, Quantized]:
            out = quantizer.quantize(*own, left)
            return left - lax.stop_gradient(out.codes), out

        each = lax.scan(step, x, (params, state), length=depth)[1]
        codes = each.codes[0] + lax.stop_gradient(each.codes[1:].sum(axis=0))
        return _joined(each, codes)

    def lookup(params: PyTree, state: PyTree, indices: Array) -> Array:
        return lax.map(lambda own: quantizer.lookup(*own), (params, state, _split(indices, depth))).sum(axis=0)

    def update(
        key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree:
        def step(left: Array, own: tuple[Key, PyTree, PyTree, Array]) -> tuple[Array, PyTree]:
            key, params, state, indices = own
            after = quantizer.update(key, params, state, left, indices, axis_name=axis_name)
            return left - quantizer.lookup(params, state, indices).astype(left.dtype), after

        keys = jax.random.split(key, depth)
        return lax.scan(step, lax.stop_gradient(x), (keys, params, state, _split(indices, depth)))[1]

    return Quantizer(lambda key: jax.vmap(quantizer.init)(jax.random.split(key, depth)), quantize, lookup, update)


def grouped(quantizer: Quantizer, groups: int) -> Quantizer:
    """Product quantization (Jégou et al. 2011): x [..., G D] is cut into G parts, each with a quantizer of its own.

    Codes are [..., G D], indices [..., G].

    Args:
        quantizer: the single one, of vectors [..., D].
        groups: G.

    Raises:
        ValueError: fewer than 1 group; in use, what the single one raises, vectors that do not divide into G parts, and
            indices whose last axis is not G.
    """
    check_at_least("groups", groups, 1)

    def cut(x: Array) -> Array:
        """[G, ..., D] from [..., G D]."""
        if x.shape[-1] % groups:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"pass a last axis that {groups} groups divide evenly")
        return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 0)

    def side_by_side(parts: Array) -> Array:
        """[..., G D] from [G, ..., D]."""
        return jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], groups * parts.shape[-1])

    def quantize(params: PyTree, state: PyTree, x: Array) -> Quantized:
        each = lax.map(lambda own: quantizer.quantize(*own), (params, state, cut(x)))
        return _joined(each, side_by_side(each.codes))

    def lookup(params: PyTree, state: PyTree, indices: Array) -> Array:
        return side_by_side(lax.map(lambda own: quantizer.lookup(*own), (params, state, _split(indices, groups))))

    def update(
        key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree:
        def one(own: tuple[Key, PyTree, PyTree, Array, Array]) -> PyTree:
            return quantizer.update(*own, axis_name=axis_name)

        return lax.map(one, (jax.random.split(key, groups), params, state, cut(x), _split(indices, groups)))

    return Quantizer(lambda key: jax.vmap(quantizer.init)(jax.random.split(key, groups)), quantize, lookup, update)


def _split(indices: Array, count: int) -> Array:
    """[count, ...] from [..., count]."""
    if indices.shape[-1] != count:
        raise bad_argument(
            "indices", f"shape {tuple(indices.shape)}", f"pass a last axis of {count}, as `quantize` gives"
        )
    return jnp.moveaxis(indices, -1, 0)


def _joined(each: Quantized, codes: Array) -> Quantized:
    """One result of those of several, leaves [count, ...]."""
    return Quantized(
        codes,
        jnp.moveaxis(each.indices, 0, -1),
        each.commitment_loss.sum(axis=0),
        each.codebook_loss.sum(axis=0),
    )
