"""MLP-Mixer: images by matrix products alone, which compiled loops run fast on a CPU too, where convolutions do not."""

from functools import partial

import flax.linen as nn

from jaxcl.typing import Array, bad_argument, check_rank

_norm = partial(nn.LayerNorm, use_bias=False, use_scale=False)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021), small: layers mix patches and channels in turn; images to logits [B, K].

    Layer normalisation has no scale and no bias, and no layer but the last has biases: what is learned lies in kernels.
    ReLU stands in for GELU, which is slow on CPU.
    """

    classes: int  # K
    patch: int = 8  # height and width
    width: int = 128  # channels
    layers: int = 2
    patch_hidden: int = 64  # inner width where patches are mixed
    channel_hidden: int = 256  # inner width where channels are

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits [B, K] of inputs [B, H, W, channels].

        Raises:
            ValueError: another rank, or a height or width that the patch does not divide.
        """
        check_rank("inputs", inputs, 4)
        batch, height, width, channels = inputs.shape
        if height % self.patch or width % self.patch:
            raise bad_argument("inputs", f"{height} x {width}", f"a patch of {self.patch} must divide both")
        rows, columns = height // self.patch, width // self.patch
        x = inputs.reshape(batch, rows, self.patch, columns, self.patch, channels).swapaxes(2, 3)
        x = nn.Dense(self.width, use_bias=False)(x.reshape(batch, rows * columns, -1))
        for _ in range(self.layers):
            mixed = self._mlp(_norm()(x).swapaxes(1, 2), self.patch_hidden)
            x += mixed.swapaxes(1, 2)
            x += self._mlp(_norm()(x), self.channel_hidden)
        return nn.Dense(self.classes, name="head")(_norm()(x).mean(axis=1))

    def _mlp(self, x: Array, hidden: int) -> Array:
        inner = nn.relu(nn.Dense(hidden, use_bias=False)(x))
        return nn.Dense(x.shape[-1], use_bias=False)(inner)
