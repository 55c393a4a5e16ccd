"""EfficientNet-Lite0, a small image encoder whose ImageNet weights make features of other images."""

from functools import partial, reduce
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.nets.weights import Source, check_images, data_file, folded, load_by_name, read_safetensors
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_count, check_rank, check_width

# Expansion, channels, blocks, size and stride (of the first block): Tan & Le 2019, table 1.
_STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
_EPSILON = 1e-3  # of the batch normalisation that the weights were trained with


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; "Lite" has no squeeze-and-excitation and ReLU6 for swish).

    For inference: batch normalisation with its stored statistics is an affine map, which `load_efficientnet_lite0`
    folds into the convolutions, so that there is no state beside parameters and no example sees another. Any image size
    will do; the weights were trained at 224 x 224. Features: `net.apply(params, images, method="features")`.

    On CPU keep batches small, some 4 images of 224 x 224 or 32 of 64 x 64: activations of larger ones leave the cache.
    """

    classes: int = 1000  # K

    def setup(self) -> None:
        """The layers, which both methods share."""
        self.stem = nn.Conv(32, (3, 3), (2, 2))
        self.blocks = [_Block(*sizes) for sizes in _block_sizes()]
        self.head = nn.Dense(1280)
        self.classifier = nn.Dense(self.classes)

    def features(self, images: Array) -> Array:
        """Features [B, 1280], averaged over positions, of images [B, H, W, 3] from `efficientnet_lite0_preprocess`.

        Raises:
            ValueError: wrong rank, channels that are not 3, or integers, which are not preprocessed.
        """
        check_images(images, "efficientnet_lite0_preprocess")
        x = nn.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return nn.relu6(self.head(x)).mean(axis=(1, 2))

    def __call__(self, images: Array) -> Array:
        """Logits [B, K] of images [B, H, W, 3], which are as `features` takes them."""
        return self.classifier(self.features(images))


def efficientnet_lite0_preprocess(images: ArrayLike, *, size: int | None = 224) -> Array:
    """Images as the published weights want them: resized, then `(x - 127) / 128`.

    The resizing is Pillow's bilinear one (which averages where it makes images smaller), along rows and then along
    columns, rounded to integers after each. It may differ by 1 of 255 where a value lies half-way.

    Args:
        images: [B, H, W, 3] uint8, RGB.
        size: height and width of the result; None keeps the images' own.

    Returns:
        [B, size, size, 3] float32.

    Raises:
        ValueError: images of another shape or dtype, or a size below 1.
    """
    check_rank("images", images, 4)
    check_width("images", images, 3, "RGB")
    if images.dtype != np.uint8:
        raise bad_argument("images", f"dtype {images.dtype}", "pass uint8, 0 to 255")
    x = jnp.asarray(images, jnp.float32)
    if size is not None:
        check_count("size", size, 1)
        for shape in ((*x.shape[:2], size, 3), (x.shape[0], size, size, 3)):
            x = jnp.floor(jax.image.resize(x, shape, "bilinear") + 0.5)
    return (x - 127) / 128


def load_efficientnet_lite0(path: str | Path | None = None) -> PyTree:
    """Parameters of `EfficientNetLite0()` from a safetensors file with the names of efficientnet-lite-pytorch.

    Args:
        path: the file; None is efficientnet_lite0.safetensors in the folder that JAXCL_DATA names.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: JAXCL_DATA is unset or its folder has no such file; the file is damaged, or holds something else.
    """
    net = EfficientNetLite0()
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    tensors = read_safetensors(data_file("efficientnet_lite0.safetensors") if path is None else path)
    return load_by_name(tensors, _sources(), template, ignored=lambda name: name.endswith("num_batches_tracked"))


class _Block(nn.Module):
    """Expansion, convolution of each channel by itself, projection; a shortcut where shapes allow (Sandler 2018)."""

    expansion: int
    channels: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = x
        if self.expansion > 1:
            y = nn.relu6(nn.Dense(x.shape[-1] * self.expansion, name="expand")(y))
        y = nn.relu6(Depthwise(self.size, self.stride, name="depthwise")(y))
        y = nn.Dense(self.channels, name="project")(y)
        return x + y if x.shape == y.shape else y


class Depthwise(nn.Module):
    """A convolution of each channel by itself, [B, H / stride, W / stride, C]."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The same number of channels, of x [B, H, W, C]."""
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (self.size, self.size, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        shifted, grouped = (partial(form, stride=self.stride) for form in (_shifted, _grouped))
        return lax.platform_dependent(x, kernel, cpu=shifted, default=grouped) + bias


def _shifted(x: Array, kernel: Array, *, stride: int) -> Array:
    """The convolution as a sum of shifted images: on CPU 4 to 25 times as fast as XLA's own (measured)."""
    size, channels = len(kernel), x.shape[-1]
    edges = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    height, width = (length - size + 1 for length in x.shape[1:3])

    def term(place: tuple[int, ...]) -> Array:
        row, column = place
        end = (len(x), row + height, column + width, channels)
        return lax.slice(x, (0, row, column, 0), end, (1, stride, stride, 1)) * kernel[place]

    return reduce(jnp.add, map(term, np.ndindex(size, size)))


def _grouped(x: Array, kernel: Array, *, stride: int) -> Array:
    """The convolution as XLA has it."""
    return lax.conv_general_dilated(
        x, kernel[:, :, None].astype(x.dtype), (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip


def _block_sizes() -> list[tuple[int, int, int, int]]:
    """Expansion, channels, size and stride of each block."""
    return [
        (expansion, channels, size, 1 if number else stride)
        for expansion, channels, blocks, size, stride in _STAGES
        for number in range(blocks)
    ]


def _sources() -> dict[str, Source]:
    """{path of a parameter: its tensors}."""
    layers = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for number, (expansion, *_) in enumerate(_block_sizes()):
        ours, theirs = f"blocks_{number}", f"_blocks.{number}."
        if expansion > 1:
            layers[f"{ours}/expand"] = (f"{theirs}_expand_conv", f"{theirs}_bn0")
        layers[f"{ours}/depthwise"] = (f"{theirs}_depthwise_conv", f"{theirs}_bn1")
        layers[f"{ours}/project"] = (f"{theirs}_project_conv", f"{theirs}_bn2")
    sources = {
        "params/classifier/kernel": Source(("_fc.weight",), np.transpose),
        "params/classifier/bias": Source(("_fc.bias",), np.asarray),
    }
    for path, (convolution, norm) in layers.items():
        # A convolution of size 1 is a dense layer, and one of each channel by itself has no axis of inputs.
        sources |= folded(f"params/{path}", convolution, norm, epsilon=_EPSILON, squeeze=True)
    return sources
