"""How tasks show inputs that they share: functions of a table, a batch and the tasks of its examples."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.typing import Array, PyTree


def as_they_are(table: PyTree, inputs: Array, tasks: Array) -> Array:
    """The inputs [B, ...] themselves; the table is ()."""
    return inputs


def permute(orders: Array, inputs: Array, tasks: Array) -> Array:
    """Inputs [B, ...] with their values in the order of their tasks [B], a row of orders [T, D] each."""
    flat = inputs.reshape(len(inputs), -1)
    return jnp.take_along_axis(flat, orders[tasks], axis=1).reshape(inputs.shape)


def rotate(table: tuple[Array, Array], inputs: Array, tasks: Array) -> Array:
    """Images [B, H, W, ...] turned as their tasks [B] say; the table has `rotation`'s arrays of each, [T, 4, H * W]."""
    places, weights = table[0][tasks], table[1][tasks]  # [B, 4, H * W]: the four pixels about each source point
    flat = inputs.reshape(len(inputs), places.shape[-1], -1).astype(weights.dtype)
    corners = jax.vmap(lambda image, places: image[places])(flat, places)
    return jnp.sum(corners * weights[..., None], axis=1).reshape(inputs.shape)


def rotation(degrees: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights, both [4, H * W], of the pixels that each pixel of the turned image mixes."""
    angle = np.deg2rad(degrees)
    middle = np.array([(height - 1) / 2, (width - 1) / 2])[:, None]
    down, right = np.indices((height, width)).reshape(2, -1) - middle
    # Rows count downwards: turning the image counter-clockwise reads each pixel from where a clockwise turn puts it.
    source = np.stack([np.cos(angle) * down + np.sin(angle) * right, np.cos(angle) * right - np.sin(angle) * down])
    source = np.round(source + middle, 9)  # a quarter turn falls on pixels exactly
    corner = np.floor(source).astype(int)
    share = source - corner
    places, weights = [], []
    for below in (0, 1):
        for beside in (0, 1):
            row, column = corner[0] + below, corner[1] + beside
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = np.abs(1 - below - share[0]) * np.abs(1 - beside - share[1])
            places.append(np.where(inside, row * width + column, 0))
            weights.append(np.where(inside, weight, 0))
    return np.stack(places).astype(np.int32), np.stack(weights).astype(np.float32)
