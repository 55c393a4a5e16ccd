"""One training step of a LoRA in MiniLM, beside Hugging Face's PEFT on the same weights: 32 texts of 128 tokens.

Rank 8 at queries and values of all six layers, a linear classifier over the mean of a text's tokens, cross entropy, and
Adam for both. PyTorch runs on a GPU where JAX does. Microbatches are of ours alone: PEFT's step gained no time by them.
The last case is ours on both sides: what a penalty costs must not grow with the tasks.
``python -m experiments.benchmarks.adapter_step``
"""

from functools import partial

import numpy as np

from experiments.benchmarks.harness import Case, Step, main
from experiments.card import Card

CARDS = {
    "": Card(
        "6 min",
        "LoRA and OA-Adapter 0.7 to 0.95 times as fast as PEFT, as fast in microbatches; a penalty no dearer at the "
        "50th task",
    )
}
BATCH, LENGTH, CLASSES, RANK, ALPHA = 32, 128, 10, 8, 16


def _batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and labels [B]."""
    rng = np.random.default_rng(0)
    return rng.integers(1000, 30_000, (BATCH, LENGTH)), rng.integers(0, CLASSES, BATCH)


def _ours(sequential: bool, microbatches: int = 1) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    from jaxcl import adapters, continual, nets
    from jaxcl.adapters import LayerFunction
    from jaxcl.typing import PyTree

    tokens, labels = map(jnp.asarray, _batch())
    batch = continual.Batch(tokens, labels, jnp.ones(BATCH), jnp.ones((BATCH, CLASSES), bool), jnp.int32(0))
    net, params = nets.load_bert(nets.minilm_folder())

    def layers(function: LayerFunction, tokens: jax.Array) -> jax.Array:
        mask = jnp.ones(tokens.shape, bool)
        vectors: jax.Array = nets.through_layers(function, lambda: net.apply(params, tokens, mask))
        return nets.mean_over_tokens(vectors, mask)

    if sequential:
        method = adapters.oa_adapter(lambda path: path.endswith(("attention_output/kernel", "/output/kernel")), 16, 15)
    else:
        method = adapters.lora(lambda path: path.endswith(("/query/kernel", "/value/kernel")), RANK, alpha=ALPHA)
    objective, tx = continual.classification(layers, lambda head, features: features @ head), optax.adam(1e-3)
    strategy = continual.in_microbatches(continual.adapted_network(method, params, objective), microbatches)
    adapter, state = method.init(jax.random.key(0), params)
    trained = continual.Adapted(adapter, jnp.zeros((net.width, CLASSES)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(trained: continual.Adapted, opt_state: PyTree) -> tuple[continual.Adapted, PyTree]:
        grads, _ = strategy.gradients(jax.random.key(0), trained, state, batch)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trained, updates), opt_state

    carried = jax.block_until_ready((trained, tx.init(trained)))

    def step() -> None:
        nonlocal carried
        carried = jax.block_until_ready(train(*carried))

    return step


def _penalty(tasks: int) -> Step:
    """The gradient of OA-Adapter's penalty in MiniLM's last layer when all tasks but one are done."""
    import jax

    from jaxcl import adapters, nets

    _, params = nets.load_bert(nets.minilm_folder())
    method = adapters.oa_adapter(
        lambda path: "layers_5" in path and path.endswith("output/kernel"), 16, tasks, orthogonal_to="outputs",
        strength=1.0, protected=384,
    )  # fmt: skip
    adapter, state = method.init(jax.random.key(0), params)
    commit = jax.jit(method.commit)
    for task in range(tasks - 1):
        moved = {
            path: own._replace(up=jax.random.normal(jax.random.key(task), own.up.shape))
            for path, own in adapter.items()
        }
        adapter, state = commit(jax.random.key(task), moved, state)
    adapter = {path: own._replace(up=own.up + 1) for path, own in adapter.items()}
    gradient = jax.jit(jax.grad(lambda adapter, state: method.penalty(adapter, state)[0]))

    def step() -> None:
        jax.block_until_ready(gradient(adapter, state))

    return step


def _peft() -> Step:
    import jax
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from transformers import BertModel

    from jaxcl import nets

    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    backbone = BertModel.from_pretrained(nets.minilm_folder(), add_pooling_layer=False)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["query", "value"])
    net = get_peft_model(backbone, settings).to(device)
    head = torch.nn.Linear(backbone.config.hidden_size, CLASSES, bias=False).to(device)
    trained = [leaf for leaf in net.parameters() if leaf.requires_grad] + list(head.parameters())
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    tokens, labels = (torch.from_numpy(part).long().to(device) for part in _batch())

    def step() -> None:
        optimizer.zero_grad()
        vectors = net(input_ids=tokens).last_hidden_state
        F.cross_entropy(head(vectors.mean(dim=1)), labels).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


CASES = {
    "LoRA, rank 8, queries and values": Case(partial(_ours, False), _peft, repeats=7),
    "LoRA, ours in 4 microbatches": Case(partial(_ours, False, 4), _peft, repeats=7),
    "OA-Adapter, rank 16, both blocks; PEFT's LoRA": Case(partial(_ours, True), _peft, repeats=7),
    "OA-Adapter in 4 microbatches; PEFT's LoRA": Case(partial(_ours, True, 4), _peft, repeats=7),
    "OA-Adapter's penalty, 50th task; 2nd": Case(partial(_penalty, 50), partial(_penalty, 2), repeats=50),
}

if __name__ == "__main__":
    main("adapter_step", CASES)
