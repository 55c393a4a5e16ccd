"""Codebooks that are moving averages of the vectors that chose them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import Metric, nearest_codes
from jaxcl.quantize.contract import (
    NO_CODE,
    Gradient,
    Quantized,
    Quantizer,
    check_options,
    choose_nearest,
    local_indices,
    scaled,
    take_codes,
    usable,
)
from jaxcl.quantize.statistics import usage
from jaxcl.typing import Array, Key, check_at_least, check_between, check_count, check_width


class EMAState(NamedTuple):
    """A codebook and the exponential moving averages it is the quotient of."""

    codebook: Array  # [K, D]
    counts: Array  # [K], average number of a batch's vectors that chose the code
    sums: Array  # [K, D], average sum of those vectors


def ema_vq(
    codebook_size: int,
    width: int,
    *,
    decay: float = 0.8,
    epsilon: float = 1e-5,
    initial_count: float = 1.0,
    dead_threshold: float = 0.0,
    reset_count: float | None = None,
    metric: Metric = "euclidean",
    gradient: Gradient = "rotation",
    block_size: int | None = None,
    codebook_axis: str | None = None,
) -> Quantizer:
    """Vector quantization whose codes are moving averages of their vectors (van den Oord et al. 2017, A.1).

    There are no params. The defaults are those of the public implementation most used, vector-quantize-pytorch 1.32.
    In `update`, the key decides which vectors replace dead codes and must be the same on every device.

    Args:
        codebook_size: K.
        width: D.
        decay: of the averages, a step.
        epsilon: Laplace smoothing of the counts.
        initial_count: count a code starts with, its initial vector being the average of so many.
        dead_threshold: a code whose count falls under this is replaced by a vector of the batch; 0 replaces none.
        reset_count: count of a replaced code; `dead_threshold` if None.
        metric: as in `vq`; for "cosine" the averages are of normalised vectors, and the codes are normalised.
        gradient: as in `vq`.
        block_size: see `nearest.nearest_codes`.
        codebook_axis: as in `vq`: codebook and averages are split. In `update`, `axis_name` is that of the batch.

    Raises:
        ValueError: sizes below 1, a decay outside [0, 1], a negative threshold or count, or an unknown option; in use,
            vectors whose width is not D or a mask that does not fit them.
    """
    check_options(codebook_size, width, metric, gradient, block_size)
    check_between("decay", decay, 0, 1)
    check_at_least("epsilon", epsilon, 0)
    check_at_least("initial_count", initial_count, 0)
    check_at_least("dead_threshold", dead_threshold, 0)
    fresh_count = dead_threshold if reset_count is None else reset_count
    check_at_least("reset_count", fresh_count, 0)

    def init(key: Key) -> tuple[tuple[()], EMAState]:
        codebook = scaled(jax.random.normal(key, (codebook_size, width)) * width**-0.5, metric)
        return (), initial_averages(codebook, initial_count)

    def quantize(params: tuple[()], state: EMAState, x: Array, mask: Array | None = None) -> Quantized:
        return choose_nearest(
            x, mask, state.codebook, partial(lookup, params, state),
            metric=metric, gradient=gradient, block_size=block_size, codebook_axis=codebook_axis,
        )  # fmt: skip

    def lookup(params: tuple[()], state: EMAState, indices: Array) -> Array:
        return take_codes(lax.stop_gradient(state.codebook), indices, codebook_axis)

    def update(
        key: Key, params: tuple[()], state: EMAState, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> EMAState:
        check_width("x", x, width, "the codebook")
        x, indices = lax.stop_gradient(x.reshape(-1, width).astype(jnp.float32)), indices.reshape(-1)
        x = scaled(x, metric)
        state = update_averages(
            state, x, indices, decay=decay, epsilon=epsilon, axis_name=axis_name, codebook_axis=codebook_axis
        )
        state = state._replace(codebook=scaled(state.codebook, metric))
        if dead_threshold > 0:
            dead = state.counts < dead_threshold
            rows, dead = draw_replacements(
                key, x, dead, valid=indices >= 0, axis_name=axis_name, codebook_axis=codebook_axis
            )
            state = replace_codes(state, rows, dead, fresh_count)
        return state

    def place(
        key: Key, params: tuple[()], state: EMAState, x: Array, *, iterations: int = 0, axis_name: str | None = None
    ) -> tuple[tuple[()], EMAState]:
        codebook = place_codes(
            key, state.codebook, x,
            iterations=iterations, metric=metric, axis_name=axis_name, codebook_axis=codebook_axis,
        )  # fmt: skip
        return params, initial_averages(codebook, initial_count)

    return Quantizer(init, quantize, lookup, update, place)


def initial_averages(codebook: Array, count: Array | float) -> EMAState:
    """The state of a codebook [K, D] before any data, as if each code were the average of `count` [] or [K] vectors."""
    counts = jnp.full(codebook.shape[0], count, jnp.float32)
    return EMAState(codebook, counts, codebook * counts[:, None])


def update_averages(
    state: EMAState,
    x: Array,
    indices: Array,
    *,
    decay: float,
    epsilon: float,
    axis_name: str | None = None,
    codebook_axis: str | None = None,
) -> EMAState:
    """One step of the averages: `n <- g n + (1-g) count`, `m <- g m + (1-g) sum`, `code = m / smoothed(n)`.

    Args:
        state: averages, [K] and [K, D].
        x: vectors, [N, D]; with `axis_name`, this device's share of the batch.
        indices: the code each chose, [N]; a vector with `NO_CODE` is left out.
        decay: g.
        epsilon: of `smoothed(n) = (n + epsilon) / (total + K epsilon) * total`. With 0 a code is exactly the average
            of what chose it, and one that nothing chose keeps its place.
        axis_name: mapped axis (or axes) over which counts and sums are added up.
        codebook_axis: mapped axis over which the codes are split.
    """
    codes = state.counts.shape[0]
    indices = local_indices(indices, codes, codebook_axis)
    chosen = usage(indices, codes, axis_name=axis_name).astype(jnp.float32)
    sums = jnp.zeros_like(state.sums).at[indices].add(x, mode="drop")
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    counts = decay * state.counts + (1 - decay) * chosen
    sums = decay * state.sums + (1 - decay) * sums
    if epsilon == 0:
        # Not chosen, count and sum shrink alike: their quotient stays, but would be lost when both reach zero.
        smoothed, moved = counts[:, None], ((chosen > 0) & (counts > 0))[:, None]
    else:
        total = counts.sum()
        if codebook_axis is not None:
            total, codes = lax.psum(total, codebook_axis), codes * lax.axis_size(codebook_axis)
        smoothed = ((counts + epsilon) / (total + codes * epsilon) * total)[:, None]
        moved = smoothed > 0
    return EMAState(jnp.where(moved, sums / jnp.where(moved, smoothed, 1), state.codebook), counts, sums)


def draw_replacements(
    key: Key,
    x: Array,
    dead: Array,
    *,
    valid: Array | None = None,
    axis_name: str | None = None,
    codebook_axis: str | None = None,
) -> tuple[Array, Array]:
    """Distinct vectors of the batch, one for each dead code.

    Where more codes are dead than there are vectors, a random run of them is served and the others wait. With
    `axis_name` the draw is over the whole batch: the same key on every device gives the result that one device with
    the whole batch would get.

    Args:
        key: consumed; equal on all devices.
        x: vectors, [N, D]; with `axis_name`, this device's share, in device order.
        dead: [K] bool; with `codebook_axis`, of this device's codes.
        valid: [N] bool, which vectors may be drawn; all if None.
        axis_name: mapped axis over which the batch is split.
        codebook_axis: mapped axis over which the codes are split.

    Returns:
        (rows [K, D], replaced [K] bool): a code's new vector, meaningful where `replaced` holds.
    """
    local = x.shape[0]
    if not local:
        return jnp.zeros((len(dead), x.shape[1]), x.dtype), jnp.zeros_like(dead)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    order_key, start_key = jax.random.split(key)
    order = jax.random.permutation(order_key, local * devices)
    available: Array | int = local * devices
    if valid is not None:
        everywhere = valid if axis_name is None else _of_each_device(valid, axis_name).reshape(-1)
        order = order[jnp.argsort(~everywhere[order], stable=True)]
        available = everywhere.sum()
    count, before = dead.sum(), jnp.int32(0)
    if codebook_axis is not None:
        of_each = _of_each_device(count, codebook_axis)
        count, before = of_each.sum(), (jnp.cumsum(of_each) - of_each)[lax.axis_index(codebook_axis)]
    # Ranks count from a random one of the dead, so that none waits for ever behind codes of lower index.
    count = jnp.maximum(count, 1)
    rank = (before + jnp.cumsum(dead) - 1 + jax.random.randint(start_key, (), 0, count)) % count
    chosen = order[jnp.clip(rank, 0, local * devices - 1)]
    if axis_name is None:
        rows = x[chosen]
    else:
        here = chosen - lax.axis_index(axis_name) * local
        mine = (here >= 0) & (here < local)
        rows = lax.psum(jnp.where(mine[:, None], x[jnp.clip(here, 0, local - 1)], 0), axis_name)
    return rows, dead & (rank < available)


def replace_codes(state: EMAState, rows: Array, dead: Array, count: Array | float) -> EMAState:
    """`state` with the codes that are `dead` [K] replaced by `rows` [K, D], as if averages of `count` vectors."""
    mask = dead[:, None]
    return EMAState(
        codebook=jnp.where(mask, rows, state.codebook),
        counts=jnp.where(dead, count, state.counts),
        sums=jnp.where(mask, rows * count, state.sums),
    )


def place_codes(
    key: Key,
    codebook: Array,
    x: Array,
    *,
    iterations: int,
    metric: Metric,
    axis_name: str | None = None,
    codebook_axis: str | None = None,
) -> Array:
    """A codebook [K, D] on vectors of x, chosen at random, and moved by k-means (Lloyd 1982) over x.

    Args:
        key: consumed; equal on all devices.
        codebook: [K, D]; where there are fewer vectors than codes, some of these stay.
        x: vectors, [..., D]; with `axis_name`, this device's share. Those with NaN or infinity are left out.
        iterations: of k-means; a code that no vector chooses stays where it is.
        metric: as in `vq`; k-means by the cosine is spherical (Dhillon & Modha 2001).
        axis_name: mapped axis over which the vectors are split.
        codebook_axis: mapped axis over which the codes are split.
    """
    check_count("iterations", iterations, 0)
    check_width("x", x, codebook.shape[1], "the codebook")
    x, valid = usable(lax.stop_gradient(x.reshape(-1, x.shape[-1])).astype(jnp.float32), None)
    x = scaled(x, metric)
    rows, drawn = draw_replacements(
        key, x, jnp.ones(len(codebook), bool), valid=valid, axis_name=axis_name, codebook_axis=codebook_axis
    )
    codebook = scaled(jnp.where(drawn[:, None], rows, codebook), metric)

    def step(_: Array | int, codebook: Array) -> Array:
        indices = jnp.where(valid, nearest_codes(x, codebook, metric=metric, axis_name=codebook_axis), NO_CODE)
        # Averages of no memory and no smoothing are the means of what chose each code.
        state = update_averages(
            initial_averages(codebook, 0), x, indices,
            decay=0, epsilon=0, axis_name=axis_name, codebook_axis=codebook_axis,
        )  # fmt: skip
        return scaled(state.codebook, metric)

    return lax.fori_loop(0, iterations, step, codebook)


def _of_each_device(own: Array, axis_name: str) -> Array:
    """[devices, ...], the same on all: `lax.all_gather` of what is [...] on each gives what is not known to be so."""
    devices = lax.axis_size(axis_name)
    return lax.psum(jnp.zeros((devices, *own.shape), own.dtype).at[lax.axis_index(axis_name)].set(own), axis_name)
