"""Residual networks for images."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn

from jaxcl.nets.batch_norm import BatchNorm
from jaxcl.typing import Array, check_choice, check_rank

_GROUPS = 32  # Wu & He 2018, table 3


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, table 1): images to logits [B, K].

    Shortcuts that change shape are 1 x 1 convolutions (option B of the paper). Normalisation is over groups of the
    channels of one example (Wu & He 2018), in training as in testing: with statistics of a batch an example's logits
    depend on the others, where methods take each example's own gradient, and running ones drift with each task, which
    changes what the network answers on the earlier ones even where no weight moved. There are 32 groups, or as many as
    divide both 32 and the channels. "batch" is for masks, which keep a set of statistics a task: see `BatchNorm`.
    """

    classes: int  # K
    width: int = 64  # channels of the first stage; each of the three others has twice those of the one before
    normalisation: Literal["group", "batch"] = "group"
    training: bool = False  # whether `BatchNorm` takes its statistics from the batch
    small_images: bool = True  # the form for CIFAR, whose stem keeps the size; else that for ImageNet, a quarter of it

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, H, W, channels]."""
        check_rank("inputs", inputs, 4)
        check_choice("normalisation", self.normalisation, ("group", "batch"))
        norm = (lambda _: BatchNorm(self.training)) if self.normalisation == "batch" else _group_norm
        if self.small_images:
            x = nn.relu(_normalised(norm, inputs, self.width, size=3))
        else:
            x = nn.relu(_normalised(norm, inputs, self.width, size=7, stride=2))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                x = _Block(norm, self.width * 2**stage, stride=2 if stage and not block else 1)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    """Two convolutions and a way around them."""

    norm: Callable[[int], nn.Module]  # (channels) -> layer
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        convolved = partial(_normalised, self.norm, channels=self.channels)
        y = nn.relu(convolved(x, size=3, stride=self.stride))
        y = convolved(y, size=3)
        if x.shape[-1] != self.channels or self.stride != 1:
            x = convolved(x, size=1, stride=self.stride)
        return nn.relu(x + y)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(_GROUPS, channels), epsilon=1e-5)


def _normalised(norm: Callable[[int], nn.Module], x: Array, channels: int, *, size: int, stride: int = 1) -> Array:
    """A normalised convolution, [B, H / stride, W / stride, channels]; to be called in a module's compact method."""
    edge = (size // 2, size // 2)  # on both sides, as the authors have it; "SAME" pads strides on one only
    x = nn.Conv(
        channels, (size, size), (stride, stride), [edge, edge], use_bias=False, kernel_init=nn.initializers.he_normal()
    )(x)
    return norm(channels)(x)
