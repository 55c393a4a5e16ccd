"""A masked prior over the tokens of a trained tokenizer, as the tokenizer experiments fit and sample one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxcl.continual.checkpoints import Checkpoint, Checkpoints
from jaxcl.continual.sharding import Layout
from jaxcl.masked_prior import masked_prior
from jaxcl.nets import TokenTransformer
from jaxcl.typing import Array, Key, PyTree

WIDEST = 1024  # outputs of a head: larger codebooks are predicted by the digits of their indices
BATCH_SIZE = 64
SAMPLING_STEPS = 16
TEMPERATURE = 0.9


def sampled_tokens(
    key: Key, tokens: np.ndarray, codes: int, count: int, *, steps: int, checkpoint: Checkpoint
) -> tuple[Array, float]:
    """Grids drawn from a prior that was trained on others, and the loss of the last step in nats a hidden token.

    Args:
        key: consumed.
        tokens: [N, T] int32, of the training set.
        codes: K.
        count: how many grids to draw.
        steps: of training, Adam falling from 1e-3 along a cosine.
        checkpoint: where training is kept, so that it can be broken off.

    Returns:
        ([count, T] int32, the loss).
    """
    length = tokens.shape[1]
    network = TokenTransformer(codes, digits=math.ceil(math.log(codes) / math.log(WIDEST)))
    prior = masked_prior(network, codes, length)
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    init_key, step_key, sample_key = jax.random.split(key, 3)

    @jax.jit
    def step(key: Key, params: PyTree, moments: PyTree, batch: Array) -> tuple[PyTree, PyTree, Array]:
        def total(params: PyTree) -> Array:
            return prior.loss(key, params, batch).loss.mean()

        loss, gradients = jax.value_and_grad(total)(params)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def start(key: Key) -> tuple[PyTree, PyTree]:
        params = prior.init(key)
        return params, tx.init(params)

    keeper = Checkpoints(checkpoint, "prior", {"steps": steps, "codes": codes}, alone=True)
    record: dict[str, Any] = {"step": 0, "loss": math.nan}
    try:
        restored = keeper.restore(jax.eval_shape(start, init_key), Layout(None))
        if restored is None:
            params, moments = jax.jit(start)(init_key)
        else:
            (params, moments), record = restored
        with tqdm(desc="prior", total=steps, initial=record["step"], unit="step", dynamic_ncols=True) as bar:
            for now in range(record["step"], steps):
                rows = np.random.default_rng(now).choice(len(tokens), min(BATCH_SIZE, len(tokens)), replace=False)
                own_key = jax.random.fold_in(step_key, now)
                params, moments, loss = step(own_key, params, moments, jnp.asarray(tokens[rows]))
                bar.update()
                if keeper.due() or now + 1 == steps:
                    record = {"step": now + 1, "loss": float(loss)}
                    bar.set_postfix({"nats a token": f"{record['loss']:.3f}"}, refresh=False)
                    keeper.save((params, moments), record)
    finally:
        keeper.close()
    drawn = prior.sample(sample_key, params, count, steps=min(SAMPLING_STEPS, length), temperature=TEMPERATURE)
    return drawn, record["loss"]
