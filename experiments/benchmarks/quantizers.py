"""A training step of SimVQ and of EMA VQ at D=128, beside vector-quantize-pytorch.

A step is forward and backward: codes, losses, the gradients in x and, of SimVQ, in its basis; of EMA VQ the averages
too. Both sides have the rotation trick, which is the peer's default, and SimVQ has no bias, as there.

``python -m experiments.benchmarks.quantizers``
"""

from functools import partial

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

D = 128
CARDS = {"": Card("not measured", "not measured")}


def _vectors(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, count, D), np.float32)


def _ours(method: str, count: int, codes: int) -> Step:
    import jax

    from jaxcl import quantize

    if method == "simvq":
        quantizer = quantize.simvq(codes, D, bias=False, gradient="rotation")
    else:
        quantizer = quantize.ema_vq(codes, D)
    # Waited for: what it takes to make them does not belong to the step.
    params, state = jax.block_until_ready(jax.jit(quantizer.init)(jax.random.key(0)))
    x = jax.device_put(_vectors(count))

    @partial(jax.jit, donate_argnums=2)
    def step(key, params, state, x):  # type: ignore[no-untyped-def]
        def total(params, x):  # type: ignore[no-untyped-def]
            out = quantizer.quantize(params, state, x)
            return out.codes.sum() + (out.commitment_loss + out.codebook_loss).mean() / D, out.indices

        gradients, indices = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
        return gradients, indices, quantizer.update(key, params, state, x, indices)

    key = jax.random.key(1)

    def once() -> object:
        nonlocal state
        gradients, indices, state = step(key, params, state, x)
        return jax.block_until_ready((gradients, indices, state))

    return once


def _peer(method: str, count: int, codes: int) -> Step:
    import torch
    from vector_quantize_pytorch import SimVQ, VectorQuantize

    torch.manual_seed(0)
    layer = SimVQ(D, codes) if method == "simvq" else VectorQuantize(D, codes)
    layer.train()
    x = torch.from_numpy(_vectors(count)).requires_grad_()

    def once() -> object:
        layer.zero_grad()
        x.grad = None
        quantized, indices, loss = layer(x)
        (quantized.sum() + loss.sum()).backward()
        return indices

    return once


SIZES = ((2048, 65_536, 10), (1024, 262_144, 5), (4096, 262_144, 2))
CASES = {
    f"{method}, N={count} K={codes}": Case(
        partial(_ours, method, count, codes), partial(_peer, method, count, codes), repeats=repeats
    )
    for method in ("simvq", "ema_vq")
    for count, codes, repeats in SIZES
}

if __name__ == "__main__":
    main("quantizers", CASES)
