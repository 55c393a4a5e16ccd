"""A discriminator for images, of which each answer sees a patch."""

import math

import flax.linen as nn

from jaxcl.typing import Array, check_count, check_rank

_CHANNELS = 16  # of a group: Wu & He 2018, table 3
_INITIAL = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2 and appendix 6.1.2): images [B, H, W, C] to logits [B, h, w].

    Convolutions of 4 x 4 with leaky ReLU of slope 0.2 between: `layers` of stride 2, the first `width` channels wide
    and each of the others twice as wide as the one before, up to eight times; one more of stride 1; one to the logits.
    A logit sees 70 x 70 pixels with three layers of stride 2, 34 x 34 with two and 16 x 16 with one: take fewer for
    small images. h and w are H and W halved `layers` times, rounded up each time. The authors' code pads the two of
    stride 1 by one on all sides, which makes h and w two smaller; here they keep the size, so that no image is too
    small.

    All but the first and the last are normalised: over groups of 16 channels (Wu & He 2018), not over the batch. That
    keeps `apply(params, inputs)` pure, with no running statistics, and an image's logits from depending on the others,
    real or fake, that happen to be in the batch. Fixed 32 groups would leave too few values a group to normalise where
    images are small: 8 x 8 end at 1 x 1.
    """

    width: int = 64  # channels of the first layer
    layers: int = 3  # of stride 2

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, h, w] of inputs [B, H, W, C]: the higher the more real."""
        check_rank("inputs", inputs, 4)
        check_count("layers", self.layers, 1)
        x = nn.leaky_relu(_convolved(inputs, self.width, stride=2), 0.2)
        for number in range(1, self.layers + 1):
            channels = self.width * min(2**number, 8)
            x = _convolved(x, channels, stride=2 if number < self.layers else 1, bias=False)
            groups = math.gcd(channels, max(1, channels // _CHANNELS))
            x = nn.leaky_relu(nn.GroupNorm(groups, epsilon=1e-5)(x), 0.2)
        return _convolved(x, 1, stride=1)[..., 0]


def _convolved(x: Array, channels: int, *, stride: int, bias: bool = True) -> Array:
    """[B, H / stride, W / stride, channels]; to be called in a module's compact method."""
    return nn.Conv(channels, (4, 4), (stride, stride), "SAME", use_bias=bias, kernel_init=_INITIAL)(x)
