"""Channels brought to mean 0 and standard deviation 1, by what the training images alone say."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.continual.streams import Examples
from jaxcl.typing import Array, ArrayLike, bad_argument, check_count

PIECE = 64  # images read at a time


class Statistics(NamedTuple):
    """Of each channel, in the units of the inputs."""

    mean: ArrayLike  # [channels] float32
    std: ArrayLike  # [channels] float32, 1 for a channel that does not vary


def channel_statistics(train: Examples, *, limit: int | None = None) -> Statistics:
    """Mean and standard deviation of each channel over the images and their pixels, added up in float64.

    Images are read a piece at a time, so lazy inputs need no more memory. A channel that does not vary beyond what
    float32 can tell gets standard deviation 1, so that normalising it gives 0 and never divides by 0.

    Args:
        train: inputs [N, H, W, channels], or [N, H, W] for one channel. Pass what is trained on, never test.
        limit: images to look at, taken evenly from the whole set; None for all.

    Raises:
        ValueError: inputs without images or of another rank, or a limit below 1.
    """
    shape = train.inputs.shape
    if len(shape) not in (3, 4) or not shape[0]:
        raise bad_argument("train.inputs", f"shape {shape}", "pass one image or more, [N, H, W] or [N, H, W, channels]")
    check_count("limit", 1 if limit is None else limit, 1)
    images = shape[0] if limit is None else min(limit, shape[0])
    rows = np.linspace(0, shape[0] - 1, images).astype(int)
    channels = shape[3] if len(shape) == 4 else 1
    count, mean, squares = 0, np.zeros(channels), np.zeros(channels)  # squares: of differences from the mean
    for start in range(0, len(rows), PIECE):
        piece = np.asarray(train.inputs[rows[start : start + PIECE]])
        pixels = piece.reshape(-1, channels).T.astype(np.float64, order="C")  # contiguous rows are summed faster
        own_mean = pixels.mean(1)
        own_squares = np.square(pixels - own_mean[:, None]).sum(1)
        own_count, apart = pixels.shape[1], own_mean - mean
        squares += own_squares + apart**2 * (count * own_count / (count + own_count))
        count += own_count
        mean += apart * (own_count / count)
    std = np.sqrt(squares / count)
    constant = std <= np.finfo(np.float32).eps * np.abs(mean)
    return Statistics(mean.astype(np.float32), np.where(constant, 1, std).astype(np.float32))


def normalise(statistics: Statistics, images: ArrayLike) -> Array:
    """Images [..., H, W, channels], or [..., H, W] by statistics of one channel, less the mean, over the deviation.

    The result is float32, whatever the images are. It is a pure function, to be applied on the device: a batch
    travels as uint8.
    """
    return (jnp.asarray(images, jnp.float32) - statistics.mean) / statistics.std
