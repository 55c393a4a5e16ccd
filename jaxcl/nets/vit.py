"""The vision Transformer as a frozen encoder, with the published weights of CLIP, DINO and supervised training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.nets.attention import dot_product_attention
from jaxcl.nets.gelu import gelu
from jaxcl.nets.layer_norm import LayerNorm
from jaxcl.nets.weights import Source, check_images, image_side, load_by_name, read_safetensors
from jaxcl.typing import Array, PyTree, bad_argument, check_choice

Activation = Literal["gelu", "quick_gelu"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
_HEAD_WIDTH, _MOST_HEADS = 64, 16  # of published models; those wider than 1,024 have wider heads


class ViT(nn.Module):
    """The encoder of Dosovitskiy et al. 2021: patches and a class token, normalisation before each part of a layer.

    A feature is the class token's vector after the last normalisation, and where there is `projected`, its projection.
    `nets.load_vit` reads sizes and parameters from a file. CLIP's (Radford et al. 2021) differs: it normalises what
    goes into the first layer, its patches have no bias, its activation is x sigmoid(1.702 x), and it projects.
    """

    patch: int  # height and width
    width: int  # D
    layers: int
    heads: int
    hidden: int  # width inside a layer
    positions: int  # patches of an image, and one for the class token
    projected: int | None = None  # width of CLIP's projection
    epsilon: float = 1e-6  # of the normalisation
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features [B, D], or [B, projected], of images [B, H, W, 3] of the size that the positions are for.

        Raises:
            ValueError: images of another shape or size, or integers, which are not preprocessed.
        """
        check_images(images)
        check_choice("activation", self.activation, _ACTIVATIONS)
        side = self.patch * round((self.positions - 1) ** 0.5)
        if images.shape[1:3] != (side, side):
            raise bad_argument("images", f"{images.shape[1]} x {images.shape[2]}", f"resize them to {side} x {side}")
        clip = self.projected is not None
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, "VALID", use_bias=not clip, name="patches")(
            images
        )
        x = x.reshape(len(x), -1, self.width)
        token = self.param("class_token", nn.initializers.normal(0.02), (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x += self.param("position_embedding", nn.initializers.normal(0.02), (self.positions, self.width))
        if clip:
            x = LayerNorm(self.epsilon, name="input_norm")(x)
        for number in range(self.layers):
            x = _Layer(self.heads, self.hidden, self.epsilon, self.activation, name=f"layers_{number}")(x)
        feature = LayerNorm(self.epsilon, name="output_norm")(x[:, 0])
        return nn.Dense(self.projected, use_bias=False, name="projection")(feature) if self.projected else feature


class _Layer(nn.Module):
    """Attention, then two layers at each place, each added to what it was given."""

    heads: int
    hidden: int
    epsilon: float
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        projected = nn.Dense(3 * width, name="attention")(LayerNorm(self.epsilon, name="attention_norm")(x))
        query, key, value = jnp.moveaxis(projected.reshape(batch, length, 3, self.heads, -1), 2, 0)
        attended = dot_product_attention(query, key, value).reshape(x.shape)
        x += nn.Dense(width, name="attention_output")(attended)
        inner = nn.Dense(self.hidden, name="intermediate")(LayerNorm(self.epsilon, name="intermediate_norm")(x))
        return x + nn.Dense(width, name="output")(_ACTIVATIONS[self.activation](inner))


def load_vit(path: str | Path, *, activation: Activation | None = None) -> tuple[ViT, PyTree]:
    """A vision Transformer and its parameters from a safetensors file; sizes are those of its tensors.

    Tensors are named as CLIP names them (``visual.class_embedding``; with or without ``visual.``, the text side is left
    alone), or as DINO and timm's supervised models do (``cls_token``, also behind ``backbone.``; heads are left alone).

    Args:
        path: the file.
        activation: which tensors do not tell; None takes quick_gelu for CLIP's names, as OpenAI's weights have it, else
            gelu, which most of OpenCLIP's weights have too.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: the file is damaged, or its tensors are neither CLIP's nor DINO's: one error lists which differ.
        OSError: it cannot be read, or is not there.
    """
    tensors = image_side(read_safetensors(path))
    clip = "class_embedding" in tensors
    names = _CLIP if clip else _DINO
    for name in (names["patches"] + ".weight", names["position_embedding"], names["layer"].format(0) + ".weight"):
        if name not in tensors:
            raise bad_argument("path", f"{path}, which has no tensor {name}", "pass a ViT of CLIP's or of DINO's names")
    patches, positions = (tensors[name] for name in (names["patches"] + ".weight", names["position_embedding"]))
    if (
        patches.ndim != 4
        or positions.ndim < 2
        or 0 in patches.shape + positions.shape
        or round((positions.shape[-2] - 1) ** 0.5) ** 2 != positions.shape[-2] - 1
    ):
        raise bad_argument(
            "path", f"{path}, with patches of shape {patches.shape} and positions of shape {positions.shape}",
            "pass a ViT with kernels [width, 3, patch, patch] and a class token before a square of positions",
        )  # fmt: skip
    width, _, patch, _ = patches.shape
    inner, projection = tensors.get(names["intermediate"].format(0) + ".weight"), tensors.get("proj") if clip else None
    net = ViT(
        patch,
        width,
        layers=sum(names["layer"].format(number) + ".weight" in tensors for number in range(len(tensors))),
        heads=min(max(1, width // _HEAD_WIDTH), _MOST_HEADS),
        hidden=inner.shape[0] if inner is not None and inner.ndim == 2 else 4 * width,  # else an error lists it
        positions=positions.shape[-2],
        projected=None if projection is None else projection.shape[1] if projection.ndim == 2 else width,
        epsilon=1e-5 if clip else 1e-6,
        activation=activation or ("quick_gelu" if clip else "gelu"),
    )
    side = patch * round((net.positions - 1) ** 0.5)
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))

    return net, load_by_name(
        tensors, _sources(net, names), template, ignored=lambda name: name.startswith(("head", "fc_norm", "pre_logits"))
    )


# {part: its tensors' name}; a layer's have its number in them.
_CLIP = {
    "patches": "conv1",
    "class_token": "class_embedding",
    "position_embedding": "positional_embedding",
    "input_norm": "ln_pre",
    "output_norm": "ln_post",
    "layer": "transformer.resblocks.{}.ln_1",
    "attention_norm": "transformer.resblocks.{}.ln_1",
    "attention": "transformer.resblocks.{}.attn.in_proj_",  # the names lack a point
    "attention_output": "transformer.resblocks.{}.attn.out_proj",
    "intermediate_norm": "transformer.resblocks.{}.ln_2",
    "intermediate": "transformer.resblocks.{}.mlp.c_fc",
    "output": "transformer.resblocks.{}.mlp.c_proj",
}
_DINO = {
    "patches": "patch_embed.proj",
    "class_token": "cls_token",
    "position_embedding": "pos_embed",
    "output_norm": "norm",
    "layer": "blocks.{}.norm1",
    "attention_norm": "blocks.{}.norm1",
    "attention": "blocks.{}.attn.qkv",
    "attention_output": "blocks.{}.attn.proj",
    "intermediate_norm": "blocks.{}.norm2",
    "intermediate": "blocks.{}.mlp.fc1",
    "output": "blocks.{}.mlp.fc2",
}


def _sources(net: ViT, names: Mapping[str, str]) -> dict[str, Source]:
    """{path of a parameter: its tensor}."""

    def of(part: str, name: str, kind: str) -> dict[str, Source]:
        weight, bias = (f"{name}{'' if name.endswith('_') else '.'}{end}" for end in ("weight", "bias"))
        if kind == "norm":
            return {
                f"params/{part}/scale": Source((weight,), np.asarray),
                f"params/{part}/bias": Source((bias,), np.asarray),
            }
        return {
            f"params/{part}/kernel": Source((weight,), np.transpose),
            f"params/{part}/bias": Source((bias,), np.asarray),
        }

    sources = {
        "params/patches/kernel": Source((names["patches"] + ".weight",), lambda weight: weight.transpose(2, 3, 1, 0)),
        "params/class_token": Source((names["class_token"],), np.ravel),
        "params/position_embedding": Source((names["position_embedding"],), lambda table: table.reshape(-1, net.width)),
        **of("output_norm", names["output_norm"], "norm"),
    }
    if net.projected:
        sources |= {"params/projection/kernel": Source(("proj",), np.asarray)} | of("input_norm", "ln_pre", "norm")
    else:
        sources["params/patches/bias"] = Source((names["patches"] + ".bias",), np.asarray)
    for number in range(net.layers):
        for part, kind in (
            ("attention_norm", "norm"), ("attention", "dense"), ("attention_output", "dense"),
            ("intermediate_norm", "norm"), ("intermediate", "dense"), ("output", "dense"),
        ):  # fmt: skip
            sources |= of(f"layers_{number}/{part}", names[part].format(number), kind)
    return sources
