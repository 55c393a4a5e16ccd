"""A training step of SimVQ and of EMA VQ at D=128, beside vector-quantize-pytorch.

A step is forward and backward: codes, losses, the gradients in x and, of SimVQ, in its basis; of EMA VQ the averages
too. Both sides have the rotation trick, which is the peer's default, and SimVQ has no bias, as there. The last rows are
the products of vectors and codes alone, as XLA and as PyTorch have them: no search is faster than its product.

``python -m experiments.benchmarks.quantizers``
"""

from functools import partial

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

D = 128
PRODUCT_BLOCK = 1024  # codes
CARDS = {"": Card("5 min", "SimVQ 2.7 to 3.2 times as fast (its product alone allows 3.5 to 4.0), EMA VQ 12 times")}


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


def _our_product(count: int, codes: int) -> Step:
    import jax
    import jax.numpy as jnp

    x, codebook = jax.device_put((_vectors(count)[0], _vectors(codes)[0]))

    @jax.jit
    def product(x, codebook):  # type: ignore[no-untyped-def]
        blocks = codebook.reshape(-1, PRODUCT_BLOCK, D)

        def step(number, total):  # type: ignore[no-untyped-def]
            scores = blocks[number] @ x.T
            return total + scores[0] + scores[-1]  # so that the product is needed

        return jax.lax.fori_loop(0, len(blocks), step, jnp.zeros(count))

    return lambda: jax.block_until_ready(product(x, codebook))


def _peer_product(count: int, codes: int) -> Step:
    import torch

    x, codebook = (torch.from_numpy(_vectors(size)[0]) for size in (count, codes))
    scores = torch.empty(PRODUCT_BLOCK, count)

    def once() -> object:
        for first in range(0, codes, PRODUCT_BLOCK):
            torch.mm(codebook[first : first + PRODUCT_BLOCK], x.T, out=scores)
        return scores

    return once


SIZES = ((2048, 65_536, 10), (1024, 262_144, 5), (4096, 262_144, 3))
CASES = {
    f"{method}, N={count} K={codes}": Case(
        partial(_ours, method, count, codes), partial(_peer, method, count, codes), repeats=repeats
    )
    for method in ("simvq", "ema_vq")
    for count, codes, repeats in SIZES
    if method == "simvq" or count < 4096  # the peer's EMA VQ takes more than 20 GB there
} | {
    f"product alone, N={count} K={codes}": Case(
        partial(_our_product, count, codes), partial(_peer_product, count, codes), repeats=repeats
    )
    for count, codes, repeats in SIZES
}

if __name__ == "__main__":
    main("quantizers", CASES)
