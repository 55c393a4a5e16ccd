"""One training step of the key-value bottleneck at the published size, beside the dense rule in PyTorch.

256 codebooks of 4,096 pairs, key width 14, 10 classes, batches of 256. Ours trains with sparse updates, on cached
indices or, where it says so, on heads that it looks up in the step; or in the dual (bottleneck.train_votes), on cached
indices of a task of 10,000 examples, a step a call. The dense rule computes all distances, fetches, and forms, clips
and applies a gradient of the whole table.
Its distances come in two forms: the authors', and the fastest we know, one matrix product with argmax.
Both give the same values (a test shows it). ``python -m experiments.benchmarks.dkvb_step``
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card
from jaxcl.typing import PyTree

CARDS = {
    "": Card(
        "4 min",
        "beside the authors' rule in PyTorch: in the dual 1,187 times as fast, sparse 785, sparse without a cache 18",
    )
}
CODEBOOKS, PAIRS, KEY_WIDTH, CLASSES, BATCH, EXAMPLES = 256, 4096, 14, 10, 256, 2048
TASK_EXAMPLES = 10_000  # in the dual


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [C, J, W], heads [N, C, W] and labels [N]."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((CODEBOOKS, PAIRS, KEY_WIDTH), np.float32)
    heads = rng.standard_normal((EXAMPLES, CODEBOOKS, KEY_WIDTH), np.float32)
    return keys, heads, rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)


def _ours(value_width: int, *, cached: bool) -> Step:
    import jax
    import jax.numpy as jnp

    from jaxcl import bottleneck, continual, trees

    keys, heads, labels = _inputs()
    layer = bottleneck.discrete_key_value_bottleneck(
        CODEBOOKS * KEY_WIDTH, value_width, codebooks=CODEBOOKS, pairs=PAIRS, key_width=KEY_WIDTH, projection="chunk"
    )
    params, state = layer.init(jax.random.key(0))
    state = state._replace(keys=state.keys._replace(codebook=jnp.asarray(keys)))
    lookup = jax.jit(layer.lookup)
    parts = [part.reshape(len(part), -1) for part in np.split(heads, EXAMPLES // BATCH)]
    inputs = jnp.concatenate([lookup(params, state, x).astype(jnp.uint16) if cached else x for x in parts])
    strategy, tx = continual.key_value_bottleneck(layer, classes=CLASSES), bottleneck.sparse_sgd(0.3, max_norm=1.0)
    classes, eligible = jnp.asarray(labels), jnp.ones((BATCH, CLASSES), bool)
    batches = jax.random.permutation(jax.random.key(1), EXAMPLES).reshape(-1, BATCH)

    @partial(jax.jit, donate_argnums=0)
    def train(params: PyTree, state: bottleneck.KeyState, number: int) -> PyTree:
        rows = batches[number]
        indices = inputs[rows] if cached else layer.lookup(params, state, inputs[rows])
        batch = continual.Batch(indices, classes[rows], jnp.ones(BATCH), eligible, jnp.int32(0))
        grads, _ = strategy.gradients(jax.random.key(0), params, (), batch)
        updates, _ = tx.update(grads, tx.init(params), params)
        return trees.apply_updates(params, updates)

    count = 0

    def step() -> None:
        nonlocal params, count
        params = jax.block_until_ready(train(params, state, count % len(batches)))
        count += 1

    return step


def _dual() -> Step:
    import jax
    import jax.numpy as jnp

    from jaxcl import bottleneck

    rng = np.random.default_rng(0)
    indices = rng.integers(0, PAIRS, (TASK_EXAMPLES, CODEBOOKS, 1)).astype(np.uint16)
    labels = rng.integers(0, CLASSES, TASK_EXAMPLES).astype(np.int32)
    params = {"values": jnp.zeros((CODEBOOKS, PAIRS, CLASSES))}
    votes = bottleneck.begin_votes(params, indices, labels, classes=CLASSES)
    orders = jax.random.permutation(jax.random.key(1), TASK_EXAMPLES)[: TASK_EXAMPLES // BATCH * BATCH]
    batches = orders.reshape(-1, 1, BATCH).astype(jnp.int32)
    count = 0

    def step() -> None:
        nonlocal votes, count
        votes, loss = bottleneck.train_votes(votes, batches[count % len(batches)], learning_rate=0.3)
        jax.block_until_ready(loss)
        count += 1

    return step


def dense_rule(distances: str) -> Step:
    """A step in PyTorch; distances are "full", the authors', or "matmul", the fastest form we know."""
    import torch
    from torch import nn

    keys, heads, labels = map(torch.from_numpy, _inputs())
    labels = labels.long()
    values = nn.Parameter(torch.zeros(CODEBOOKS, PAIRS, CLASSES))
    optimizer = torch.optim.SGD([values], lr=0.3)
    codebook = torch.arange(CODEBOOKS)[:, None]
    half_norms = 0.5 * (keys * keys).sum(-1)
    count = 0

    def nearest(x: torch.Tensor) -> torch.Tensor:
        """[C, B] from heads [C, B, W]."""
        if distances == "full":  # as the authors' code has it: every squared distance, and then the best of them
            products = torch.einsum("cbw,cjw->cbj", x, keys)
            negative = -((x * x).sum(-1, keepdim=True) - 2 * products + 2 * half_norms[:, None])
            return negative.topk(1).indices[..., 0]
        return torch.baddbmm(-half_norms[:, None], x, keys.transpose(1, 2)).argmax(-1)

    def step() -> None:
        nonlocal count
        rows = torch.arange(count * BATCH, (count + 1) * BATCH) % EXAMPLES
        count += 1
        logits = values[codebook, nearest(heads[rows].transpose(0, 1))].mean(0)
        loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([values], 1.0)
        optimizer.step()

    return step


_OURS: dict[str, tuple[Callable[[], Step], int]] = {
    "values of 10 floats": (partial(_ours, 10, cached=True), 30),
    "values of 16 floats": (partial(_ours, 16, cached=True), 30),
    "in the dual": (_dual, 30),
    "values of 16 floats, no cache": (partial(_ours, 16, cached=False), 3),
}
CASES = {
    f"{name}; torch, {form}": Case(ours, partial(dense_rule, distances), repeats=7, ours_per_round=each)
    for name, (ours, each) in _OURS.items()
    for form, distances in (("authors' distances", "full"), ("one matmul", "matmul"))
}

if __name__ == "__main__":
    main("dkvb_step", CASES)
