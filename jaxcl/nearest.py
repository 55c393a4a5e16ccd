"""Nearest-code search: exact, in blocks, on one device or with the codebook split over many.

``argmin_k |x - c_k|^2 = argmax_k (x . c_k - |c_k|^2 / 2)``, and with every vector normalised the same search is that of
the cosine. Scores are float32 whatever the inputs' dtype. Ties go to the lowest index. A vector with NaN or infinity in
it gets index 0; a code with NaN or infinity in it is never chosen. Nothing here has a gradient: gradients flow
through looking codes up.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.typing import Array, bad_argument, check_choice, check_count, check_rank, check_width

Metric = Literal["euclidean", "cosine"]
Pair = tuple[Array, Array]
_METRICS = ("euclidean", "cosine")
_GROUP = 16  # codes among which the best is told apart only in the end
_GPU_BLOCK = 4096  # codes; an estimate: few, large products, 16 kB of scores a vector


def _cpu_block(vectors: int) -> int:
    """Codes a block on CPU that give four million scores, within limits; a power of two.

    With fewer the products are too small for speed, with more the scores leave the cache (measured, 256 to 8,192
    vectors, widths 8 to 128).
    """
    return 2 ** min(max(8, (2**22 // max(1, vectors)).bit_length() - 1), 12)


def nearest_codes(
    x: Array,
    codebook: Array,
    *,
    metric: Metric = "euclidean",
    block_size: int | None = None,
    axis_name: str | None = None,
    eligible: Array | None = None,
    transform: Callable[[Array], Array] | None = None,
) -> Array:
    """Index of the code nearest to each vector.

    Args:
        x: vectors, [..., D], any float dtype.
        codebook: codes, [K, D]; with `axis_name`, this device's shard of them, in device order.
        metric: "euclidean", or "cosine" (neither side need be normalised).
        block_size: codes compared at a time, so that at most [N, block_size] scores exist; None takes a default that
            was measured for the backend.
        axis_name: mapped axis over which `codebook` is split; the winner is agreed across it, and indices count codes
            over all devices. The result is the same on each of them.
        eligible: [K] bool, the codes that may be chosen (all of them if None). If none may, the index is 0.
        transform: what the rows of `codebook` [K, any width] stand for: applied to a block at a time, it gives the
            codes [block, D], which thus need not all exist at once. Nothing it closes over gets a gradient.

    Returns:
        [...] int32.

    Raises:
        ValueError: wrong ranks or widths, no code, an unknown metric, a block smaller than 1.
    """
    x, codebook, eligible, codes_of = _prepare(x, codebook, metric, block_size, eligible, transform)
    search = partial(_search, codes_of=codes_of, metric=metric)
    best, index = _by_backend(search, x.reshape(-1, x.shape[-1]), codebook, eligible, block_size)
    if axis_name is not None:
        index += lax.axis_index(axis_name) * codebook.shape[0]
        index = lax.pmin(jnp.where(best == lax.pmax(best, axis_name), index, jnp.iinfo(jnp.int32).max), axis_name)
    return index.reshape(x.shape[:-1])


def nearest_k_codes(
    x: Array,
    codebook: Array,
    k: int,
    *,
    metric: Metric = "euclidean",
    block_size: int | None = None,
    eligible: Array | None = None,
) -> Array:
    """Indices of the k codes nearest to each vector, the nearest first; arguments and errors as `nearest_codes`.

    Args:
        x: vectors, [..., D].
        codebook: codes, [K, D].
        k: how many, from 1 to K.
        metric: as in `nearest_codes`.
        block_size: as in `nearest_codes`.
        eligible: as in `nearest_codes`; where fewer than k may be chosen, the rest of the indices are ineligible
            codes, lowest index first.

    Returns:
        [..., k] int32.
    """
    x, codebook, eligible, codes_of = _prepare(x, codebook, metric, block_size, eligible, None)
    if not 1 <= k <= codebook.shape[0]:
        raise bad_argument("k", k, f"pass a number from 1 to {codebook.shape[0]}, the number of codes")
    search = partial(_search_k, codes_of=codes_of, metric=metric, k=k)
    index = _by_backend(search, x.reshape(-1, x.shape[-1]), codebook, eligible, block_size)
    return index.reshape(*x.shape[:-1], k)


def squared_distances(x: Array, codes: Array) -> Array:
    """`|x - code|^2` of vectors [..., D] and codes [..., D] that broadcast against each other; [...] float32."""
    difference = x.astype(jnp.float32) - codes.astype(jnp.float32)
    return jnp.sum(difference * difference, axis=-1)


def normalise(x: Array, epsilon: float = 1e-6) -> Array:
    """Vectors [..., D] scaled to unit length, those shorter than `epsilon` divided by it; the dtype is kept."""
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    # The limit goes inside the root, whose gradient at zero would be infinite.
    return (x / jnp.sqrt(jnp.maximum(squared, epsilon**2))).astype(x.dtype)


def _prepare(
    x: Array,
    codebook: Array,
    metric: Metric,
    block_size: int | None,
    eligible: Array | None,
    transform: Callable[[Array], Array] | None,
) -> tuple[Array, Array, Array, Callable[[Array], Array]]:
    """Checks arguments; returns x [..., D], codebook, which codes may be chosen [K], and what makes rows codes."""
    check_choice("metric", metric, _METRICS)
    check_rank("codebook", codebook, 2)
    check_count("codebook rows", codebook.shape[0], 1)
    made = codebook if transform is None else jax.eval_shape(transform, codebook)
    check_width("x", x, made.shape[1], "codebook")
    if block_size is not None:
        check_count("block_size", block_size, 1)
    if eligible is None:
        eligible = jnp.ones(len(codebook), bool)
    if eligible.shape != (len(codebook),):
        raise bad_argument("eligible", f"shape {tuple(eligible.shape)}", f"pass [{len(codebook)}], one a code")
    dtype = jnp.promote_types(x.dtype, made.dtype)
    x, codebook, eligible = lax.stop_gradient(jax.tree.map(jnp.asarray, (x, codebook, eligible)))

    def compared(vectors: Array) -> Array:
        return normalise(vectors.astype(jnp.float32)) if metric == "cosine" else vectors.astype(dtype)

    def codes_of(rows: Array) -> Array:
        return compared(rows if transform is None else lax.stop_gradient(transform(rows)))

    x = compared(x)
    # All scores of a vector that is not finite are NaN, and so its index is the same whatever the blocks.
    return jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), x, jnp.nan), codebook, eligible, codes_of


def _by_backend(search: Callable[..., Any], x: Array, codebook: Array, eligible: Array, block_size: int | None) -> Any:
    """`search(x, codebook, eligible, block)` with the block that suits the backend the program is compiled for."""
    if block_size is not None:
        return search(x, codebook, eligible, block_size)
    gpu = partial(search, block=_GPU_BLOCK)
    # TPU compilers fuse the score matrix away, so there the whole codebook is one block.
    whole = partial(search, block=None)
    cpu = partial(search, block=_cpu_block(len(x)))
    return lax.platform_dependent(x, codebook, eligible, cpu=cpu, cuda=gpu, rocm=gpu, default=whole)


def _scores(x: Array, codes: Array, eligible: Array, metric: Metric) -> Array:
    """`x . c - |c|^2 / 2`, [N, K] float32: the larger the nearer; the lowest number for codes that may not be chosen.

    For the cosine of vectors already normalised it is `x . c` alone.
    """
    codes, offset = _offset(codes, eligible, metric)
    return _products(x, codes.T) - offset


def _products(left: Array, right: Array) -> Array:
    """[N, D] times [D, K], float32."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _offset(codes: Array, eligible: Array, metric: Metric) -> tuple[Array, Array]:
    """Codes [..., D], zero where they may not be chosen, and what is taken off their products, [...] float32."""
    half_norm = 0.5 * squared_distances(codes, jnp.zeros_like(codes))
    eligible &= jnp.isfinite(half_norm)
    offset = half_norm if metric == "euclidean" else 0.0
    return jnp.where(eligible[..., None], codes, 0), jnp.where(eligible, offset, jnp.finfo(jnp.float32).max)


def _search(
    x: Array,
    codebook: Array,
    eligible: Array,
    block: int | None,
    codes_of: Callable[[Array], Array],
    metric: Metric,
) -> Pair:
    """Best score [N] and its index [N]."""
    if block is None:
        scores = _scores(x, codes_of(codebook), eligible, metric)
        highest = scores.max(axis=-1)
        return jnp.where(jnp.isnan(highest), -jnp.inf, highest), jnp.argmax(scores, axis=-1).astype(jnp.int32)

    group = math.gcd(_GROUP, min(block, len(codebook)))
    rows, allowed, starts = _in_blocks(codebook, eligible, block)
    lanes, vectors = rows.shape[1] // group, x.T
    lane_numbers = jnp.arange(lanes, dtype=jnp.int32)[:, None]

    def in_block(rows: Array, eligible: Array, start: Array) -> Pair:
        # The first codes of all groups go first, then all second ones: what is compared are long rows.
        made = _offset(codes_of(rows), eligible, metric)
        codes, offset = (part.reshape(lanes, group, *part.shape[1:]).swapaxes(0, 1) for part in made)
        products = _products(codes.reshape(lanes * group, -1), vectors).reshape(group, lanes, -1)
        best = jnp.full(products.shape[1:], -jnp.inf, jnp.float32)
        for members, taken_off in zip(products, offset[..., None], strict=True):
            scores = members - taken_off
            # Not jnp.maximum: it takes care of NaN, and longer. Nothing compares with NaN, so it is never the best.
            best = lax.select(scores > best, scores, best)
        highest = best.max(axis=0)
        lane = jnp.where(best == highest, lane_numbers, lanes).min(axis=0)
        of_lane = jnp.take_along_axis(products, lane[None, None], axis=1)[:, 0] - offset[:, lane]
        return highest, start + group * lane + jnp.argmax(of_lane, axis=0).astype(jnp.int32)

    def better(best: Pair, other: Pair) -> Pair:
        return jnp.where(other[0] > best[0], other[0], best[0]), jnp.where(other[0] > best[0], other[1], best[1])

    none = jnp.full(len(x), -jnp.inf), jnp.zeros(len(x), jnp.int32)
    return better(none, _fold_blocks(in_block, better, (rows, allowed, starts)))


def _search_k(
    x: Array,
    codebook: Array,
    eligible: Array,
    block: int | None,
    codes_of: Callable[[Array], Array],
    metric: Metric,
    k: int,
) -> Array:
    """Indices [N, k] of the best scores, best first."""

    def in_block(rows: Array, eligible: Array, start: Array) -> Pair:
        scores = _scores(x, codes_of(rows), eligible, metric)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k would put 0 before -0
        best, position = lax.top_k(scores, min(k, len(rows)))
        return best, start + position

    def better(best: Pair, other: Pair) -> Pair:
        # Earlier codes stand first, and top_k keeps the order of equals: ties go to the lowest index.
        scores, indices = (jnp.concatenate(both, axis=1) for both in zip(best, other, strict=True))
        scores, position = lax.top_k(scores, k)
        return scores, jnp.take_along_axis(indices, position, axis=1)

    # The first of the pairs that are folded must hold k already.
    blocks = _in_blocks(codebook, eligible, max(block or len(codebook), k))
    return _fold_blocks(in_block, better, blocks)[1]


def _fold_blocks(
    in_block: Callable[[Array, Array, Array], Pair], better: Callable[[Pair, Pair], Pair], blocks: tuple[Array, ...]
) -> Pair:
    """`better` folded over what `in_block` finds in each block, from the first on."""
    of_block = jax.jit(in_block)  # traced once

    def step(number: Array | int, best: Pair) -> Pair:
        return better(best, of_block(*(part[number] for part in blocks)))

    first = of_block(*(part[0] for part in blocks))
    return first if len(blocks[0]) == 1 else lax.fori_loop(1, len(blocks[0]), step, first)


def _in_blocks(codebook: Array, eligible: Array, block: int) -> tuple[Array, Array, Array]:
    """Codes [blocks, block, D], eligible [blocks, block] and first indices [blocks]; the last block is padded."""
    codes, width = codebook.shape
    block = min(block, codes)
    blocks = -(-codes // block)
    padding = blocks * block - codes
    codebook = jnp.pad(codebook, ((0, padding), (0, 0)))
    eligible = jnp.pad(eligible, (0, padding))
    starts = jnp.arange(blocks, dtype=jnp.int32) * block
    return codebook.reshape(blocks, block, width), eligible.reshape(blocks, block), starts
