"""The frozen networks that the adapter experiment adapts, and the streams of tasks that they meet."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.text_tasks import TextTask, lower_layers, text_streams, token_streams
from jaxcl import adapters, continual, data, nets
from jaxcl.adapters import LayerFunction
from jaxcl.continual import Adapted, Batch, Objective, Stream, streams
from jaxcl.nearest import normalise
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_between

TEMPERATURE = 0.05  # of the cosine classifier
UNCHANGED = adapters.layer_function({}, "parallel")  # leaves all layers as they are
_QUERIES_VALUES = ("/query/kernel", "/value/kernel", "/cross_query/kernel", "/cross_value/kernel")
_ENDS_OF_BLOCKS = ("/attention_output/kernel", "/cross_output/kernel", "/output/kernel")


def queries_and_values(path: str) -> bool:
    """Sites of LoRA and O-LoRA, by path, in a network of `nets`."""
    return path.endswith(_QUERIES_VALUES)


def ends_of_blocks(path: str) -> bool:
    """Sites of OA-Adapter and other adapters after attention and after the layers at each token."""
    return path.endswith(_ENDS_OF_BLOCKS)


class Body(NamedTuple):
    """A network and what is learnt of it."""

    params: PyTree  # of the network, frozen
    objective: Callable[[PyTree], Objective]  # of such parameters
    head: Callable[[Key], PyTree]  # what the objective's head begins as
    features: Callable[[PyTree], Callable[[LayerFunction, Array], Array]] | None
    # of such parameters, what (function, inputs [B, ...]) are made into, [B, D]; None where answers are words
    counted: Callable[[str, Batch], Array] | None = None  # as `continual.adapted_network` takes it


class Cosines(NamedTuple):
    """The classifier."""

    kernel: Array  # [D, K]
    offset: Array  # [K], nats; it is not trained


def cosine_logits(head: Cosines, features: Array) -> Array:
    """Cosines of features [B, D] and the kernel's columns, over the temperature, and the offset: [B, K]."""
    cosines = normalise(features) @ normalise(head.kernel.T).T
    return cosines / TEMPERATURE + jax.lax.stop_gradient(head.offset)


def _classifying(network: nn.Module, params: PyTree, width: int, classes: int, counted: Any = None) -> Body:
    """A network from inputs to features [B, D], under a cosine classifier."""

    def features(params: PyTree) -> Callable[[LayerFunction, Array], Array]:
        def layers(function: LayerFunction, inputs: Array) -> Array:
            found: Array = nets.through_layers(function, lambda: network.apply(params, inputs))
            return found

        return layers

    def head(key: Key) -> Cosines:
        return Cosines(jax.random.normal(key, (width, classes)) / width**0.5, jnp.zeros(classes))

    return Body(
        params, lambda params: continual.classification(features(params), cosine_logits), head, features, counted
    )


def upper_layers(
    tasks: Sequence[TextTask], orders: Sequence[Sequence[int]], *, adapted: int, length: int, folder: Path
) -> tuple[Body, list[Stream]]:
    """MiniLM's last layers, and a stream an order of what those before make of texts.

    Args:
        tasks: of texts.
        orders: of the tasks.
        adapted: how many layers are the last.
        length: tokens of a text, at most.
        folder: keeps what the layers before make.
    """
    network, params = nets.load_bert(nets.minilm_folder())
    check_between("adapted_layers", adapted, 1, network.layers)
    first = network.layers - adapted
    upper = nets.BERTLayers(
        first, network.layers - 1, network.heads, network.hidden, network.epsilon, network.activation
    )
    own = {f"layers_{number}": params["params"][f"layers_{number}"] for number in range(first, network.layers)}
    body = _classifying(
        _Pooled(upper), {"params": {"layers": own}}, network.width, len(tasks[0].train.label_names),
        lambda _, batch: _real(batch.inputs),
    )  # fmt: skip
    encoder = lower_layers(network, params, first)
    return body, text_streams(tasks, orders, encoder, length=length, folder=folder)


def _real(vectors: Array) -> Array:
    """[B, T], 1 where vectors [B, T, D] are not 0: a token."""
    return jnp.any(vectors != 0, axis=-1).astype(jnp.float32)


class _Pooled(nn.Module):
    """The mean over tokens of what layers make of vectors [B, T, D]."""

    layers: nn.Module

    def __call__(self, vectors: Array) -> Array:
        mask = _real(vectors)
        pooled: Array = nets.mean_over_tokens(self.layers(vectors.astype(jnp.float32), mask), mask)
        return pooled


def in_words(
    model: str, tasks: Sequence[TextTask], orders: Sequence[Sequence[int]], *, length: int
) -> tuple[Body, list[Stream]]:
    """A T5 or Llama that answers with a class's name, and a stream an order of texts' tokens.

    Args:
        model: t5:PATH or llama:PATH, a Hugging Face folder with tokenizer.json.
        tasks: of texts.
        orders: of the tasks.
        length: tokens of a text, at most.

    Raises:
        ValueError: as the loaders and `data.tokenize`.
    """
    kind, _, place = model.partition(":")
    loaders: dict[str, Callable[..., tuple[Any, PyTree]]] = {"t5": nets.load_t5, "llama": nets.load_llama}
    network, params = loaders[kind](place)
    ends = json.loads((Path(place) / "config.json").read_text()).get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends  # later Llamas have several
    end = {"t5": 1, "llama": 2}[kind] if end in (None, []) else end
    tokenizer, names = Path(place) / "tokenizer.json", tasks[0].train.label_names
    bare = data.tokenize(names, tokenizer, length=32, special=False, fill=nets.NO_TOKEN)
    counts = (bare != nets.NO_TOKEN).sum(axis=1)
    answers = np.full((len(names), counts.max() + 1), nets.NO_TOKEN, np.int32)
    for answer, tokens, count in zip(answers, bare, counts, strict=True):
        answer[:count], answer[count] = tokens[:count], end
    if len(np.unique(answers, axis=0)) != len(names):
        raise bad_argument("model", model, f"its tokenizer does not tell the labels apart: {names}")
    body = Body(
        params, lambda params: nets.text_to_text(network, params, answers, end=end), lambda key: (), None,
        nets.real_tokens(network, answers),
    )  # fmt: skip
    made = token_streams(tasks, orders, tokenizer, length=length, classes=len(names) + 1)
    largest = max(int(np.asarray(tokens).max()) for tokens in (answers, made[0].train.inputs, made[0].test.inputs))
    if largest >= network.vocabulary:
        raise bad_argument(
            "model",
            model,
            f"its tokenizer has token {largest}, the network {network.vocabulary}: they do not belong together",
        )
    return body, made


def permuted_digits(*, tasks: int, seeds: int, layers: int, epochs: int, validation: bool) -> tuple[Body, list[Stream]]:
    """A transformer over the rows of digits, trained on them as they are, and a stream of permuted ones a seed.

    Args:
        tasks: of a stream.
        seeds: how many streams.
        layers: of the transformer, all of them adapted.
        epochs: passes over upright digits.
        validation: test on a part of the training set, held out.
    """
    split = data.digits()
    if validation:
        split = data.Split(*data.hold_out(split.train, share=0.2))
    split = data.Split(*(part._replace(inputs=np.asarray(part.inputs, np.float32) / 16) for part in split))
    network = _Rows(layers=layers)
    upright = streams.joint(streams.class_incremental(None, *split, classes_per_task=10))
    head_key, key = jax.random.split(jax.random.key(2**20))
    body = _classifying(network, network.init(key, split.train.inputs[np.arange(1)]), network.width, 10)

    def apply(params: Adapted, images: Array) -> Array:
        return body.objective(params.adapter).predict(UNCHANGED, params.head, images)

    trained = continual.run(
        key, continual.naive(apply), optax.adam(3e-3), Adapted(body.params, body.head(head_key)), upright,
        epochs=epochs, batch_size=32, steps_per_call=64,
    )  # fmt: skip
    # Not the seed's own key, of which the callers make those of training.
    stream_keys = jax.random.split(jax.random.key(2**20 + 1), seeds)
    own = [streams.permuted(stream_key, *split, tasks=tasks) for stream_key in stream_keys]
    return body._replace(params=trained.params.adapter), own


class _Rows(nn.Module):
    """A small transformer over the rows of images [B, H, W], to features [B, D]."""

    width: int = 32
    layers: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = nn.Dense(self.width, name="embedding")(images)
        x += self.param("positions", nn.initializers.normal(0.1), x.shape[1:])
        layers = nets.BERTLayers(0, self.layers - 1, heads=4, hidden=64, epsilon=1e-6, name="layers")
        return layers(x, jnp.ones(x.shape[:2], bool)).mean(axis=1)
