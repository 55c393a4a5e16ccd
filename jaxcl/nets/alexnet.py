"""The AlexNet variant for small images of the continual-learning literature."""

from functools import partial

import flax.linen as nn

from jaxcl.nets.batch_norm import BatchNorm
from jaxcl.nets.pooling import max_pool_2x2
from jaxcl.typing import Array, check_rank


class AlexNet(nn.Module):
    """Three convolutions and two wide layers without biases, for images of 32 x 32: logits [B, K].

    As Saha et al. 2021 (GPM), and after them WSN and IBM, have it: kernels of 4, 3 and 2, each followed by batch
    normalisation and pooling. Their dropout is left out: here an output is a function of parameters and inputs alone.
    """

    classes: int  # K
    training: bool = False  # whether `BatchNorm` takes its statistics from the batch
    channels: tuple[int, int, int] = (64, 128, 256)
    hidden: int = 2048  # width of each of the two layers behind the convolutions

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, H, W, channels]."""
        check_rank("inputs", inputs, 4)
        norm, x = partial(BatchNorm, self.training), inputs
        for channels, size in zip(self.channels, (4, 3, 2), strict=True):
            x = nn.Conv(channels, (size, size), padding="VALID", use_bias=False)(x)
            x = max_pool_2x2(nn.relu(norm()(x)))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(norm()(nn.Dense(self.hidden, use_bias=False)(x)))
        return nn.Dense(self.classes, use_bias=False, name="head")(x)
