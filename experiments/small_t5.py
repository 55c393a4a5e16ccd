"""Trains a small T5, and its tokenizer, on the texts of the continual-learning tasks: a model for --model t5:PATH.

It learns to write the words that are left out of a text (Raffel et al. 2020, section 3.1.4, one span a text), and no
labels. What it leaves is a folder as Hugging Face has them: config.json, model.safetensors and tokenizer.json.

python -m experiments.small_t5 --out runs/small_t5
python -m experiments.oa_adapter --data short --model t5:runs/small_t5 --methods lora o_lora oa_outputs
"""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from experiments.card import Card
from experiments.common import run_command
from experiments.text_tasks import ORDERS
from jaxcl import data, files, nets
from jaxcl.continual import Checkpoint, sharding
from jaxcl.continual.checkpoints import Checkpoints
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least

CARDS = {"": Card("17 min", "a folder with a T5 that has seen no labels: 5.0 nats a token in the end, 8.9 at first")}
PADDING, END, UNKNOWN, LEFT_OUT = range(4)
SPECIAL = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
SPAN = 6  # tokens left out of a text, and their end


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train."""

    tasks: tuple[str, ...] = ORDERS["long"][0]
    """Whose training texts to read, in the folder that JAXCL_DATA names."""
    vocabulary: int = 4000
    """Tokens."""
    width: int = 128
    """Of a token's vector."""
    layers: int = 2
    """Of the encoder, and of the decoder."""
    length: int = 64
    """Tokens of a text, at most."""
    steps: int = 3000
    """Of training."""
    batch_size: int = 64
    """Texts in a step."""
    learning_rate: float = 2e-3
    """Of Adam, at most: it rises over the first tenth and falls along a cosine."""
    seed: int = 0
    """Of parameters and batches."""
    out: Path = Path("runs/small_t5")
    """The folder. If it holds an unfinished training with the same settings, that goes on."""
    checkpoint_seconds: float = 60.0
    """How often to save the state: so much is lost at most if the run is killed."""


def main(argv: Sequence[str] | None = None) -> float:
    """Trains and writes the folder; returns the mean loss of the last tenth of the steps, in nats a token."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    check_at_least("steps", config.steps, 10)
    check_at_least("length", config.length, 2 * SPAN)
    if (config.out / "model.safetensors").exists():
        raise bad_argument("out", config.out, "it holds a model: remove it, or choose another folder")
    texts = [text for task in config.tasks for text in data.cl_text(task)[0].texts]
    config.out.mkdir(parents=True, exist_ok=True)
    _train_tokenizer(texts, config.vocabulary, config.out / "tokenizer.json")
    all_tokens = data.tokenize(texts, config.out / "tokenizer.json", length=config.length)
    tokens = jnp.asarray(all_tokens[(all_tokens != PADDING).sum(axis=1) > 2 * SPAN])
    net = nets.T5(
        config.vocabulary, config.width, config.layers, config.layers, 4, config.width // 4, 2 * config.width,
    )  # fmt: skip
    key, init_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(net.init)(init_key, tokens[:1], tokens[:1, :SPAN])
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.steps // 10, config.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params: PyTree, shown: Array, answers: Array) -> Array:
        before = jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]
        logits = net.apply(params, shown, before, shown != PADDING)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(key: Key, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, Array]:
        row_key, span_key = jax.random.split(key)
        rows = jax.random.choice(row_key, len(tokens), (config.batch_size,))
        value, gradients = jax.value_and_grad(loss)(params, *_left_out(span_key, tokens[rows]))
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    identity = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    del identity["out"], identity["checkpoint_seconds"]  # not what the run is
    keeper = Checkpoints(
        Checkpoint(config.out / "checkpoints", config.checkpoint_seconds), "small_t5", identity, alone=True
    )
    state, losses = (params, tx.init(params)), []
    with closing(keeper), tqdm(total=config.steps, desc="small T5", unit="step", dynamic_ncols=True) as bar:
        if (restored := keeper.restore(jax.eval_shape(lambda: state), sharding.Layout(None))) is not None:
            state, losses = restored[0], restored[1]["losses"]
            bar.update(len(losses))
        for number in range(len(losses), config.steps):
            *state, value = step(jax.random.fold_in(key, number), *state)
            losses.append(float(value))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"loss: got {losses[-1]} in step {number + 1}; lower --learning-rate")
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}", refresh=False)
            bar.update()
            if keeper.due():
                keeper.save(tuple(state), {"losses": losses})
    nets.save_t5(config.out, net, state[0])
    settled = float(np.mean(losses[-config.steps // 10 :]))
    print(f"Wrote {config.out}: {settled:.3f} nats a token at the end, {losses[0]:.3f} at first.")
    return settled


def _train_tokenizer(texts: Sequence[str], vocabulary: int, path: Path) -> None:
    """Byte pairs that are often together, from the texts; a text ends with a token of its own."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('a tokenizer takes tokenizers: pip install "jaxcl[text]"') from error
    tokenizer: Any = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    if tokenizer.get_vocab_size() > vocabulary:
        raise bad_argument(
            "vocabulary", vocabulary, f"pass {tokenizer.get_vocab_size()} or more: bytes alone take that"
        )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    files.write_atomic(path, tokenizer.to_str())


def _left_out(key: Key, tokens: Array) -> tuple[Array, Array]:
    """Texts [B, T] with a token for the span that is left out, and those spans [B, SPAN] with their end."""

    def one(key: Key, text: Array) -> tuple[Array, Array]:
        length, count = (text != PADDING).sum(), SPAN - 1
        start = jax.random.randint(key, (), 0, length - count)
        place = jnp.arange(len(text))
        shown = jnp.where(place < start, text, jnp.roll(text, 1 - count))  # what comes after moves to the left
        shown = jnp.where(place == start, LEFT_OUT, jnp.where(place >= length - count + 1, PADDING, shown))
        return shown, jnp.append(jax.lax.dynamic_slice(text, (start,), (count,)), END)

    return jax.vmap(one)(jax.random.split(key, len(tokens)), tokens)


if __name__ == "__main__":
    run_command(main)
