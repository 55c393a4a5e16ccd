"""Llama, a Transformer decoder, with published weights."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcl.nets.attention import dot_product_attention
from jaxcl.nets.generation import KeysValues
from jaxcl.nets.weights import is_copy, load_by_name, read_checkpoint, read_config, sources_of
from jaxcl.typing import Array, PyTree, bad_argument, check_choice, check_rank

# {field of Llama, or what is looked at while loading: its name in config.json}
_CONFIG = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "hidden": "intermediate_size",
    "epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "activation": "hidden_act",
    "rotary_base": "rope_theta",
    "rotary": "rope_parameters",
    "older_rotary": "rope_scaling",
}
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
}
# {part of a layer: its tensor's name}
_DENSE = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "intermediate": "mlp.up_proj",
    "output": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "intermediate_norm": "post_attention_layernorm"}
_EMBEDDING = "model.embed_tokens"


class RotaryScaling(NamedTuple):
    """How Llama 3.1 and later turn slowly, for texts longer than those of the first training (config.json: llama3)."""

    factor: float  # how much slower the slowest pairs turn
    slowest: float  # pairs that turn fewer times within `length` are slowed by the whole factor (low_freq_factor)
    fastest: float  # those that turn more often are left alone (high_freq_factor)
    length: int  # tokens of the longest text in the first training (original_max_position_embeddings)


class LlamaCache(NamedTuple):
    """What `Llama.step` needs of earlier tokens."""

    layers: tuple[KeysValues, ...]  # one a layer, each [B, L, key_value_heads, W]
    positions: Array  # [B] int32, where each text's next token goes


class Llama(nn.Module):
    """The decoder of Touvron et al. 2023: a token attends to those before it and itself; normalisation comes first.

    Normalisation is by the root of the mean square, queries and keys are rotated by their positions (Su et al. 2021),
    several heads of queries share one of keys and values (Ainslie et al. 2023), and the layer at each token is gated
    (SwiGLU, Shazeer 2020). There is no dropout and no bias. `nets.load_llama` reads sizes and parameters from a Hugging
    Face folder, `nets.greedy_decode` continues texts.

    Parameters are float32. Softmax and normalisation are computed in float32, whatever `dtype` is.
    """

    vocabulary: int  # K
    width: int  # D
    layers: int
    heads: int
    key_value_heads: int  # each serves heads / key_value_heads heads
    head_width: int  # W
    hidden: int  # width inside a layer
    epsilon: float = 1e-6  # of the normalisation
    rotary_base: float = 10_000.0  # the slowest pair of a head turns by about 1 / rotary_base a token
    rotary_scaling: RotaryScaling | None = None
    tied: bool = False  # whether the head is the embedding
    dtype: DTypeLike = jnp.float32  # of the computation

    def setup(self) -> None:
        """Submodules; raises ValueError for heads that cannot be shared, or cannot be rotated."""
        if self.heads % self.key_value_heads:
            raise bad_argument(
                "heads", self.heads, f"pass a multiple of key_value_heads, which are {self.key_value_heads}"
            )
        if self.head_width % 2:
            raise bad_argument("head_width", self.head_width, "pass an even number: pairs are rotated")
        layer = partial(
            _Layer, self.heads, self.key_value_heads, self.head_width, self.hidden, self.epsilon,
            _frequencies(self.head_width, self.rotary_base, self.rotary_scaling), self.dtype,
        )  # fmt: skip
        self.token_embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        self.blocks = [layer(name=f"layers_{number}") for number in range(self.layers)]
        self.output_norm = nn.RMSNorm(self.epsilon, dtype=self.dtype)
        if not self.tied:
            self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)

    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """Logits [B, T, K], float32, of the token after each of tokens [B, T].

        Args:
            tokens: int32.
            mask: [B, T], true or 1 where there is a token; all if None. Logits of other places mean nothing.

        Raises:
            ValueError: wrong ranks, heads that `key_value_heads` do not divide, an odd width of heads.
        """
        check_rank("tokens", tokens, 2)
        x, _ = self._vectors(tokens, jnp.arange(tokens.shape[1]), mask)
        return self._logits(x)

    def start(self, tokens: Array, mask: Array | None, length: int) -> tuple[Array, LlamaCache]:
        """Logits [B, K] of the token after each text, and the cache with which `length` tokens can be chosen.

        Args:
            tokens: [B, T] int32, padded on the right.
            mask: [B, T], true or 1 where there is a token; all if None. Every text has one.
            length: tokens to choose, of which `step` takes all but the last.
        """
        check_rank("tokens", tokens, 2)
        if mask is not None and not isinstance(mask, jax.core.Tracer):
            real = np.asarray(mask, bool)
            if not real[:, 0].all() or np.any(real[:, 1:] > real[:, :-1]):
                raise bad_argument("mask", "texts with padding before a token", "pad texts on the right")
        x, layers = self._vectors(tokens, jnp.arange(tokens.shape[1]))
        positions = jnp.full(len(tokens), tokens.shape[1]) if mask is None else jnp.asarray(mask, bool).sum(axis=1)
        last = jnp.take_along_axis(x, positions[:, None, None] - 1, axis=1)
        # What is kept of padding is never attended to: it lies after its text's last token, and new tokens replace it.
        cache = LlamaCache(tuple(layer.with_room(length - 1) for layer in layers), positions)
        return self._logits(last)[:, 0], cache

    def step(self, tokens: Array, cache: LlamaCache) -> tuple[Array, LlamaCache]:
        """Logits [B, K] of the token after `tokens` [B], and the cache with these in it; it must have room."""
        x, layers = self._vectors(tokens[:, None], cache.positions[:, None], past=cache.layers)
        return self._logits(x)[:, 0], LlamaCache(layers, cache.positions + 1)

    def _vectors(
        self,
        tokens: Array,
        positions: Array,
        mask: Array | None = None,
        past: tuple[KeysValues, ...] | None = None,
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        """Vectors [B, U, D] before the head of tokens [B, U] at positions [B, U] or [U], and all keys and values."""
        length = tokens.shape[1] if past is None else past[0].keys.shape[1]
        visible = (jnp.arange(length) <= positions[..., None]).reshape(-1, 1, tokens.shape[1], length)
        if mask is not None:
            visible &= jnp.asarray(mask, bool)[:, None, None, :]
        x, layers = self.token_embedding(tokens), []
        for block, earlier in zip(self.blocks, past or (None,) * self.layers, strict=True):
            x, layer = block(x, positions, visible, earlier)
            layers.append(layer)
        return self.output_norm(x), tuple(layers)

    def _logits(self, x: Array) -> Array:
        logits = self.token_embedding.attend(x) if self.tied else self.head(x)
        return logits.astype(jnp.float32)


class _Layer(nn.Module):
    """Attention, then a gated layer at each token, each added to what it was given."""

    heads: int
    key_value_heads: int
    head_width: int
    hidden: int
    epsilon: float
    frequencies: tuple[float, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, positions: Array, visible: Array, past: KeysValues | None) -> tuple[Array, KeysValues]:
        batch, length, width = x.shape
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = partial(nn.RMSNorm, self.epsilon, dtype=self.dtype)

        normal = norm(name="attention_norm")(x)
        query, key, value = (
            dense(heads * self.head_width, name=name)(normal).reshape(batch, length, heads, self.head_width)
            for name, heads in (("query", self.heads), ("key", self.key_value_heads), ("value", self.key_value_heads))
        )
        angles = positions[..., None, None] * jnp.asarray(self.frequencies, jnp.float32)
        query, own = _rotate(query, angles), KeysValues(_rotate(key, angles), value)
        if past is not None:
            own = past.put(own, positions)
        attended = dot_product_attention(query, *own, mask=visible).reshape(batch, length, -1)
        x += dense(width, name="attention_output")(attended)
        normal = norm(name="intermediate_norm")(x)
        inner = nn.silu(dense(self.hidden, name="gate")(normal)) * dense(self.hidden, name="intermediate")(normal)
        return x + dense(width, name="output")(inner), own


def _frequencies(head_width: int, base: float, scaling: RotaryScaling | None) -> tuple[float, ...]:
    """By what angle each pair of a head turns from one token to the next."""
    turns = base ** (-np.arange(0, head_width, 2) / head_width)
    if scaling is not None:
        rounds = scaling.length * turns / (2 * math.pi)
        kept = np.clip((rounds - scaling.slowest) / (scaling.fastest - scaling.slowest), 0, 1)
        turns *= kept + (1 - kept) / scaling.factor
    return tuple(turns.tolist())


def _rotate(x: Array, angles: Array) -> Array:
    """Vectors [B, U, heads, W] whose first half holds the pairs' first entries, turned by angles [(B,) U, 1, W / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def load_llama(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[Llama, PyTree]:
    """A Llama and its parameters from a Hugging Face folder: config.json and model.safetensors or its shards.

    Args:
        folder: holds the files.
        dtype: of the computation; parameters are float32.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: config.json is damaged, lacks a size, is not Llama's or names a rotary embedding or an activation
            unknown; tensors are damaged, or not those that the sizes ask for: one error lists them.
        OSError: a file cannot be read, or is not there.
    """
    config = read_config(folder, "llama", "a Llama", _CONFIG, Llama, _DEFAULTS)
    check_choice("hidden_act", config.pop("activation"), ("silu",))
    rotary, older_rotary = config.pop("rotary"), config.pop("older_rotary")
    base, scaling = _rotary(rotary or older_rotary or {}, config.pop("rotary_base"))
    config["key_value_heads"] = config["key_value_heads"] or config["heads"]
    config["head_width"] = config["head_width"] or config["width"] // config["heads"]
    net = Llama(**config, rotary_base=base, rotary_scaling=scaling, dtype=dtype)
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tensors = read_checkpoint(folder)

    def ignored(name: str) -> bool:
        if net.tied and name == "lm_head.weight":
            return is_copy(tensors, name, f"{_EMBEDDING}.weight")
        return name.endswith("rotary_emb.inv_freq")

    return net, load_by_name(tensors, sources_of(_names(net)), template, ignored=ignored)


def _rotary(given: Mapping[str, Any], base: float) -> tuple[float, RotaryScaling | None]:
    """Base and scaling from config.json's entry about the rotary embedding; `base` is the one outside of it."""
    fix = "copy config.json again"
    if not isinstance(given, Mapping):
        raise bad_argument("folder", f"a rotary embedding {given!r}", fix)
    kind = given.get("rope_type", given.get("type", "default"))
    check_choice("rope_type", kind, ("default", "llama3"))
    base = given.get("rope_theta", base)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = {"rope_theta": base} | ({} if kind == "default" else {name: given.get(name) for name in names})
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise bad_argument("folder", f"a rotary embedding with {name} {number!r}", fix)
    if kind == "default":
        return base, None
    scaling = RotaryScaling(*(given[name] for name in names))
    if scaling.slowest == scaling.fastest:
        raise bad_argument("folder", f"a rotary embedding whose frequencies are all {scaling.slowest}", fix)
    return base, scaling


def _names(net: Llama) -> dict[str, str]:
    """{path of a parameter: its tensor's name}."""
    names = {"token_embedding/embedding": _EMBEDDING, "output_norm/scale": "model.norm"}
    if not net.tied:
        names["head/kernel"] = "lm_head"
    for number in range(net.layers):
        ours, theirs = f"layers_{number}", f"model.layers.{number}"
        names |= {f"{ours}/{part}/kernel": f"{theirs}.{name}" for part, name in _DENSE.items()}
        names |= {f"{ours}/{part}/scale": f"{theirs}.{name}" for part, name in _NORMS.items()}
    return names
