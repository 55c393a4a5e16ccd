"""Quantizers without a codebook to search: each entry of a vector is rounded by itself."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.nearest import squared_distances
from jaxcl.quantize.contract import Quantized, Quantizer, no_place, no_update, usable, where_valid
from jaxcl.typing import Array, Key, bad_argument, check_at_least, check_between, check_count, check_width

_BLOCK = 4096  # codes whose probabilities are held at a time


def fsq(levels: Sequence[int], *, epsilon: float = 1e-3) -> Quantizer:
    """Finite scalar quantization (Mentzer et al. 2023): entry i is bounded by tanh and rounded to one of L_i levels.

    There are no params, no state and no losses: both come back as zeros. D is the number of levels and K their product;
    project to that width and back by layers of your own. Codes are divided by `L // 2`, so they lie in [-1, 1], for
    even L without the upper end. An index counts the first entry fastest. Gradients pass the rounding straight through.
    All as vector-quantize-pytorch has it with its symmetric form off.

    Args:
        levels: L_i, one an entry; each 2 or more.
        epsilon: by how much the bound is wider than the outermost level, relatively, so that it can be reached; above
            0 where an entry has 2 levels, whose bound would else be all that it can be.

    Raises:
        ValueError: no levels, one below 2, 2**31 codes or more, or an epsilon out of range; in use, vectors whose width
            is not D or a mask that does not fit them.
    """
    if not levels:
        raise bad_argument("levels", levels, "pass one number an entry")
    for number in levels:
        check_count("levels", number, 2)
    if math.prod(levels) >= 2**31:
        raise bad_argument("levels", f"{math.prod(levels)} codes", "indices are int32: pass fewer or smaller ones")
    check_at_least("epsilon", epsilon, 1e-6 if min(levels) == 2 else 0)
    counts = np.asarray(levels, np.int32)
    basis = np.cumprod([1, *levels[:-1]], dtype=np.int32)
    middle = counts // 2
    half_range = (counts - 1) * (1 + epsilon) / 2
    offset = np.where(counts % 2, 0.0, 0.5)
    shift = np.arctanh(offset / half_range)

    def init(key: Key) -> tuple[tuple[()], tuple[()]]:
        return (), ()

    def quantize(params: tuple[()], state: tuple[()], x: Array, mask: Array | None = None) -> Quantized:
        check_width("x", x, len(levels), "the levels")
        x, valid = usable(x, mask)
        bounded = jnp.tanh(x.astype(jnp.float32) + jnp.float32(shift)) * jnp.float32(half_range) - jnp.float32(offset)
        # Many levels or a wide bound would be rounded to one more level at either end.
        nearest = lax.stop_gradient(jnp.clip(jnp.round(bounded), -middle, counts - 1 - middle))
        rounded = bounded + (nearest - lax.stop_gradient(bounded))
        indices = jnp.sum((nearest.astype(jnp.int32) + middle) * basis, axis=-1, dtype=jnp.int32)
        none = jnp.zeros(x.shape[:-1], jnp.float32)
        return where_valid(valid, Quantized((rounded / middle).astype(x.dtype), indices, none, none))

    def lookup(params: tuple[()], state: tuple[()], indices: Array) -> Array:
        digits = indices[..., None] // basis % counts
        return jnp.where((indices >= 0)[..., None], (digits - middle) / middle, 0).astype(jnp.float32)

    return Quantizer(init, quantize, lookup, no_update, no_place)


def lfq(width: int, *, scale: float = 1.0) -> Quantizer:
    """Lookup-free quantization (Yu et al. 2023): an entry above zero becomes `scale`, all others `-scale`.

    There are no params and no state; K is 2^D. The codebook loss is zero. An index has the first entry's bit highest.
    Gradients pass straight through. Add `lfq_entropies` to the loss, or few codes are used. As
    vector-quantize-pytorch has it.

    Args:
        width: D, from 1 to 30.
        scale: distance of codes from zero in each entry.

    Raises:
        ValueError: a width out of range or a scale that is not positive; in use, vectors whose width is not D or a mask
            that does not fit them.
    """
    check_between("width", width, 1, 30)
    check_at_least("scale", scale, 1e-12)

    def init(key: Key) -> tuple[tuple[()], tuple[()]]:
        return (), ()

    def quantize(params: tuple[()], state: tuple[()], x: Array, mask: Array | None = None) -> Quantized:
        check_width("x", x, width, "the quantizer")
        x, valid = usable(x, mask)
        above = lax.stop_gradient(x) > 0
        indices = jnp.sum(above * _place_values(width), axis=-1, dtype=jnp.int32)
        codes = jnp.where(above, scale, -scale).astype(x.dtype)
        output = codes + (x - lax.stop_gradient(x))
        out = Quantized(output, indices, squared_distances(x, codes), jnp.zeros(x.shape[:-1], jnp.float32))
        return where_valid(valid, out)

    def lookup(params: tuple[()], state: tuple[()], indices: Array) -> Array:
        return jnp.where((indices >= 0)[..., None], _signs(indices, width) * jnp.float32(scale), 0)

    return Quantizer(init, quantize, lookup, no_update, no_place)


def lfq_entropies(
    x: Array, mask: Array | None = None, *, scale: float = 1.0, inverse_temperature: float = 100.0, floor: float = 1e-20
) -> tuple[Array, Array]:
    """The entropies that lookup-free quantization trains by (Yu et al. 2023, section 3.2), in nats.

    Each vector chooses code c with probability softmax of 2 t <x, c>. The loss is usually a tenth of the mean of the
    first result less the second: each choice certain, all codes in use. Probabilities are worked out for some codes at
    a time, and again for the gradient, so that no [N, K] array exists.

    Args:
        x: vectors before quantization, [..., D].
        mask: as in `Quantizer.quantize`; what cannot be quantized has entropy 0 and no part in the average.
        scale: as in `lfq`.
        inverse_temperature: t.
        floor: probabilities in logarithms are no less than this; vector-quantize-pytorch has 1e-5, below which its
            gradient is zero.

    Returns:
        (entropy of each choice [...], entropy of the choice averaged over all vectors []).
    """
    width = x.shape[-1]
    check_between("x width", width, 1, 30)
    x, valid = usable(x, mask)
    flat, weight = x.reshape(-1, width).astype(jnp.float32), valid.reshape(-1).astype(jnp.float32)
    weight /= jnp.maximum(weight.sum(), 1)
    # The softmax over all sign patterns is a product over entries: its normaliser needs no sum over codes.
    scores = 2 * inverse_temperature * scale * flat
    normaliser = jnp.logaddexp(scores, -scores).sum(axis=-1, keepdims=True)
    block = min(_BLOCK, 2**width)

    def entropy_of(probabilities: Array) -> Array:
        return -probabilities * jnp.log(jnp.maximum(probabilities, floor))

    @jax.checkpoint
    def step(total: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        signs = _signs(start + jnp.arange(block), width)
        chosen = jnp.exp(jnp.matmul(scores, signs.T, precision=lax.Precision.HIGHEST) - normaliser)
        each = entropy_of(chosen).sum(axis=-1)
        average = entropy_of(jnp.matmul(weight, chosen, precision=lax.Precision.HIGHEST)).sum()
        return (total[0] + each, total[1] + average), None

    starts = jnp.arange(2**width // block, dtype=jnp.int32) * block
    nothing = 0 * weight  # zeros that vary over the mapped axes that the sums vary over
    (each, average), _ = lax.scan(step, (nothing, nothing.sum()), starts)
    return jnp.where(valid, each.reshape(x.shape[:-1]), 0), average


def _place_values(width: int) -> np.ndarray:
    """[D] int32, powers of two, the highest first."""
    return 2 ** np.arange(width - 1, -1, -1, dtype=np.int32)


def _signs(indices: Array, width: int) -> Array:
    """+1 and -1, [..., D] float32, of indices [...]."""
    return jnp.where(indices[..., None] // _place_values(width) % 2 == 1, 1.0, -1.0)
