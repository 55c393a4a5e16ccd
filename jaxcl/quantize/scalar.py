"""Quantizers without a codebook to search: each entry of a vector is rounded by itself."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.quantize.contract import Quantized, Quantizer, no_update
from jaxcl.typing import Array, Key, bad_argument, check_at_least, check_width


def fsq(levels: Sequence[int], *, epsilon: float = 1e-3) -> Quantizer:
    """Finite scalar quantization (Mentzer et al. 2023): entry i is bounded by tanh and rounded to one of L_i levels.

    There are no params, no state and no losses: both come back as zeros. D is the number of levels and K their product;
    project to that width and back by layers of your own. Codes are divided by `L // 2`, so they lie in [-1, 1], for
    even L without the upper end. An index counts the first entry fastest. Gradients pass the rounding straight through.
    All as vector-quantize-pytorch has it with its symmetric form off.

    Args:
        levels: L_i, one an entry; each 2 or more.
        epsilon: by how much the bound is wider than the outermost level, relatively, so that it can be reached.

    Raises:
        ValueError: no levels, one below 2, or 2**31 codes or more; in use, vectors whose width is not D.
    """
    if not levels:
        raise bad_argument("levels", levels, "pass one number an entry")
    for number in levels:
        check_at_least("levels", number, 2)
    if math.prod(levels) >= 2**31:
        raise bad_argument("levels", f"{math.prod(levels)} codes", "indices are int32: pass fewer or smaller ones")
    check_at_least("epsilon", epsilon, 0)
    counts = np.asarray(levels, np.int32)
    basis = np.cumprod([1, *levels[:-1]], dtype=np.int32)
    middle = counts // 2
    half_range = (counts - 1) * (1 + epsilon) / 2
    offset = np.where(counts % 2, 0.0, 0.5)
    shift = np.arctanh(offset / half_range)

    def init(key: Key) -> tuple[tuple[()], tuple[()]]:
        return (), ()

    def quantize(params: tuple[()], state: tuple[()], x: Array) -> Quantized:
        check_width("x", x, len(levels), "one entry a number of levels")
        bounded = jnp.tanh(x.astype(jnp.float32) + jnp.float32(shift)) * jnp.float32(half_range) - jnp.float32(offset)
        rounded = bounded + lax.stop_gradient(jnp.round(bounded) - bounded)
        indices = jnp.sum((lax.stop_gradient(jnp.round(bounded)).astype(jnp.int32) + middle) * basis, axis=-1)
        none = jnp.zeros(x.shape[:-1])
        return Quantized((rounded / middle).astype(x.dtype), indices, none, none)

    def lookup(params: tuple[()], state: tuple[()], indices: Array) -> Array:
        digits = indices[..., None] // basis % counts
        return ((digits - middle) / middle).astype(jnp.float32)

    return Quantizer(init, quantize, lookup, no_update)
