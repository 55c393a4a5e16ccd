"""Classes answered in words: T5 writes a class's name, Llama continues a text with it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.adapters import LayerFunction
from jaxcl.continual.strategies import Batch, Metrics, Objective
from jaxcl.nets.generation import greedy_decode
from jaxcl.nets.interception import through_layers
from jaxcl.nets.llama import Llama
from jaxcl.nets.t5 import T5
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_rank

NO_TOKEN = -1  # fills texts and answers up; 0 is a token to some, as to Llama 3


def text_to_text(network: T5 | Llama, params: PyTree, answers: ArrayLike, *, end: int = 1) -> Objective:
    """The objective of a network that answers with the tokens of a class's name, as T5 and O-LoRA have it.

    The loss is the cross entropy of the answers' tokens, mean over tokens. At test time tokens are chosen greedily, and
    a class is the answer if they are all of its name's; if they are no class's, that of number K is, to which no
    example belongs: streams are made with ``classes=K + 1``. There is no head: its parameters are ``()``.

    Args:
        network: with the parameters `params`; inputs are tokens [B, T], `NO_TOKEN` where there is
            none, on the right.
        params: of the network.
        answers: [K, U] int32, the tokens of each class's name, `end` after them and `NO_TOKEN` then.
        end: the token that ends an answer, 1 for T5, 2 for Llama.

    Raises:
        ValueError: answers of another rank, one that is short and does not end so, or two that are the same.
    """
    check_rank("answers", answers, 2)
    _check_ends(np.asarray(answers), end)
    names = jnp.asarray(answers, jnp.int32)

    def loss(function: LayerFunction, head: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        targets = names[batch.labels]
        logits = through_layers(function, lambda: _forced(network, params, batch.inputs, targets))
        real = (targets != NO_TOKEN) * batch.weights[:, None]
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, _readable(targets)) * real
        value = terms.sum() / jnp.maximum(real.sum(), 1)
        right = jnp.all((logits.argmax(axis=-1) == targets) | (targets == NO_TOKEN), axis=1)
        accuracy = jnp.sum(right * batch.weights) / jnp.maximum(batch.weights.sum(), 1)
        return value, {"loss": value, "accuracy": accuracy}

    def predict(function: LayerFunction, head: PyTree, inputs: Array) -> Array:
        def apply(*arguments: Any, **options: Any) -> Any:
            return through_layers(function, lambda: network.apply(*arguments, **options))

        written = greedy_decode(
            apply, params, _readable(inputs), inputs != NO_TOKEN, length=names.shape[1], end=end, padding=NO_TOKEN
        )
        named = jnp.all(written[:, None] == names, axis=-1).astype(jnp.float32)
        return jnp.concatenate([named, jnp.full((len(inputs), 1), 0.5)], axis=1)

    return Objective(loss, predict)


def real_tokens(network: T5 | Llama, answers: ArrayLike) -> Callable[[str, Batch], Array]:
    """(path of a layer, batch) -> 1 for each vector [B, ...] there that is a token's, 0 for those that fill up.

    As `continual.adapted_network` takes it, for `text_to_text` with the same answers [K, U].
    """
    names = jnp.asarray(answers, jnp.int32)

    def real(path: str, batch: Batch) -> Array:
        targets = names[batch.labels]
        if isinstance(network, Llama):
            return (_continued(batch.inputs, targets) != NO_TOKEN).astype(jnp.float32)
        of_decoder = path.startswith("params/decoder/") and "/cross_key/" not in path and "/cross_value/" not in path
        return ((targets if of_decoder else batch.inputs) != NO_TOKEN).astype(jnp.float32)

    return real


def _check_ends(answers: np.ndarray, end: int) -> None:
    """Raises ValueError if answers [K, U] could never be written, or one of them is two classes'."""
    ends = answers == end
    after = np.cumsum(ends, axis=1) - ends > 0  # nowhere in an answer that takes all U tokens
    wrong = ((answers == NO_TOKEN) != after) | (answers < NO_TOKEN)
    for number in np.flatnonzero(wrong.any(axis=1)):
        raise bad_argument(
            "answers", f"{answers[number].tolist()} for class {number}",
            f"put the end, {end}, after its tokens and {NO_TOKEN} wherever there is none",
        )  # fmt: skip
    if len(np.unique(answers, axis=0)) < len(answers):
        raise bad_argument("answers", "the same for two classes", "give each class a name of its own")


def _forced(network: T5 | Llama, params: PyTree, tokens: Array, targets: Array) -> Array:
    """Logits [B, U, K] of the targets [B, U], each given those before it."""
    if isinstance(network, T5):
        before = jnp.pad(_readable(targets), ((0, 0), (1, 0)))[:, :-1]
        logits: Array = network.apply(params, _readable(tokens), before, tokens != NO_TOKEN)  # type: ignore[assignment]
        return logits
    of_all: Array = network.apply(params, _readable(_continued(tokens, targets)))  # type: ignore[assignment]
    places = _lengths(tokens)[:, None] - 1 + jnp.arange(targets.shape[1])
    return jnp.take_along_axis(of_all, places[..., None], axis=1)


def _continued(tokens: Array, targets: Array) -> Array:
    """Tokens [B, T] with targets [B, U] right after the last of each text, [B, T + U]."""
    room = jnp.pad(tokens, ((0, 0), (0, targets.shape[1])), constant_values=NO_TOKEN)
    put = jax.vmap(lambda text, answer, start: jax.lax.dynamic_update_slice(text, answer, (start,)))
    return put(room, targets, _lengths(tokens))


def _readable(tokens: Array) -> Array:
    """Tokens [...] with some token where there is none, for networks, which are told or do not look there."""
    return jnp.maximum(tokens, 0)


def _lengths(tokens: Array) -> Array:
    return (tokens != NO_TOKEN).sum(axis=1)
