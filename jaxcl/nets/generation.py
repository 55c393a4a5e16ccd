"""Greedy decoding: the likeliest token, one after the other, with the keys and values of earlier ones kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_count


class KeysValues(NamedTuple):
    """Keys and values of L tokens, of which some may be yet to come."""

    keys: Array  # [B, L, heads, W]
    values: Array  # [B, L, heads, W]

    def with_room(self, tokens: int) -> "KeysValues":
        """The same before zeros for so many more tokens: [B, L + tokens, heads, W]."""
        return KeysValues(*(jnp.pad(part, ((0, 0), (0, tokens), (0, 0), (0, 0))) for part in self))

    def put(self, new: "KeysValues", positions: Array) -> "KeysValues":
        """The same with those of U new tokens, [B, U, heads, W], at positions [B, U] or [U], all of them below L."""
        positions = jnp.broadcast_to(positions, new.keys.shape[:2])
        # A scatter in each text: one that runs along B as well could not stay on a device's share of the texts.
        put = jax.vmap(lambda part, added, places: part.at[places].set(added))
        return KeysValues(*(put(part, added, positions) for part, added in zip(self, new, strict=True)))


def greedy_decode(
    apply: Callable[..., Any],
    params: PyTree,
    tokens: Array,
    mask: Array | None = None,
    *,
    length: int,
    end: ArrayLike | int | Sequence[int],
    padding: int = 0,
) -> Array:
    """Tokens [B, length], int32, each the likeliest after those before it; once `end` is chosen, only `padding` comes.

    Decoding stops as soon as all texts have ended. Under `jit`, `apply` and `length` are static.

    Args:
        apply: `net.apply` of a `nets.T5` or `nets.Llama`, or a function around it that hands `method` on.
        params: of the network.
        tokens: [B, T] int32, what T5's encoder reads, or what Llama continues.
        mask: [B, T], true or 1 where there is a token; all if None. Llama's texts start with a token, and their padding
            is on the right.
        length: most tokens to choose.
        end: the token that ends a text, or several, any of which does.
        padding: what stands after it; a token, or less than 0.

    Raises:
        ValueError: a length below 1, tokens of another rank, an end that is no token.
    """
    check_count("length", length, 1)
    ends = jnp.asarray([] if end is None else end)
    if not jnp.issubdtype(ends.dtype, jnp.integer):
        raise bad_argument("end", end, "pass the token that ends a text, or some")

    def choose(logits: Array, ended: Array) -> tuple[Array, Array]:
        token = jnp.where(ended, padding, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return token, ended | jnp.isin(token, ends)

    def unfinished(state: tuple[Array, Array, Array, Array, PyTree]) -> Array:
        count, _, _, ended, _ = state
        return (count < length) & ~ended.all()

    def step(state: tuple[Array, Array, Array, Array, PyTree]) -> tuple[Array, Array, Array, Array, PyTree]:
        count, chosen, token, ended, cache = state
        logits, cache = apply(params, jnp.maximum(token, 0), cache, method="step")  # of texts that ended, whichever
        token, ended = choose(logits, ended)
        return count + 1, chosen.at[:, count].set(token), token, ended, cache

    logits, cache = apply(params, tokens, mask, length, method="start")
    token, ended = choose(logits, jnp.zeros(len(tokens), bool))
    chosen = jnp.full((len(tokens), length), padding, jnp.int32).at[:, 0].set(token)
    _, chosen, *_ = jax.lax.while_loop(unfinished, step, (jnp.ones((), jnp.int32), chosen, token, ended, cache))
    return chosen
