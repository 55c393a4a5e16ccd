"""Encoders and decoders of image tokenizers: of convolutions, and of matrix products on patches."""

import math
from collections.abc import Sequence

import flax.linen as nn

from jaxcl.nets.layer_norm import LayerNorm
from jaxcl.typing import Array, bad_argument, check_rank

_GROUPS = 32  # Wu & He 2018, table 3


class ConvEncoder(nn.Module):
    """The convolutional encoder of VQGAN (Esser et al. 2021, table 7), without attention.

    Images [B, H, W, channels] to features [B, h, w, D], h and w being H and W halved between resolutions.
    """

    width: int  # D
    channels: int = 64  # at full resolution
    multipliers: Sequence[int] = (1, 2, 4)  # of the channels, one a resolution
    blocks: int = 2  # residual blocks a resolution

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features [B, h, w, D] of images [B, H, W, channels]."""
        check_rank("images", images, 4)
        _check_divides("images", images, 2 ** (len(self.multipliers) - 1))
        x = _conv(self.channels)(images)
        for number, multiplier in enumerate(self.multipliers):
            if number:
                x = _conv(x.shape[-1], stride=2)(x)
            for _ in range(self.blocks):
                x = _ResidualBlock(self.channels * multiplier)(x)
        return _conv(self.width)(nn.swish(_group_norm(x)))


class ConvDecoder(nn.Module):
    """The convolutional decoder of VQGAN (Esser et al. 2021, table 7), without attention: `ConvEncoder` backwards.

    Codes [B, h, w, D] to images [B, H, W, image channels], h and w being doubled between resolutions.
    """

    image_channels: int
    channels: int = 64  # at full resolution
    multipliers: Sequence[int] = (1, 2, 4)  # of the channels, one a resolution, the full one first
    blocks: int = 2  # residual blocks a resolution

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        """Images [B, H, W, image channels] of codes [B, h, w, D]."""
        check_rank("codes", codes, 4)
        x = _conv(self.channels * self.multipliers[-1])(codes)
        for number, multiplier in enumerate(reversed(self.multipliers)):
            if number:
                x = _conv(x.shape[-1])(x.repeat(2, axis=1).repeat(2, axis=2))
            for _ in range(self.blocks):
                x = _ResidualBlock(self.channels * multiplier)(x)
        return nn.Conv(self.image_channels, (3, 3), name="output")(nn.swish(_group_norm(x)))


class PatchEncoder(nn.Module):
    """An encoder of matrix products alone: patches through an MLP-Mixer (Tolstikhin et al. 2021), fast on any backend.

    Images [B, H, W, channels] to features [B, H / patch, W / patch, D]. It knows positions, so the size of the images
    it is made with is the only one it takes.
    """

    width: int  # D
    patch: int = 4  # pixels
    hidden: int = 256  # width between the blocks
    blocks: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Features [B, H / patch, W / patch, D] of images [B, H, W, channels]."""
        check_rank("images", images, 4)
        _check_divides("images", images, self.patch)
        (batch, height, width, channels), side = images.shape, self.patch
        grid = height // side, width // side
        patches = images.reshape(batch, grid[0], side, grid[1], side, channels).swapaxes(2, 3)
        x = nn.Dense(self.hidden)(patches.reshape(batch, math.prod(grid), side * side * channels))
        return nn.Dense(self.width)(_mixed(x, self.blocks)).reshape(batch, *grid, self.width)


class PatchDecoder(nn.Module):
    """`PatchEncoder` backwards: codes [B, h, w, D] to images [B, h patch, w patch, image channels]."""

    image_channels: int
    patch: int = 4  # pixels
    hidden: int = 256  # width between the blocks
    blocks: int = 2

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        """Images [B, h patch, w patch, image channels] of codes [B, h, w, D]."""
        check_rank("codes", codes, 4)
        (batch, height, width, _), side = codes.shape, self.patch
        x = _mixed(nn.Dense(self.hidden)(codes.reshape(batch, height * width, -1)), self.blocks)
        patches = nn.Dense(side * side * self.image_channels, name="output")(x)
        image = patches.reshape(batch, height, width, side, side, self.image_channels).swapaxes(2, 3)
        return image.reshape(batch, height * side, width * side, self.image_channels)


class _MixerBlock(nn.Module):
    """What positions have to say to each other, and then channels: x [B, positions, width] and the same again."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        positions, width = x.shape[1:]
        # As many hidden units as positions: with 64 positions or so the share of the work stays small.
        y = nn.gelu(nn.Dense(positions)(LayerNorm()(x).swapaxes(1, 2)))
        x = x + nn.Dense(positions)(y).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(2 * width)(LayerNorm()(x)))
        return x + nn.Dense(width)(y)


def _mixed(x: Array, blocks: int) -> Array:
    """[B, positions, width] through Mixer blocks and a last normalisation; to be called in a compact method."""
    for _ in range(blocks):
        x = _MixerBlock()(x)
    return LayerNorm()(x)


class _ResidualBlock(nn.Module):
    """Two convolutions, each after normalisation and swish, and a way around them."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = _conv(self.channels)(nn.swish(_group_norm(x)))
        y = _conv(self.channels)(nn.swish(_group_norm(y)))
        return y + (x if x.shape[-1] == self.channels else nn.Conv(self.channels, (1, 1))(x))


def _conv(channels: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (3, 3), (stride, stride))


def _group_norm(x: Array) -> Array:
    return nn.GroupNorm(math.gcd(_GROUPS, x.shape[-1]))(x)


def _check_divides(argument: str, images: Array, step: int) -> None:
    if images.shape[1] % step or images.shape[2] % step:
        raise bad_argument(argument, f"shape {tuple(images.shape)}", f"pass a height and width that {step} divides")
