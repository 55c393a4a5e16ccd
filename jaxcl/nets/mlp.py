"""The multi-layer perceptron."""

from collections.abc import Sequence

import flax.linen as nn

from jaxcl.typing import Array


class MLP(nn.Module):
    """Fully connected layers with ReLU between them: inputs [B, ...], flattened, to logits [B, K]."""

    hidden: Sequence[int]  # widths of the hidden layers
    classes: int  # K

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, ...]."""
        x = inputs.reshape(len(inputs), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)
