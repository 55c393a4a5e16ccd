"""Augmentation of image batches on the device: pure functions of a key, each example with a draw of its own.

They work under jit and vmap, and on batches sharded over devices, between which nothing is exchanged.
"""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Key, bad_argument, check_count


def random_crop(key: Key, images: Array, *, padding: int) -> Array:
    """Each image moved by up to `padding` pixels down or up, right or left; what comes from outside it is 0.

    That is the usual crop of the image's own size from the image with `padding` zeros around it.

    Args:
        key: one draw of a place an example, each of the `(2 * padding + 1) ** 2` equally likely.
        images: [B, H, W, ...] of any dtype.
        padding: in pixels; 0 changes nothing.

    Returns:
        [B, H, W, ...] of the same dtype.

    Raises:
        ValueError: fewer than three axes, or a negative padding.
    """
    _check_images(images)
    check_count("padding", padding, 0)
    rest = (0,) * (images.ndim - 3)
    around = (padding, padding)
    padded = jnp.pad(images, [(0, 0), around, around, *zip(rest, rest, strict=True)])
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], *rest), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Key, images: Array) -> Array:
    """Each image [H, W, ...] of [B, H, W, ...] mirrored left to right, or not, with equal chances; any dtype.

    Raises:
        ValueError: fewer than three axes.
    """
    _check_images(images)
    mirrored = jax.random.bernoulli(key, shape=(len(images),) + (1,) * (images.ndim - 1))
    return jnp.where(mirrored, jnp.flip(images, axis=2), images)


def _check_images(images: Array) -> None:
    if images.ndim < 3:
        raise bad_argument("images", f"shape {tuple(images.shape)}", "pass an array [B, H, W, ...]")
