"""Relative entropy coding of LeNet-5's blocks, beside making the same candidates alone and beside PyTorch.

Blocks of 30 weights with a KL of 11 bits each. A ratio to candidates alone is the share of their speed that encoding
reaches: it cannot be above 1, and the peaks of the rows with more bits show whether memory grows with them. PyTorch's
side is MIRACLE's algorithm in chunks that are as large as ours, on candidates of its own generator. The last rows are
decoding beside reading the same weights from an .npz, and normal draws beside JAX's own.
``python -m experiments.benchmarks.coding``
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

CARDS = {
    "": Card(
        "4 min",
        "encoding at 0.9 of the speed of its candidates alone, 6.9 times PyTorch's; memory flat from 10 to 20 bits",
    )
}
WIDTH, KL = 30, 11.0


def _blocks(count: int) -> Any:
    """Posterior and prior of so many blocks."""
    import jax
    import jax.numpy as jnp

    from jaxcl import gaussian

    raw_mean, raw_share = jax.random.normal(jax.random.key(0), (2, count, WIDTH))
    prior = gaussian.Gaussian(jnp.zeros((count, WIDTH)), jnp.ones((count, WIDTH)))
    return gaussian.mean_kl(raw_mean, raw_share, KL * math.log(2), prior), prior


def _encode(count: int, bits: int) -> Step:
    import jax

    from jaxcl import coding

    q, p = _blocks(count)
    coder, key = coding.mrc(bits), jax.random.key(0)
    return lambda: jax.block_until_ready(coder.encode(key, 0, np.arange(count), q, p))


def _candidates_alone(count: int, bits: int) -> Step:
    import jax
    import jax.numpy as jnp

    from jaxcl import threefry

    blocks, size = jnp.arange(count, dtype=jnp.uint32), min(2**bits, 1 << (2**18 // count).bit_length() - 1)

    @jax.jit
    def make() -> jax.Array:
        def chunk(number: jax.Array, best: jax.Array) -> jax.Array:
            numbers = number.astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32)

            def add(total: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
                words = threefry.threefry_2x32((jnp.uint32(0), blocks[:, None]), (numbers[None], pair))
                return total + sum(map(threefry.normal_of_word, words)), None

            zero = jnp.zeros((count, size))
            total, _ = jax.lax.scan(add, zero, jnp.arange(WIDTH // 2, dtype=jnp.uint32))
            return jnp.maximum(best, total.max(axis=1))

        return jax.lax.fori_loop(0, 2**bits // size, chunk, jnp.zeros(count))

    return lambda: jax.block_until_ready(make())


def _torch(count: int, bits: int) -> Step:
    import torch

    q, p = _blocks(count)
    mean, ratio = (torch.from_numpy(np.array(leaf)) for leaf in (q.mean / p.scale, q.scale / p.scale))
    size = min(2**bits, 1 << (2**18 // count).bit_length() - 1)

    def step() -> None:
        best, index = torch.full((count,), -torch.inf), torch.zeros(count, dtype=torch.long)
        for start in range(0, 2**bits, size):
            z = torch.randn(count, size, WIDTH)
            scores = 0.5 * (z.square() - ((z - mean[:, None]) / ratio[:, None]).square()).sum(-1)
            scores -= torch.empty_like(scores).exponential_().log()
            score, ahead = scores.max(dim=1)
            index = torch.where(score > best, start + ahead, index)
            best = torch.maximum(score, best)

    return step


def _file(kind: str) -> Path:
    """LeNet-5 as a file, in a folder that is left to the system to clear."""
    import jax
    import jax.numpy as jnp

    from jaxcl import coding, nets, trees

    params = nets.LeNet5(10).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    layout = coding.layout_of(
        params, width=WIDTH, values={"params/Dense_0/kernel": 12_000, "params/Conv_1/kernel": 9_000}
    )
    indices = np.random.default_rng(0).integers(0, 2**14, layout.blocks).astype(np.uint32)
    message = coding.Message(layout, np.ones(len(layout.leaves), np.float32), 14, indices, KL)
    path = Path(tempfile.mkdtemp()) / f"lenet5.{kind}"
    if kind == "jcl":
        coding.save(path, message)
    else:
        np.savez(path, **dict[str, Any](trees.leaves_by_path(coding.decode(message))))
    return path


def _decode() -> Step:
    from jaxcl import coding

    path = _file("jcl")

    def step() -> None:
        coding.places.cache_clear()  # so that only the table of quantiles is there already
        coding.decode(coding.load(path))

    return step


def _read() -> Step:
    path = _file("npz")

    def step() -> None:
        with np.load(path) as file:
            for name in file.files:
                file[name]

    return step


def _draws(function: str) -> Step:
    import jax

    from jaxcl import threefry

    draw = threefry.standard_normal if function == "ours" else jax.random.normal
    jitted, key = jax.jit(partial(draw, shape=(6_500_000,))), jax.random.key(0)
    return lambda: jax.block_until_ready(jitted(key))


SIZES = {"10 bits": (886, 10, 15), "14 bits": (886, 14, 7), "64 blocks, 20 bits": (64, 20, 3)}
CASES = {
    f"{name}, candidates alone": Case(partial(_encode, *size), partial(_candidates_alone, *size), repeats)
    for name, (*size, repeats) in SIZES.items()
} | {
    "14 bits, torch": Case(partial(_encode, 886, 14), partial(_torch, 886, 14), repeats=5),
    "decoding, .npz": Case(_decode, _read),
    "6,500,000 normal draws, jax.random": Case(partial(_draws, "ours"), partial(_draws, "jax")),
}

if __name__ == "__main__":
    main("coding", CASES)
