"""What a quantizer is, and what those that choose the nearest of K codes share."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import Metric, nearest_codes, normalise, squared_distances
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_choice, check_count

Gradient = Literal["straight_through", "rotation"]
NO_CODE = -1  # the index where nothing is quantized


class Quantized(NamedTuple):
    """What `Quantizer.quantize` makes of vectors x [..., D].

    Where a vector is masked out, or has NaN or infinity in it, nothing is quantized: code and losses are zero, no
    gradient passes, and the index is `NO_CODE`, by which `update`, `lookup` and `usage` leave it out too.
    """

    codes: Array  # [..., D], in value the codes; carries the gradient past the choice of code to x
    indices: Array  # [...] int32
    commitment_loss: Array  # [...] float32, |x - sg(code)|^2: moves x only
    codebook_loss: Array  # [...] float32, |sg(x) - code|^2: moves the quantizer's params only


class _Quantize(Protocol):
    def __call__(self, params: PyTree, state: PyTree, x: Array, mask: Array | None = None) -> Quantized: ...


class _Place(Protocol):
    def __call__(
        self,
        key: Key,
        params: PyTree,
        state: PyTree,
        x: Array,
        *,
        iterations: int = 0,
        axis_name: str | None = None,
    ) -> tuple[PyTree, PyTree]: ...


class _Update(Protocol):
    def __call__(
        self, key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree: ...


class Quantizer(NamedTuple):
    """A vector quantizer: five pure functions.

    `place` puts the codes where data are, before training: on vectors of `x`, chosen at random, and then through
    `iterations` of k-means (Lloyd 1982) over `x`. Where there are fewer vectors than codes, some codes stay where they
    were. Where there are no codes to place one by one (`simvq`, `fsq`, `lfq`) params and state come back as they are.
    """

    init: Callable[[Key], tuple[PyTree, PyTree]]  # (key) -> (params, state)
    quantize: _Quantize  # (params, state, x [..., D], mask [...] bool, True where there is a vector)
    lookup: Callable[[PyTree, PyTree, Array], Array]  # (params, state, indices [...]) -> codes [..., D]
    update: _Update  # (key, params, state, x [..., D], indices [...], *, axis_name) -> state
    place: _Place  # (key, params, state, x [..., D], *, iterations, axis_name) -> (params, state)


def check_options(codebook_size: int, width: int, metric: Metric, gradient: Gradient, block_size: int | None) -> None:
    """Raises ValueError for what no quantizer with a codebook takes."""
    check_count("codebook_size", codebook_size, 1)
    check_count("width", width, 1)
    check_choice("metric", metric, ("euclidean", "cosine"))
    if block_size is not None:
        check_count("block_size", block_size, 1)
    check_choice("gradient", gradient, ("straight_through", "rotation"))


def no_update(
    key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
) -> PyTree:
    """`Quantizer.update` of vectors [..., D] where nothing is averaged: the state as it came."""
    return state


def no_place(
    key: Key, params: PyTree, state: PyTree, x: Array, *, iterations: int = 0, axis_name: str | None = None
) -> tuple[PyTree, PyTree]:
    """`Quantizer.place` for vectors [..., D] where there are no codes to place: params and state as they came."""
    return params, state


def scaled(vectors: Array, metric: Metric) -> Array:
    """What is compared: vectors [..., D], of unit length for the cosine."""
    return normalise(vectors) if metric == "cosine" else vectors


def usable(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """(x, valid): vectors [..., D] with zeros for those that cannot be quantized, and which can be, [...] bool.

    Those that cannot are masked out or hold NaN or infinity. No gradient reaches them.

    Raises:
        ValueError: a mask that is not [...] bool.
    """
    valid = jnp.isfinite(x).all(axis=-1)
    if mask is not None:
        if mask.shape != valid.shape or mask.dtype != bool:
            raise bad_argument(
                "mask", f"{mask.dtype} of shape {tuple(mask.shape)}", f"pass {tuple(valid.shape)} bool, one a vector"
            )
        valid &= mask
    return jnp.where(valid[..., None], x, 0), valid


def where_valid(valid: Array, out: Quantized) -> Quantized:
    """What was made of vectors [..., D] where `valid` [...] holds, and nothing elsewhere."""
    return Quantized(
        jnp.where(valid[..., None], out.codes, 0),
        jnp.where(valid, out.indices, NO_CODE),
        jnp.where(valid, out.commitment_loss, 0),
        jnp.where(valid, out.codebook_loss, 0),
    )


def local_indices(indices: Array, codes: int, codebook_axis: str | None) -> Array:
    """Indices [...] counted from the first code of this device's shard; those of other shards, and `NO_CODE`, are K.

    Args:
        indices: over all devices.
        codes: K, of this device's shard.
        codebook_axis: mapped axis over which the codebook is split; None if it is whole.
    """
    first = 0 if codebook_axis is None else lax.axis_index(codebook_axis) * codes
    here = (indices >= first) & (indices < first + codes)
    return jnp.where(here, indices - first, codes)


def take_codes(codebook: Array, indices: Array, codebook_axis: str | None) -> Array:
    """Rows [..., D] of a codebook [K, D] by indices [...], zero for `NO_CODE`; it may be split over `codebook_axis`."""
    local = local_indices(indices, len(codebook), codebook_axis)
    rows = jnp.where(
        (local < len(codebook))[..., None], jnp.asarray(codebook)[jnp.minimum(local, len(codebook) - 1)], 0
    )
    return rows if codebook_axis is None else lax.psum(rows, codebook_axis)


def choose_nearest(
    x: Array,
    mask: Array | None,
    codebook: Array,
    lookup: Callable[[Array], Array],
    *,
    metric: Metric,
    gradient: Gradient,
    block_size: int | None,
    codebook_axis: str | None,
    transform: Callable[[Array], Array] | None = None,
) -> Quantized:
    """Searches `codebook` [K, D], and takes the codes, with their gradient, from `lookup`: indices -> [..., D]."""
    x, valid = usable(x, mask)
    indices = nearest_codes(
        x, codebook, metric=metric, block_size=block_size, axis_name=codebook_axis, transform=transform
    )
    x, codes = scaled(x, metric), lookup(indices).astype(x.dtype)
    passed = lax.stop_gradient(codes)
    if gradient == "rotation":
        # The rotated x equals the code only up to rounding: take the code's value and the rotation's gradient.
        turned = rotate(x, passed)
        output = passed + (turned - lax.stop_gradient(turned))
    else:
        output = passed + (x - lax.stop_gradient(x))
    commitment_loss, codebook_loss = squared_distances(x, passed), squared_distances(lax.stop_gradient(x), codes)
    return where_valid(valid, Quantized(output, indices, commitment_loss, codebook_loss))


def rotate(x: Array, codes: Array, epsilon: float = 1e-6) -> Array:
    """`codes` in value, with the gradient of the rotation and scaling that carries `x` to them (Fifty et al. 2024).

    Args:
        x: vectors, [..., D].
        codes: their codes, [..., D].
        epsilon: shortest length divided by.

    Returns:
        [..., D]: `s R x`, R the rotation of x onto the code in their plane and s the quotient of lengths, both taken
        as constants. R is two reflections, so it is applied in O(D) (their section 4.2).
    """
    narrow, kind = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    x, codes = x.astype(kind), codes.astype(kind)  # in float16 a length above 256 has an infinite square
    length, code_length = (
        jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), epsilon) for v in lax.stop_gradient((x, codes))
    )
    start, end = lax.stop_gradient((x / length, codes / code_length))
    middle = normalise(start + end, epsilon)
    turned = (
        x
        - 2 * jnp.sum(x * middle, axis=-1, keepdims=True) * middle
        + 2 * jnp.sum(x * start, axis=-1, keepdims=True) * end
    )
    return (turned * (code_length / length)).astype(narrow)
