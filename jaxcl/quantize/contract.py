"""What a quantizer is, and what those that choose the nearest of K codes share."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import Metric, nearest_codes, normalise, squared_distances
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_choice

Gradient = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """What `Quantizer.quantize` makes of vectors x [..., D]."""

    codes: Array  # [..., D], in value the codes; carries the gradient past the choice of code to x
    indices: Array  # [...] int32
    commitment_loss: Array  # [...] float32, |x - sg(code)|^2: moves x only
    codebook_loss: Array  # [...] float32, |sg(x) - code|^2: moves the quantizer's params only


class _Update(Protocol):
    def __call__(
        self, key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree: ...


class Quantizer(NamedTuple):
    """A vector quantizer: four pure functions."""

    init: Callable[[Key], tuple[PyTree, PyTree]]  # (key) -> (params, state)
    quantize: Callable[[PyTree, PyTree, Array], Quantized]  # (params, state, x [..., D])
    lookup: Callable[[PyTree, PyTree, Array], Array]  # (params, state, indices [...]) -> codes [..., D]
    update: _Update  # (key, params, state, x [..., D], indices [...], *, axis_name) -> state


def check_options(codebook_size: int, width: int, metric: Metric, gradient: Gradient, block_size: int | None) -> None:
    """Raises ValueError for what no quantizer with a codebook takes."""
    check_at_least("codebook_size", codebook_size, 1)
    check_at_least("width", width, 1)
    check_choice("metric", metric, ("euclidean", "cosine"))
    if block_size is not None:
        check_at_least("block_size", block_size, 1)
    check_choice("gradient", gradient, ("straight_through", "rotation"))


def no_update(
    key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
) -> PyTree:
    """`Quantizer.update` of vectors [..., D] where nothing is averaged: the state as it came."""
    return state


def scaled(vectors: Array, metric: Metric) -> Array:
    """What is compared: vectors [..., D], of unit length for the cosine."""
    return normalise(vectors) if metric == "cosine" else vectors


def choose_nearest(
    x: Array,
    codebook: Array,
    lookup: Callable[[Array], Array],
    metric: Metric,
    gradient: Gradient,
    block_size: int | None,
) -> Quantized:
    """Searches `codebook` [K, D], and takes the codes, with their gradient, from `lookup`: indices -> [..., D]."""
    indices = nearest_codes(x, codebook, metric=metric, block_size=block_size)
    x, codes = scaled(x, metric), lookup(indices).astype(x.dtype)
    passed = lax.stop_gradient(codes)
    if gradient == "rotation":
        # The rotated x equals the code only up to rounding: take the code's value and the rotation's gradient.
        turned = rotate(x, passed)
        output = passed + (turned - lax.stop_gradient(turned))
    else:
        output = passed + (x - lax.stop_gradient(x))
    return Quantized(output, indices, squared_distances(x, passed), squared_distances(lax.stop_gradient(x), codes))


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
    return turned * (code_length / length)
