"""LeNet-5."""

import flax.linen as nn

from jaxcl.nets.pooling import max_pool_2x2
from jaxcl.typing import Array, check_rank


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) as it is used today, with ReLU and max pooling: images to logits [B, K]."""

    classes: int  # K
    channels: tuple[int, int] = (20, 50)
    hidden: int = 500

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, H, W, channels]."""
        check_rank("inputs", inputs, 4)
        x = inputs
        for channels in self.channels:
            x = max_pool_2x2(nn.relu(nn.Conv(channels, (5, 5), padding="VALID")(x)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name="head")(x)
