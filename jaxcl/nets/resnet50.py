"""ResNet-50 as a frozen encoder, with the published weights of CLIP, DINO and supervised training."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.nets.weights import Source, check_images, folded, image_side, load_by_name, read_safetensors
from jaxcl.typing import Array, PyTree, bad_argument

_EPSILON = 1e-5  # of the batch normalisation that the weights were trained with
_HEAD_WIDTH = 64  # of CLIP's pooling by attention


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016; torchvision's form, the stride in the 3 x 3 convolution), for inference.

    Batch normalisation with its stored statistics is folded into the convolutions, as in `EfficientNetLite0`. A feature
    is the mean over positions. `nets.load_resnet50` reads sizes and parameters from a file. CLIP's (Radford et al.
    2021) differs: three convolutions for the first one, means where others have a stride, and in place of the last mean
    the attention of the mean to all positions, whose number is that of the images it was trained on.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)  # of each stage
    width: int = 64  # of the first stage; features have 32 times as many
    positions: int | None = None  # CLIP's: of its pooling, and one for the mean
    projected: int = 1024  # CLIP's: width of a feature

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features [B, 32 width], or CLIP's [B, projected], of images [B, H, W, 3].

        Raises:
            ValueError: images of another shape, or integers, which are not preprocessed.
        """
        check_images(images)
        clip = self.positions is not None
        if clip:
            x = nn.relu(_convolution(self.width // 2, 3, 2, "stem_0")(images))
            x = nn.relu(_convolution(self.width // 2, 3, 1, "stem_1")(x))
            x = _mean(nn.relu(_convolution(self.width, 3, 1, "stem_2")(x)), 2)
        else:
            x = nn.relu(_convolution(self.width, 7, 2, "stem_0")(images))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                width = self.width * 2**stage
                x = _Bottleneck(width, stride, clip, first=not number, name=f"stage_{stage}_{number}")(x)
        if self.positions is None:
            return x.mean(axis=(1, 2))
        return _AttentionPool(self.positions, self.projected, name="pool")(x)


class _Bottleneck(nn.Module):
    """Three convolutions around the 3 x 3 one, and a way around them, projected in the first block of a stage."""

    width: int
    stride: int
    means: bool  # over neighbours, where others have a stride
    first: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        stride = 1 if self.means else self.stride
        y = nn.relu(_convolution(self.width, 1, 1, "reduce")(x))
        y = nn.relu(_convolution(self.width, 3, stride, "convolution")(y))
        if self.means:
            x, y = _mean(x, self.stride), _mean(y, self.stride)
        y = _convolution(4 * self.width, 1, 1, "expand")(y)
        if self.first:
            x = _convolution(4 * self.width, 1, stride, "shortcut")(x)
        return nn.relu(x + y)


class _AttentionPool(nn.Module):
    """The mean over positions attends to itself and all of them (CLIP)."""

    positions: int
    projected: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, channels = len(x), x.shape[-1]
        x = x.reshape(batch, -1, channels)
        if x.shape[1] + 1 != self.positions:
            raise bad_argument(
                "images",
                f"images that leave {x.shape[1]} positions",
                f"resize them so that {self.positions - 1} are left",
            )
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x += self.param("position_embedding", nn.initializers.normal(0.02), (self.positions, channels))
        query, key, value = (
            nn.Dense(channels, name=name)(part).reshape(batch, part.shape[1], -1, _HEAD_WIDTH)
            for name, part in (("query", x[:, :1]), ("key", x), ("value", x))
        )
        attended = jax.nn.dot_product_attention(query, key, value).reshape(batch, channels)
        return nn.Dense(self.projected, name="projection")(attended)


def load_resnet50(path: str | Path) -> tuple[ResNet50, PyTree]:
    """A ResNet of bottleneck blocks and its parameters from a safetensors file; sizes are those of its tensors.

    Tensors are named as torchvision names them, and DINO after it (also behind ``backbone.``; the classifier is left
    alone), or as CLIP does (``visual.attnpool.q_proj.weight``; the text side is left alone).

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: the file is damaged, or its tensors are not those of such a network: one error lists which differ.
        OSError: it cannot be read, or is not there.
    """
    tensors = image_side(read_safetensors(path))
    blocks: list[int] = []
    while (
        count := sum(f"layer{len(blocks) + 1}.{number}.conv1.weight" in tensors for number in range(len(tensors)))
    ) > 0:
        blocks.append(count)
    if not blocks:
        raise bad_argument("path", f"{path}, which has no tensor layer1.0.conv1.weight", "pass a ResNet-50's")
    places = tensors.get("attnpool.positional_embedding")
    net = ResNet50(
        tuple(blocks),
        width=tensors["layer1.0.conv1.weight"].shape[0],
        positions=None if places is None else len(places),
        projected=tensors["attnpool.c_proj.weight"].shape[0] if "attnpool.c_proj.weight" in tensors else 1024,
    )
    side = 32 if places is None else 32 * round((len(places) - 1) ** 0.5)
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return net, load_by_name(
        tensors,
        _sources(net),
        template,
        ignored=lambda name: name.startswith("fc.") or name.endswith("batches_tracked"),
    )


def _convolution(channels: int, size: int, stride: int, name: str) -> nn.Conv:
    """With as many zeros on each side as PyTorch puts there."""
    return nn.Conv(channels, (size, size), (stride, stride), ((size // 2,) * 2,) * 2, name=name)


def _mean(x: Array, size: int) -> Array:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x


def _sources(net: ResNet50) -> dict[str, Source]:
    """{path of a parameter: its tensors}."""
    clip = net.positions is not None
    layers = {f"stem_{number}": (f"conv{number + 1}", f"bn{number + 1}") for number in range(3 if clip else 1)}
    for stage, blocks in enumerate(net.blocks):
        for number in range(blocks):
            ours, theirs = f"stage_{stage}_{number}", f"layer{stage + 1}.{number}"
            for place, part in enumerate(("reduce", "convolution", "expand"), 1):
                layers[f"{ours}/{part}"] = (f"{theirs}.conv{place}", f"{theirs}.bn{place}")
            if not number:
                layers[f"{ours}/shortcut"] = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    sources: dict[str, Source] = {}
    for path, (convolution, norm) in layers.items():
        sources |= folded(f"params/{path}", convolution, norm, epsilon=_EPSILON)
    if clip:
        sources["params/pool/position_embedding"] = Source(("attnpool.positional_embedding",), np.asarray)
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("projection", "c")):
            sources[f"params/pool/{ours}/kernel"] = Source((f"attnpool.{theirs}_proj.weight",), np.transpose)
            sources[f"params/pool/{ours}/bias"] = Source((f"attnpool.{theirs}_proj.bias",), np.asarray)
    return sources
