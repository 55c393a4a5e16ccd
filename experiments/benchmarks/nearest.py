"""Nearest-code search at N=2048, K=65536, D=128, float32, beside PyTorch.

``python -m experiments.benchmarks.nearest``
"""

from functools import partial

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

N, K, D = 2048, 65536, 128
CARDS = {
    "": Card(
        "1 min", "2.4 to 3.3 times as fast as PyTorch's product with argmax, 2.8 to 3.8 times as cdist with argmin"
    )
}


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, D), np.float32), rng.standard_normal((K, D), np.float32)


def _ours() -> Step:
    import jax

    from jaxcl.nearest import nearest_codes

    x, codebook = map(jax.device_put, _inputs())
    search = jax.jit(nearest_codes)
    return lambda: jax.block_until_ready(search(x, codebook))


def _peer(form: str) -> Step:
    import torch

    x, codebook = map(torch.from_numpy, _inputs())
    if form == "cdist":
        return lambda: torch.cdist(x, codebook).argmin(-1)
    return lambda: torch.addmm(-0.5 * (codebook * codebook).sum(-1), x, codebook.T).argmax(-1)


CASES = {
    f"N={N} K={K} D={D}, torch cdist + argmin": Case(_ours, partial(_peer, "cdist")),
    f"N={N} K={K} D={D}, torch matmul + argmax": Case(_ours, partial(_peer, "matmul")),
}

if __name__ == "__main__":
    main("nearest", CASES)
