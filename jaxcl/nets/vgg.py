"""VGG-16."""

import math

import flax.linen as nn

from jaxcl.nets.pooling import max_pool_2x2
from jaxcl.typing import Array, check_rank

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # multiples of the width, and convolutions, before each pooling
_GROUPS = 32  # Wu & He 2018, table 3


class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, configuration D) for small images: images to logits [B, K].

    Thirteen convolutions of 3 x 3 in five stages, each followed by pooling; as is usual for images of 32 x 32, one
    output layer is all that comes after them. Convolutions are normalised over groups of the channels of one example,
    where those who train it on CIFAR mostly take batch normalisation: that has statistics beside its weights.
    """

    classes: int  # K
    width: int = 64  # channels of the first stage

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, H, W, channels], 32 or more high and wide."""
        check_rank("inputs", inputs, 4)
        x = inputs
        for multiple, convolutions in _STAGES:
            channels = multiple * self.width
            for _ in range(convolutions):
                x = nn.Conv(channels, (3, 3), use_bias=False, kernel_init=nn.initializers.he_normal())(x)
                x = nn.relu(nn.GroupNorm(math.gcd(_GROUPS, channels), epsilon=1e-5)(x))
            x = max_pool_2x2(x)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))
