"""Codebooks that learn by gradients: vanilla VQ, each code by itself, and SimVQ, all of them by their basis."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import Metric
from jaxcl.quantize.averages import place_codes
from jaxcl.quantize.contract import (
    Gradient,
    Quantized,
    Quantizer,
    check_options,
    choose_nearest,
    no_place,
    no_update,
    scaled,
    take_codes,
)
from jaxcl.typing import Array, Key, PyTree, check_choice, check_count

Basis = Literal["uniform", "orthogonal", "identity"]
_BASES: dict[Basis, Callable[[Key, tuple[int, int]], Array]] = {
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) * shape[0] ** -0.5,
    "orthogonal": jax.nn.initializers.orthogonal(),
    "identity": lambda key, shape: jnp.eye(*shape),
}


def vq(
    codebook_size: int,
    width: int,
    *,
    metric: Metric = "euclidean",
    gradient: Gradient = "straight_through",
    block_size: int | None = None,
    codebook_axis: str | None = None,
) -> Quantizer:
    """Vector quantization with a codebook that learns by gradients (van den Oord et al. 2017, eq. 3).

    Params are the codebook [K, D], N(0, 1/D) at first; there is no state, and `update` returns it as it came.

    Args:
        codebook_size: K.
        width: D.
        metric: "cosine" searches, and compares x with the code, after both are scaled to unit length.
        gradient: how the gradient passes the choice of code: "straight_through" copies it, "rotation" turns and
            scales it as the code is turned and scaled from x (Fifty et al. 2024).
        block_size: see `nearest.nearest_codes`.
        codebook_axis: mapped axis over which the codebook is split by its first axis (`init` gives it whole). Indices
            count codes over all devices, and what is told of the vectors is the same on each of that axis.

    Raises:
        ValueError: K or D below 1, or an unknown option; in use, vectors whose width is not D or a mask that does not
            fit them.
    """
    check_options(codebook_size, width, metric, gradient, block_size)

    def init(key: Key) -> tuple[Array, tuple[()]]:
        return jax.random.normal(key, (codebook_size, width)) * width**-0.5, ()

    def quantize(params: Array, state: tuple[()], x: Array, mask: Array | None = None) -> Quantized:
        return choose_nearest(
            x, mask, params, partial(lookup, params, state),
            metric=metric, gradient=gradient, block_size=block_size, codebook_axis=codebook_axis,
        )  # fmt: skip

    def lookup(params: Array, state: tuple[()], indices: Array) -> Array:
        return scaled(take_codes(params, indices, codebook_axis), metric)

    def place(
        key: Key, params: Array, state: tuple[()], x: Array, *, iterations: int = 0, axis_name: str | None = None
    ) -> tuple[Array, tuple[()]]:
        codebook = place_codes(
            key, params, x, iterations=iterations, metric=metric, axis_name=axis_name, codebook_axis=codebook_axis
        )
        return codebook, state

    return Quantizer(init, quantize, lookup, no_update, place)


def simvq(
    codebook_size: int,
    width: int,
    *,
    code_width: int | None = None,
    hidden: int | None = None,
    bias: bool = True,
    initial: Basis = "uniform",
    train_codebook: bool = False,
    metric: Metric = "euclidean",
    gradient: Gradient = "straight_through",
    block_size: int | None = None,
    codebook_axis: str | None = None,
) -> Quantizer:
    """SimVQ (Zhu et al. 2025, section 4): the codes are C W + b, of which W and b learn and C does not.

    A step that moves W moves every code, chosen or not, so that none is left behind. Losses reach W through the chosen
    rows `C[i] W + b` alone. The search forms `C W + b` a block of codes at a time, without a gradient, so that beside C
    no array [K, D] exists.

    Params are {"basis": [{"kernel": W [D_C, D], "bias": b [D]}]}, with two such layers if `hidden` is given, and
    "codebook": C if `train_codebook`. The state is C [K, D_C], N(0, 1/D_C) at first, or () if it is among the params.
    `lookup` gives `C[i] W + b`, where the authors' `get_codebook_entry` gives `C[i]`. The authors weigh the commitment
    loss by 0.25 and the codebook loss by 1 in what they published ("legacy" the other way round), both divided by D.

    Args:
        codebook_size: K.
        width: D.
        code_width: D_C; D if None.
        hidden: width of a hidden layer with GELU between C and the codes, in place of the linear basis; None has none.
        bias: whether layers have one, as the authors' do; vector-quantize-pytorch's have none.
        initial: of the kernels: "uniform" in +-1 / sqrt(inputs), as bias and the authors' both; "orthogonal" columns
            or rows; or "identity", padded with zeros, so that a linear basis without bias begins with C as its codes.
        train_codebook: whether C learns too.
        metric: as in `vq`.
        gradient: as in `vq`; vector-quantize-pytorch's default is "rotation".
        block_size: see `nearest.nearest_codes`.
        codebook_axis: as in `vq`: C is split, the basis is not.

    Raises:
        ValueError: sizes below 1 or an unknown option; in use, vectors whose width is not D or a mask that does not fit
            them.
    """
    check_options(codebook_size, width, metric, gradient, block_size)
    check_choice("initial", initial, _BASES)
    widths = [width if code_width is None else code_width, *([] if hidden is None else [hidden]), width]
    for name, size in (("code_width", widths[0]), ("hidden", widths[-2])):
        check_count(name, size, 1)

    def init(key: Key) -> tuple[PyTree, PyTree]:
        codebook_key, *layer_keys = jax.random.split(key, len(widths))
        codebook = jax.random.normal(codebook_key, (codebook_size, widths[0])) * widths[0] ** -0.5
        basis = []
        for layer_key, inputs, outputs in zip(layer_keys, widths[:-1], widths[1:], strict=True):
            kernel_key, bias_key = jax.random.split(layer_key)
            kernel = _BASES[initial](kernel_key, (inputs, outputs))
            offset = jax.random.uniform(bias_key, (outputs,), minval=-1, maxval=1) * inputs**-0.5
            basis.append({"kernel": kernel, "bias": offset} if bias else {"kernel": kernel})
        if train_codebook:
            return {"basis": basis, "codebook": codebook}, ()
        return {"basis": basis}, codebook

    def project(params: PyTree, codes: Array) -> Array:
        """Codes [..., D] from rows of C [..., D_C]."""
        for number, layer in enumerate(params["basis"]):
            codes = jax.nn.gelu(codes) if number else codes
            codes = jnp.matmul(codes, layer["kernel"], precision=lax.Precision.HIGHEST) + layer.get("bias", 0.0)
        return codes

    def codebook(params: PyTree, state: PyTree) -> Array:
        return params["codebook"] if train_codebook else lax.stop_gradient(state)

    def quantize(params: PyTree, state: PyTree, x: Array, mask: Array | None = None) -> Quantized:
        return choose_nearest(
            x, mask, codebook(params, state), partial(lookup, params, state),
            metric=metric, gradient=gradient, block_size=block_size, codebook_axis=codebook_axis,
            transform=partial(project, lax.stop_gradient(params)),
        )  # fmt: skip

    def lookup(params: PyTree, state: PyTree, indices: Array) -> Array:
        codes = project(params, take_codes(codebook(params, state), indices, codebook_axis))
        return jnp.where((indices >= 0)[..., None], scaled(codes, metric), 0)

    return Quantizer(init, quantize, lookup, no_update, no_place)
