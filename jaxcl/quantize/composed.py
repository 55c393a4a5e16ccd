"""Quantizers made of others: several in a row or side by side, or one behind a projection.

Of several, params and states are those of the single one stacked on a new leading axis. Indices get a new last axis;
losses are summed. What is composed may be composed itself. The single ones run one after another in one compiled loop.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.quantize.contract import Quantized, Quantizer, usable
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_count, check_width


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
    check_count("depth", depth, 1)

    def quantize(params: PyTree, state: PyTree, x: Array, mask: Array | None = None) -> Quantized:
        def step(left: Array, own: tuple[PyTree, PyTree]) -> tuple[Array, tuple[Quantized, Array]]:
            out = quantizer.quantize(*own, left, mask)
            # Params, such as a projection, learn from the sum in each choice; compiled, this is the same search.
            for_params = quantizer.quantize(*own, lax.stop_gradient(left), mask).codes
            return left - lax.stop_gradient(out.codes), (out, for_params)

        each, for_params = lax.scan(step, x, (params, state), length=depth)[1]
        return _joined(each, each.codes[0] + for_params[1:].sum(axis=0))

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

    def place(
        key: Key, params: PyTree, state: PyTree, x: Array, *, iterations: int = 0, axis_name: str | None = None
    ) -> tuple[PyTree, PyTree]:
        def step(left: Array, own: tuple[Key, PyTree, PyTree]) -> tuple[Array, tuple[PyTree, PyTree]]:
            placed = quantizer.place(*own, left, iterations=iterations, axis_name=axis_name)
            return left - quantizer.quantize(*placed, left).codes, placed

        return lax.scan(step, lax.stop_gradient(x), (jax.random.split(key, depth), params, state))[1]

    return Quantizer(
        lambda key: jax.vmap(quantizer.init)(jax.random.split(key, depth)), quantize, lookup, update, place
    )


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
    check_count("groups", groups, 1)

    def cut(x: Array) -> Array:
        """[G, ..., D] from [..., G D]."""
        if x.shape[-1] % groups:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"pass a last axis that {groups} groups divide evenly")
        return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 0)

    def side_by_side(parts: Array) -> Array:
        """[..., G D] from [G, ..., D]."""
        return jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], groups * parts.shape[-1])

    def quantize(params: PyTree, state: PyTree, x: Array, mask: Array | None = None) -> Quantized:
        x, valid = usable(x, mask)  # a vector is quantized whole or not at all

        def one(own: tuple[PyTree, PyTree, Array]) -> Quantized:
            params, state, part = own
            return quantizer.quantize(params, state, part, valid)

        each = lax.map(one, (params, state, cut(x)))
        return _joined(each, side_by_side(each.codes))

    def lookup(params: PyTree, state: PyTree, indices: Array) -> Array:
        return side_by_side(lax.map(lambda own: quantizer.lookup(*own), (params, state, _split(indices, groups))))

    def update(
        key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree:
        def one(own: tuple[Key, PyTree, PyTree, Array, Array]) -> PyTree:
            return quantizer.update(*own, axis_name=axis_name)

        return lax.map(one, (jax.random.split(key, groups), params, state, cut(x), _split(indices, groups)))

    def place(
        key: Key, params: PyTree, state: PyTree, x: Array, *, iterations: int = 0, axis_name: str | None = None
    ) -> tuple[PyTree, PyTree]:
        def one(own: tuple[Key, PyTree, PyTree, Array]) -> tuple[PyTree, PyTree]:
            return quantizer.place(*own, iterations=iterations, axis_name=axis_name)

        whole = jnp.where(usable(x, None)[1][..., None], x, jnp.nan)  # or left out, as in `quantize`
        return lax.map(one, (jax.random.split(key, groups), params, state, cut(whole)))

    return Quantizer(
        lambda key: jax.vmap(quantizer.init)(jax.random.split(key, groups)), quantize, lookup, update, place
    )


def projected(quantizer: Quantizer, width: int, code_width: int) -> Quantizer:
    """Factorised codes (Yu et al. 2022, ViT-VQGAN, section 3.2): x is projected to few entries, quantized, and back.

    With `vq(K, code_width, metric="cosine")` it is VQGAN-FC, and it gives `fsq` and `lfq`, whose width their number of
    codes decides, vectors of any width. Losses are those of the projected vectors, so that the commitment loss moves x
    and the projection down; the projection up learns from what is made of the codes.

    Params are {"down": {"kernel": [D, E], "bias": [E]}, "up": {"kernel": [E, D], "bias": [D]}, "quantizer": those of
    the single one}, kernels and biases uniform in +-1 / sqrt(inputs) at first; the state is that of the single one.

    Args:
        quantizer: of vectors [..., E].
        width: D, of x and of the codes.
        code_width: E.

    Raises:
        ValueError: a width below 1; in use, vectors whose width is not D, and what the single one raises.
    """
    check_count("width", width, 1)
    check_count("code_width", code_width, 1)

    def layer(key: Key, inputs: int, outputs: int) -> dict[str, Array]:
        shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}
        keys = jax.random.split(key, len(shapes))
        bound = inputs**-0.5
        return {
            name: jax.random.uniform(own, shape, minval=-bound, maxval=bound)
            for own, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(layer: dict[str, Array], x: Array) -> Array:
        return jnp.matmul(x, layer["kernel"].astype(x.dtype)) + layer["bias"].astype(x.dtype)

    def init(key: Key) -> tuple[PyTree, PyTree]:
        down_key, up_key, own_key = jax.random.split(key, 3)
        own, state = quantizer.init(own_key)
        params = {"down": layer(down_key, width, code_width), "up": layer(up_key, code_width, width), "quantizer": own}
        return params, state

    def down(params: PyTree, x: Array) -> Array:
        check_width("x", x, width, "the projection")
        return apply(params["down"], x)

    def up(params: PyTree, codes: Array, indices: Array) -> Array:
        chosen = (indices >= 0).all(axis=tuple(range(codes.ndim - 1, indices.ndim)))
        return jnp.where(chosen[..., None], apply(params["up"], codes), 0)

    def quantize(params: PyTree, state: PyTree, x: Array, mask: Array | None = None) -> Quantized:
        x, valid = usable(x, mask)
        out = quantizer.quantize(params["quantizer"], state, down(params, x), valid)
        return out._replace(codes=up(params, out.codes, out.indices))

    def lookup(params: PyTree, state: PyTree, indices: Array) -> Array:
        return up(params, quantizer.lookup(params["quantizer"], state, indices), indices)

    def update(
        key: Key, params: PyTree, state: PyTree, x: Array, indices: Array, *, axis_name: str | None = None
    ) -> PyTree:
        return quantizer.update(key, params["quantizer"], state, down(params, x), indices, axis_name=axis_name)

    def place(
        key: Key, params: PyTree, state: PyTree, x: Array, *, iterations: int = 0, axis_name: str | None = None
    ) -> tuple[PyTree, PyTree]:
        own, state = quantizer.place(
            key, params["quantizer"], state, down(params, x), iterations=iterations, axis_name=axis_name
        )
        return params | {"quantizer": own}, state

    return Quantizer(init, quantize, lookup, update, place)


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
