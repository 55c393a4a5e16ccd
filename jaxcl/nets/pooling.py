"""Pooling."""

import jax.numpy as jnp

from jaxcl.typing import Array


def max_pool_2x2(x: Array) -> Array:
    """The largest of each 2 x 2 values, [B, H // 2, W // 2, C] of [B, H, W, C]; an odd last row or column is left out.

    As `flax.linen.max_pool`, whose gradient is slow on CPU. Of values that are equal, both get half of the gradient.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])
