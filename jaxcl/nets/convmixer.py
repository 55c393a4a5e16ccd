"""ConvMixer as a frozen encoder, with published weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.nets.efficientnet import Depthwise
from jaxcl.nets.gelu import gelu
from jaxcl.nets.weights import Source, check_images, image_side, load_by_name, read_safetensors
from jaxcl.typing import Array, PyTree, bad_argument, check_choice

Activation = Literal["gelu", "relu"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "relu": nn.relu}
_EPSILON = 1e-5  # of the batch normalisation that the weights were trained with


class ConvMixer(nn.Module):
    """ConvMixer (Trockman & Kolter 2022), for inference: a feature is the mean over patches of the last layer.

    Batch normalisation, which comes after the activation, is a scale and a bias. `nets.load_convmixer` reads sizes and
    parameters from a file. Images have any size that the patch divides.
    """

    patch: int  # height and width
    width: int  # D
    layers: int
    size: int  # of the convolutions of each channel by itself; odd
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features [B, D] of images [B, H, W, 3].

        Raises:
            ValueError: images of another shape, or integers, which are not preprocessed; an unknown activation.
        """
        check_images(images)
        check_choice("activation", self.activation, _ACTIVATIONS)
        activation = _ACTIVATIONS[self.activation]
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, "VALID", name="patches")(images)
        x = _Affine(name="patches_norm")(activation(x))
        for number in range(self.layers):
            mixed = Depthwise(self.size, 1, name=f"depthwise_{number}")(x)
            x += _Affine(name=f"depthwise_norm_{number}")(activation(mixed))
            mixed = nn.Dense(self.width, name=f"pointwise_{number}")(x)
            x = _Affine(name=f"pointwise_norm_{number}")(activation(mixed))
        return x.mean(axis=(1, 2))


class _Affine(nn.Module):
    """A scale and a bias for each channel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        return x * scale + self.param("bias", nn.initializers.zeros, shape)


def load_convmixer(path: str | Path, *, activation: Activation | None = None) -> tuple[ConvMixer, PyTree]:
    """A ConvMixer and its parameters from a safetensors file; sizes are those of its tensors.

    Tensors are named as timm names them (``stem.0.weight``, ``blocks.0.0.fn.0.weight``) or as the authors' Sequential
    does (``0.weight``, ``3.0.fn.0.weight``); the classifier is left alone.

    Args:
        path: the file.
        activation: which tensors do not tell; None takes what the published weights have, relu where the network is 768
            wide and 32 layers deep, else gelu.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: the file is damaged, or its tensors are not ConvMixer's: one error lists which differ.
        OSError: it cannot be read, or is not there.
    """
    tensors = {_timm_name(name): tensor for name, tensor in image_side(read_safetensors(path)).items()}
    for name in ("stem.0.weight", "blocks.0.0.fn.0.weight"):
        if name not in tensors:
            raise bad_argument("path", f"{path}, which has no tensor {name}", "pass a ConvMixer's")
    width, _, patch, _ = tensors["stem.0.weight"].shape
    layers = sum(f"blocks.{number}.0.fn.0.weight" in tensors for number in range(len(tensors)))
    published: Activation = "relu" if (width, layers) == (768, 32) else "gelu"
    net = ConvMixer(patch, width, layers, tensors["blocks.0.0.fn.0.weight"].shape[-1], activation or published)
    template = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, patch, patch, 3)))

    def ignored(name: str) -> bool:
        return name.startswith("head.") or name.endswith("batches_tracked")

    return net, load_by_name(tensors, _sources(layers), template, ignored=ignored)


def _timm_name(name: str) -> str:
    """The name that timm has for a tensor of the authors' Sequential: stem, layers, and at its end the classifier."""
    number, _, rest = name.partition(".")
    if not number.isdecimal():
        return name
    if int(number) < 3:
        return f"stem.{name}"
    return f"blocks.{int(number) - 3}.{rest}" if re.match(r"\d", rest) else f"head.{rest}"


def _sources(layers: int) -> dict[str, Source]:
    """{path of a parameter: its tensors}."""
    sources = {
        "params/patches/kernel": Source(("stem.0.weight",), lambda weight: weight.transpose(2, 3, 1, 0)),
        "params/patches/bias": Source(("stem.0.bias",), np.asarray),
    } | _affine("patches_norm", "stem.2")
    for number in range(layers):
        depthwise, pointwise = f"blocks.{number}.0.fn", f"blocks.{number}"
        sources |= {
            f"params/depthwise_{number}/kernel": Source(
                (f"{depthwise}.0.weight",), lambda w: w[:, 0].transpose(1, 2, 0)
            ),
            f"params/depthwise_{number}/bias": Source((f"{depthwise}.0.bias",), np.asarray),
            f"params/pointwise_{number}/kernel": Source((f"{pointwise}.1.weight",), lambda w: w[:, :, 0, 0].T),
            f"params/pointwise_{number}/bias": Source((f"{pointwise}.1.bias",), np.asarray),
        }
        sources |= _affine(f"depthwise_norm_{number}", f"{depthwise}.2")
        sources |= _affine(f"pointwise_norm_{number}", f"{pointwise}.3")
    return sources


def _affine(path: str, norm: str) -> dict[str, Source]:
    def scale(weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return weight / np.sqrt(variance.astype(np.float64) + _EPSILON)

    def bias(shift: np.ndarray, mean: np.ndarray, weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return shift - mean * scale(weight, variance)

    weight, shift, mean, variance = (f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    return {
        f"params/{path}/scale": Source((weight, variance), scale),
        f"params/{path}/bias": Source((shift, mean, weight, variance), bias),
    }
