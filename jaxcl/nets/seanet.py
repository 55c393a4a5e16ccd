"""SEANet, the convolutional encoder and decoder of neural audio codecs."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.typing import Array, bad_argument, check_count, check_rank

_OUTER = 7  # inputs that the first and the last convolution see at a time
_INNER = 3  # the same of the dilated ones


class SEANetEncoder(nn.Module):
    """The encoder of SEANet: waveforms [B, samples] to vectors [B, samples / hop, D], hop being the strides' product.

    Tagliasacchi et al. 2020 as SoundStream (Zeghidour et al. 2021, section III-A) and EnCodec (Défossez et al. 2022,
    section 3.1) have it: a convolution; for each stride residual units of growing dilation, then a convolution of twice
    the stride that doubles the channels; a last convolution to the width. ELU stands before each but the first, none
    behind the last. Dilations are SoundStream's; residual units are EnCodec's as its code has them, with half the
    channels inside. EnCodec's LSTM and the weight normalisation of both are left out.

    Nothing is causal: a convolution sees as far to either side, zeros beyond the ends, but one of twice an odd stride,
    which sees one more of its inputs to the right.
    """

    width: int  # D
    channels: int = 32  # of the first layer; each stride doubles them
    strides: Sequence[int] = (2, 4, 5)
    dilations: Sequence[int] = (1, 3, 9)  # a residual unit each, before every stride

    @nn.compact
    def __call__(self, audio: Array) -> Array:
        """Vectors [B, samples / hop, D] of audio [B, samples].

        Raises:
            ValueError: audio of another rank or of a length that the hop does not divide; sizes below 1.
        """
        _check(self.channels, self.strides, self.dilations)
        check_count("width", self.width, 1)
        check_rank("audio", audio, 2)
        hop = math.prod(self.strides)
        if not audio.shape[1] or audio.shape[1] % hop:
            raise bad_argument(
                "audio", f"{audio.shape[1]} samples",
                f"pass a multiple of {hop}, the product of the strides: pad with zeros or cut",
            )  # fmt: skip
        x = nn.Conv(self.channels, _OUTER)(audio[..., None])
        for stage, stride in enumerate(self.strides):
            x = _residual_units(x, self.dilations)
            edges = (stride // 2, stride - stride // 2)
            x = nn.Conv(self.channels * 2 ** (stage + 1), 2 * stride, stride, [edges])(_elu(x))
        return nn.Conv(self.width, _OUTER)(_elu(x))


class SEANetDecoder(nn.Module):
    """The decoder of SEANet: vectors [B, frames, D] to waveforms [B, frames * hop], hop being the strides' product.

    `SEANetEncoder` from its end to its start, with transposed convolutions, of the same fields: strides are in the
    encoder's order. As in EnCodec no tanh bounds the audio, which would press loud samples together; clip it to play
    it.
    """

    channels: int = 32  # of the last layer
    strides: Sequence[int] = (2, 4, 5)
    dilations: Sequence[int] = (1, 3, 9)

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        """Audio [B, frames * hop] of codes [B, frames, D].

        Raises:
            ValueError: codes of another rank; sizes below 1.
        """
        _check(self.channels, self.strides, self.dilations)
        check_rank("codes", codes, 3)
        x = nn.Conv(self.channels * 2 ** len(self.strides), _OUTER)(codes)
        for stage, stride in reversed(list(enumerate(self.strides))):
            x = _Upsample(self.channels * 2**stage, stride)(_elu(x))
            x = _residual_units(x, self.dilations)
        return nn.Conv(1, _OUTER)(_elu(x))[..., 0]


class _Upsample(nn.Module):
    """Transposed convolution with a kernel of twice the stride: [B, L, c] to [B, L * stride, channels].

    Each output sees two inputs, so with these side by side it is one matrix product. A training step with XLA's own
    transposed convolution took 4 to 17 times as long on CPU.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, inputs = x.shape
        # An output sums two taps, not the kernel's whole length: its variance is divided among so many.
        initial = nn.initializers.variance_scaling(self.stride, "fan_in", "truncated_normal")
        kernel = self.param("kernel", initial, (2 * self.stride, inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        pairs = jnp.concatenate([padded[:, 1:], padded[:, :-1]], axis=-1)
        kernel = kernel.reshape(2, self.stride, inputs, self.channels).swapaxes(1, 2)
        spread = pairs @ kernel.reshape(2 * inputs, self.stride * self.channels)
        start = self.stride // 2
        return spread.reshape(batch, -1, self.channels)[:, start : start + length * self.stride] + bias


@jax.custom_jvp
def _elu(x: Array) -> Array:
    """ELU, whose slope is worked out from its value: a second exponential takes a tenth of a training step on CPU."""
    return jax.nn.elu(x)


@_elu.defjvp
def _elu_slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = _elu(*primals)
    return y, tangents[0] * jnp.minimum(y + 1, 1)


def _residual_units(x: Array, dilations: Sequence[int]) -> Array:
    """A dilated convolution to half the channels and one back a unit, added to x [B, L, c]; in a compact method."""
    channels = x.shape[-1]
    for dilation in dilations:
        y = nn.Conv(channels // 2, _INNER, kernel_dilation=dilation)(_elu(x))
        x += nn.Conv(channels, 1)(_elu(y))
    return x


def _check(channels: int, strides: Sequence[int], dilations: Sequence[int]) -> None:
    check_count("channels", channels, 2)
    for name, numbers in (("strides", strides), ("dilations", dilations)):
        check_count(name, min(numbers, default=1), 1)
