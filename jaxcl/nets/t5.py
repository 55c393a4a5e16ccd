"""T5, a Transformer encoder and decoder that turns text into text, with published weights of versions 1.0 and 1.1."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcl.files import write_atomic
from jaxcl.nets.attention import dot_product_attention
from jaxcl.nets.generation import KeysValues
from jaxcl.nets.weights import is_copy, load_by_name, read_checkpoint, read_config, save_safetensors, sources_of
from jaxcl.trees import leaves_by_path
from jaxcl.typing import Array, PyTree, bad_argument, check_choice, check_count, check_rank

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": nn.relu, "gelu_new": nn.gelu}
# {config.json's name of the layers at each token: activation, and whether they are gated}
_FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}
# {field of T5, or what is looked at while loading: its name in config.json}
_CONFIG = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "heads": "num_heads",
    "head_width": "d_kv",
    "hidden": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "farthest": "relative_attention_max_distance",
    "epsilon": "layer_norm_epsilon",
    "feed_forward": "feed_forward_proj",
    "tied": "tie_word_embeddings",
    "scaled": "scale_decoder_outputs",
    "first": "decoder_start_token_id",
}
_DEFAULTS = {
    "num_decoder_layers": None,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    "decoder_start_token_id": None,
}
_EMBEDDING = "shared"


class T5Cache(NamedTuple):
    """What `T5.step` needs of the encoder's text and of earlier tokens."""

    layers: tuple[KeysValues, ...]  # of the decoder's tokens, one a layer, each [B, L, heads, W]
    encoded: tuple[KeysValues, ...]  # of the encoder's, one a layer, each [B, T, heads, W]
    mask: Array | None  # [B, T], where the encoder's text has a token; everywhere if None
    position: Array  # [] int32, where the next token goes


class T5(nn.Module):
    """The encoder and decoder of Raffel et al. 2020: attention knows how far apart two tokens are, but not where.

    The distance's bucket gives each head a number that is added to the scores; all layers of a stack share these, and
    attention to the encoder has none. Scores are not divided by the root of the heads' width, normalisation is by the
    root of the mean square and comes first, there is no bias and here no dropout. Version 1.1 has gated layers at each
    token (Shazeer 2020) and a head of its own; a head that is the embedding gets vectors divided by the root of D.
    `nets.load_t5` reads sizes and parameters from a Hugging Face folder, `nets.greedy_decode` writes texts.

    Parameters are float32. Softmax and normalisation are computed in float32, whatever `dtype` is.
    """

    vocabulary: int  # K
    width: int  # D
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_width: int  # W
    hidden: int  # width inside a layer
    buckets: int = 32  # of distances
    farthest: int = 128  # tokens apart: this and all beyond are in one bucket
    epsilon: float = 1e-6  # of the normalisation
    activation: str = "relu"  # or gelu_new, the approximation by tanh
    gated: bool = False  # whether what is activated is multiplied by another layer's vectors
    tied: bool = True  # whether the head is the embedding
    dtype: DTypeLike = jnp.float32  # of the computation

    def setup(self) -> None:
        """Submodules; raises ValueError for an activation unknown, or distances that do not fill their buckets."""
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_count("buckets", self.buckets, 4)
        check_count("farthest", self.farthest, self.buckets)
        layer = partial(
            _Layer, self.heads, self.head_width, self.hidden, self.epsilon, self.activation, self.gated, self.dtype
        )
        stack = partial(_Stack, layer, self.heads, self.buckets, self.farthest, self.epsilon, self.dtype)
        # Of unit variance, as what follows is normalised, and the head divides by the root of D.
        self.token_embedding = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = stack(self.layers, causal=False)
        self.decoder = stack(self.decoder_layers, causal=True)
        if not self.tied:
            self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)

    def __call__(
        self, tokens: Array, decoder_tokens: Array, mask: Array | None = None, decoder_mask: Array | None = None
    ) -> Array:
        """Logits [B, U, K], float32, of the token after each of the decoder's.

        Args:
            tokens: [B, T] int32, which the encoder reads.
            decoder_tokens: [B, U] int32: what is to be written, moved right by one behind a 0.
            mask: [B, T], true or 1 where there is a token; all if None.
            decoder_mask: [B, U], the same of the decoder's. Logits of other places mean nothing.

        Raises:
            ValueError: wrong ranks, an activation unknown, fewer than 4 buckets, or more than `farthest`.
        """
        return self.decode(decoder_tokens, self.encode(tokens, mask), mask, decoder_mask)

    def encode(self, tokens: Array, mask: Array | None = None) -> Array:
        """The encoder's vectors [B, T, D].

        Args:
            tokens: [B, T] int32.
            mask: [B, T], true or 1 where there is a token; all if None. Vectors of other places mean nothing.
        """
        check_rank("tokens", tokens, 2)
        return self.encoder(self.token_embedding(tokens), jnp.arange(tokens.shape[1]), mask)[0]

    def decode(
        self, decoder_tokens: Array, encoded: Array, mask: Array | None = None, decoder_mask: Array | None = None
    ) -> Array:
        """Logits [B, U, K] as `__call__` gives them, from the encoder's vectors [B, T, D]."""
        check_rank("decoder_tokens", decoder_tokens, 2)
        check_rank("encoded", encoded, 3)
        positions = jnp.arange(decoder_tokens.shape[1])
        return self._decoded(decoder_tokens, positions, decoder_mask, (encoded,) * self.decoder_layers, mask)[0]

    def start(self, tokens: Array, mask: Array | None, length: int) -> tuple[Array, T5Cache]:
        """Logits [B, K] of the first token written, and the cache with which `length` tokens can be chosen.

        Args:
            tokens: [B, T] int32, which the encoder reads.
            mask: [B, T], true or 1 where there is a token; all if None.
            length: tokens to choose, of which `step` takes all but the last.
        """
        first = jnp.zeros((len(tokens), 1), jnp.int32)
        vectors = (self.encode(tokens, mask),) * self.decoder_layers
        logits, layers, encoded = self._decoded(first, jnp.arange(1), None, vectors, mask)
        layers = tuple(layer.with_room(length - 1) for layer in layers)
        return logits[:, 0], T5Cache(layers, encoded, mask, jnp.ones((), jnp.int32))

    def step(self, tokens: Array, cache: T5Cache) -> tuple[Array, T5Cache]:
        """Logits [B, K] of the token after `tokens` [B], and the cache with these in it; it must have room."""
        logits, layers, _ = self._decoded(
            tokens[:, None], cache.position[None], None, cache.encoded, cache.mask, cache.layers
        )
        return logits[:, 0], cache._replace(layers=layers, position=cache.position + 1)

    def _decoded(
        self,
        tokens: Array,
        positions: Array,
        mask: Array | None,
        encoded: tuple[Array | KeysValues, ...],
        encoded_mask: Array | None,
        past: tuple[KeysValues, ...] = (),
    ) -> tuple[Array, tuple[KeysValues, ...], tuple[KeysValues, ...]]:
        """Logits [B, U, K], and what the decoder's stack gives beside its vectors."""
        x = self.token_embedding(tokens)
        x, layers, kept = self.decoder(x, positions, mask, encoded, encoded_mask, past)
        logits = self.token_embedding.attend(x * self.width**-0.5) if self.tied else self.head(x)
        return logits.astype(jnp.float32), layers, kept


class _Stack(nn.Module):
    """Layers that share one bias of distances, and a normalisation after them: the encoder, or the decoder."""

    layer: Callable[..., "_Layer"]
    heads: int
    buckets: int
    farthest: int
    epsilon: float
    dtype: DTypeLike
    layers: int
    causal: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array | None,
        encoded: tuple[Array | KeysValues, ...] = (),
        encoded_mask: Array | None = None,
        past: tuple[KeysValues, ...] = (),
    ) -> tuple[Array, tuple[KeysValues, ...], tuple[KeysValues, ...]]:
        """Vectors [B, U, D] of tokens at positions [U]; each layer's keys and values of them, and of the encoder's.

        What is `encoded` is one vector a token or, in later steps, the keys and values made of it before; a mask is
        [B, L], or [B, T] for the encoder's. In `past` are keys and values [B, L, heads, W] of tokens before.
        """
        length = past[0].keys.shape[1] if past else x.shape[1]
        offsets = jnp.arange(length) - positions[:, None]
        buckets = _buckets(offsets, self.buckets, self.farthest, causal=self.causal)
        bias = jnp.moveaxis(nn.Embed(self.buckets, self.heads, name="position_bias")(buckets), -1, 0)[None]
        visible = (offsets <= 0 if self.causal else jnp.ones_like(offsets, bool))[None, None]
        if mask is not None:
            visible &= _over_heads(mask)
        made = []
        for number in range(self.layers):
            x, *kept = self.layer(name=f"layers_{number}")(
                x, positions, bias, visible, past[number] if past else None,
                encoded[number] if encoded else None, None if encoded_mask is None else _over_heads(encoded_mask),
            )  # fmt: skip
            made.append(kept)
        own, others = zip(*made, strict=True)
        return nn.RMSNorm(self.epsilon, dtype=self.dtype, name="output_norm")(x), own, others


class _Layer(nn.Module):
    """Attention, in the decoder also to the encoder's text, then two layers at each token; each is added."""

    heads: int
    head_width: int
    hidden: int
    epsilon: float
    activation: str
    gated: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        bias: Array,
        visible: Array,
        past: KeysValues | None,
        encoded: Array | KeysValues | None,
        encoded_visible: Array | None,
    ) -> tuple[Array, KeysValues, KeysValues | None]:
        width = x.shape[-1]
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = partial(nn.RMSNorm, self.epsilon, dtype=self.dtype)
        # Scores are not divided by the root of the heads' width: the queries' first weights are.
        scaled = nn.initializers.variance_scaling(1 / self.head_width, "fan_in", "normal")

        def project(name: str, x: Array, **options: Any) -> Array:
            projected = dense(self.heads * self.head_width, name=name, **options)(x)
            return projected.reshape(*x.shape[:-1], self.heads, self.head_width)

        def attend(query: Array, to: KeysValues, bias: Array | None, visible: Array | None) -> Array:
            attended = dot_product_attention(query, *to, bias=bias, mask=visible, scale=1.0)
            return attended.reshape(*x.shape[:-1], -1)

        normal = norm(name="attention_norm")(x)
        own = KeysValues(project("key", normal), project("value", normal))
        if past is not None:
            own = past.put(own, positions)
        query = project("query", normal, kernel_init=scaled)
        x += dense(width, name="attention_output")(attend(query, own, bias, visible))
        if encoded is not None:
            if not isinstance(encoded, KeysValues):
                encoded = KeysValues(project("cross_key", encoded), project("cross_value", encoded))
            query = project("cross_query", norm(name="cross_norm")(x), kernel_init=scaled)
            x += dense(width, name="cross_output")(attend(query, encoded, None, encoded_visible))
        normal = norm(name="intermediate_norm")(x)
        activate = _ACTIVATIONS[self.activation]
        inner = dense(self.hidden, name="intermediate")(normal)
        inner = activate(dense(self.hidden, name="gate")(normal)) * inner if self.gated else activate(inner)
        return x + dense(width, name="output")(inner), own, encoded


def _over_heads(mask: Array) -> Array:
    """A mask [B, L] of keys as attention takes it, [B, 1, 1, L]."""
    return jnp.asarray(mask, bool)[:, None, None, :]


def _buckets(offsets: Array, buckets: int, farthest: int, *, causal: bool) -> Array:
    """The bucket of each offset of a key from its query; offsets to the right have half of them unless `causal`.

    Half of a side's buckets have one distance each, the others ever more: their bounds are the powers that lead from
    the first such distance to the farthest.
    """
    side = buckets if causal else buckets // 2
    single = side // 2
    shared = side - single

    def bucket(distance: int) -> int:
        if distance < single:
            return distance
        # (distance / single) ** shared >= (farthest / single) ** power, in integers: logarithms differ by backend.
        bounds = (farthest**power * single ** (shared - power) for power in range(1, shared))
        return single + sum(distance**shared >= bound for bound in bounds)

    table = jnp.array([bucket(distance) for distance in range(farthest + 1)], jnp.int32)
    found = table[jnp.minimum(jnp.abs(offsets), farthest)]
    if causal:
        return jnp.where(offsets > 0, 0, found)
    return jnp.where(offsets > 0, side, 0) + found


def load_t5(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[T5, PyTree]:
    """A T5 and its parameters from a Hugging Face folder: config.json and model.safetensors or its shards.

    Args:
        folder: holds the files.
        dtype: of the computation; parameters are float32.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: config.json is damaged, lacks a size, is not T5's or names layers at each token unknown; tensors
            are damaged, or not those that the sizes ask for: one error lists them.
        OSError: a file cannot be read, or is not there.
    """
    config = read_config(folder, "t5", "a T5", _CONFIG, T5, _DEFAULTS)
    feed_forward, scaled, first = (config.pop(name) for name in ("feed_forward", "scaled", "first"))
    if first not in (0, None):
        raise bad_argument("folder", f"{folder}: decoder_start_token_id {first}", "pass a T5 that begins to write at 0")
    check_choice("feed_forward_proj", feed_forward, _FEED_FORWARDS)
    config["activation"], config["gated"] = _FEED_FORWARDS[feed_forward]
    if scaled is not None:  # transformers 5 writes that all heads are tied, and here which truly are
        config["tied"] = scaled
    if config["decoder_layers"] is None:
        config["decoder_layers"] = config["layers"]
    net = T5(**config, dtype=dtype)
    tokens = jnp.zeros((1, 1), jnp.int32)
    template = jax.eval_shape(net.init, jax.random.key(0), tokens, tokens)
    tensors = read_checkpoint(folder)

    def ignored(name: str) -> bool:
        if name.endswith("embed_tokens.weight") or (net.tied and name == "lm_head.weight"):
            return is_copy(tensors, name, f"{_EMBEDDING}.weight")
        # Older checkpoints have a bias that nothing uses.
        return name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    return net, load_by_name(tensors, sources_of(_names(net)), template, ignored=ignored)


def save_t5(folder: str | Path, net: T5, params: PyTree) -> None:
    """Writes config.json and model.safetensors, as `load_t5` and Hugging Face's transformers read them.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: layers at each token that these files have no name for.
        OSError: a file cannot be written.
    """
    kinds = {kind: name for name, kind in _FEED_FORWARDS.items()}
    if (net.activation, net.gated) not in kinds:
        raise bad_argument(
            "net", f"activation {net.activation!r}, gated {net.gated}", f"files know {sorted(kinds)} of both"
        )
    leaves = leaves_by_path(params)
    save_safetensors(Path(folder) / "model.safetensors", {
        f"{name}.weight": np.asarray(leaf).T if path.endswith("/kernel") else np.asarray(leaf)
        for path, name in _names(net).items() for leaf in [leaves[f"params/{path}"]]
    })  # fmt: skip
    sizes = {name: getattr(net, field) for field, name in _CONFIG.items() if hasattr(net, field)}
    config = sizes | {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
        "feed_forward_proj": kinds[net.activation, net.gated],
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    write_atomic(Path(folder) / "config.json", json.dumps(config, indent=2))


def _names(net: T5) -> dict[str, str]:
    """{path of a parameter: its tensor's name}."""
    names = {"token_embedding/embedding": _EMBEDDING} | ({} if net.tied else {"head/kernel": "lm_head"})
    feed_forward = {"gate": "wi_0", "intermediate": "wi_1"} if net.gated else {"intermediate": "wi"}
    # In the order of a layer's parts: {our name before each of its tensors: theirs}
    attention = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
    cross = {"cross_query": "q", "cross_key": "k", "cross_value": "v", "cross_output": "o"}
    parts = [
        ("attention_norm", "SelfAttention", attention),
        ("cross_norm", "EncDecAttention", cross),
        ("intermediate_norm", "DenseReluDense", feed_forward | {"output": "wo"}),
    ]
    for stack, layers in (("encoder", net.layers), ("decoder", net.decoder_layers)):
        names[f"{stack}/position_bias/embedding"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names[f"{stack}/output_norm/scale"] = f"{stack}.final_layer_norm"
        for number in range(layers):
            here = parts if stack == "decoder" else [parts[0], parts[2]]
            for place, (norm, owner, dense) in enumerate(here):
                ours, theirs = f"{stack}/layers_{number}", f"{stack}.block.{number}.layer.{place}"
                names[f"{ours}/{norm}/scale"] = f"{theirs}.layer_norm"
                names |= {f"{ours}/{name}/kernel": f"{theirs}.{owner}.{tensor}" for name, tensor in dense.items()}
    return names
