"""The multi-layer perceptron."""

from collections.abc import Sequence

import flax.linen as nn

from jaxcl.typing import Array, check_count


class MLP(nn.Module):
    """Fully connected layers with ReLU between them: inputs [B, ...], flattened, to logits [B, K]."""

    hidden: Sequence[int]  # widths of the hidden layers
    classes: int  # K

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, ...].

        Raises:
            ValueError: a width below 1.
        """
        x = inputs.reshape(len(inputs), -1)
        for width in self.hidden:
            check_count("hidden", width, 1)
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)
