"""What is kept of a task's noise when its masks are fixed: a float for each weight, or next to nothing.

A rule works on one leaf. What it keeps for all tasks is a bank with a leading task axis (`trees.bank`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.masks.noise import Noise
from jaxcl.typing import Array, PyTree

_ROUNDS = 8  # of moving levels to the mean of what they stand for


class ScaleRule(NamedTuple):
    """How the scales of a leaf's weights are kept."""

    begin: Callable[[tuple[int, ...]], PyTree]  # (shape) -> room for what is kept of one task
    settle: Callable[[Array, Noise, Array, Array], tuple[Array, Noise, PyTree]]
    # (weight, noise, claimed, reused) -> (weight, noise, what is kept), all [...]: which weights the task is the first
    # to keep, and which it keeps that others kept before
    read: Callable[[PyTree, Array], Array]  # (what is kept, whether others kept a weight before [...]) -> scale [...]
    scale: Callable[[Noise], Array]  # (noise) -> by what a weight would be multiplied if it were kept now, [...]


class FewScales(NamedTuple):
    """The scales of the weights of one leaf that one task re-uses."""

    levels: Array  # [2^bits] float32, in order
    codes: Array  # [ceil(bits n / 8)] uint8: plane by plane the bits of which level a weight has, 0 if not re-used


def folded_scales(bits: int) -> ScaleRule:
    """A newly kept weight is multiplied by its mean, so that it needs no scale; a re-used one has one of 2^bits.

    What the noise is relative to the weight stays as it was, so the task computes the same.
    """

    def begin(shape: tuple[int, ...]) -> FewScales:
        return FewScales(jnp.ones(2**bits), jnp.zeros(-(-bits * math.prod(shape) // 8), jnp.uint8))

    def settle(weight: Array, noise: Noise, claimed: Array, reused: Array) -> tuple[Array, Noise, FewScales]:
        factor = jnp.where(claimed, noise.mean, 1)
        levels, codes = _quantise(noise.mean.reshape(-1), reused.reshape(-1), 2**bits)
        planes = jnp.packbits((codes >> jnp.arange(bits, dtype=jnp.uint8)[:, None]) & 1)
        relative = Noise(noise.mean / factor, noise.log_variance - 2 * jnp.log(jnp.abs(factor)))
        return (weight * factor).astype(weight.dtype), relative, FewScales(levels, planes)

    def read(kept: FewScales, before: Array) -> Array:
        planes = jnp.unpackbits(kept.codes, count=bits * before.size).reshape(bits, before.size)
        codes = jnp.sum(planes << jnp.arange(bits, dtype=jnp.uint8)[:, None], axis=0, dtype=jnp.uint8)
        return jnp.where(before, kept.levels[codes].reshape(before.shape), 1)

    return ScaleRule(begin, settle, read, lambda noise: noise.mean)


def stored_scales() -> ScaleRule:
    """A float for each weight, as the authors have it: the mean plus the standard deviation."""

    def settle(weight: Array, noise: Noise, claimed: Array, reused: Array) -> tuple[Array, Noise, Array]:
        return weight, noise, scale(noise)

    def scale(noise: Noise) -> Array:
        return noise.mean + jnp.exp(noise.log_variance / 2)

    return ScaleRule(jnp.zeros, settle, lambda kept, before: kept, scale)


def _quantise(scale: Array, reused: Array, count: int) -> tuple[Array, Array]:
    """Levels [count] in order, and of each scale [n] the number of its level uint8, 0 where it is not re-used.

    Lloyd's algorithm from even steps between the least and the greatest: little squared error.
    """
    some = reused.any()
    low = jnp.where(some, jnp.min(jnp.where(reused, scale, jnp.inf)), 1)
    high = jnp.where(some, jnp.max(jnp.where(reused, scale, -jnp.inf)), 1)

    def nearest(levels: Array) -> Array:
        return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, scale)

    def move(_: Array | int, levels: Array) -> Array:
        codes = jnp.where(reused, nearest(levels), count)  # out of range: dropped
        loads = jnp.zeros(count, jnp.int32).at[codes].add(1, mode="drop")
        # Offsets are added up, not scales: of millions near 1 a sum in float32 loses their digits.
        offset = scale - levels.at[codes].get(mode="clip")
        return jnp.sort(levels + jnp.zeros(count).at[codes].add(offset, mode="drop") / jnp.maximum(loads, 1))

    levels = jax.lax.fori_loop(0, _ROUNDS, move, low + (high - low) * (jnp.arange(count) + 0.5) / count)
    return levels, jnp.where(reused, nearest(levels), 0).astype(jnp.uint8)
