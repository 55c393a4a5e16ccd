"""How close images come to their originals: the peak signal-to-noise ratio and the structural similarity."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.typing import Array, ArrayLike, bad_argument, check_count, check_rank


def psnr(a: ArrayLike, b: ArrayLike, *, peak: float) -> Array:
    """Peak signal-to-noise ratio of images, `10 log10(peak^2 / mean (a - b)^2)`, in decibels.

    The mean is over pixels and channels of one image. It is infinite for images that are equal, and its gradient there
    is NaN: the mean squared error is what to train on.

    Args:
        a: images, [B, H, W, C] or [B, H, W], any real dtype.
        b: images of the same shape.
        peak: the largest value less the smallest one that the format has: 255 for uint8, 2 for -1 to 1.

    Returns:
        [B] float32.

    Raises:
        ValueError: wrong ranks, shapes that differ, or a peak that is not positive.
    """
    a, b = _checked(a, b, peak)
    error = jnp.mean(jnp.square(a - b), axis=range(1, a.ndim))
    return 20 * np.log10(peak) - 10 * jnp.log10(error)


def ssim(
    a: ArrayLike,
    b: ArrayLike,
    *,
    peak: float,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Array:
    """Mean structural similarity of images (Wang et al. 2004, eq. 13 and 17), 1 for images that are equal.

    Means, variances and the covariance are those under a Gaussian window, at each position where it lies within the
    image; the result is the mean over positions and channels. The authors advise to shrink large images to some 256
    pixels before that; this does not.

    Args:
        a: images, [B, H, W, C] or [B, H, W], any real dtype.
        b: images of the same shape.
        peak: as in `psnr`; L in the paper.
        window: pixels along a side, an odd number. For images with a shorter side, the largest odd number that fits is
            taken in its place, with the same `sigma`: such values compare only with those of the same image size.
        sigma: standard deviation of the window, in pixels.
        k1: the constant of the means, times the peak.
        k2: the constant of the variances, times the peak.

    Returns:
        [B] float32.

    Raises:
        ValueError: as `psnr`; an even window or one below 1, or a sigma that is not positive.
    """
    a, b = _checked(a, b, peak)
    check_count("window", window, 1)
    if window % 2 == 0:
        raise bad_argument("window", window, "pass an odd number, which has a middle")
    if not sigma > 0:
        raise bad_argument("sigma", sigma, "pass a number above 0")
    if a.ndim == 3:
        a, b = a[..., None], b[..., None]
    height, width = a.shape[1:3]
    window = min(window, (min(height, width) - 1) // 2 * 2 + 1)
    rows, columns = (jnp.asarray(_filter(size, window, sigma)) for size in (height, width))
    # Second moments less squared means lose digits where values are far from zero; around the image's mean they do not.
    level = lax.stop_gradient(a.mean(axis=(1, 2), keepdims=True))
    a, b = a - level, b - level
    # Pixels come last, so that both passes are matrix products over all images and channels at once.
    maps = jnp.moveaxis(jnp.stack([a, b, a * a, b * b, a * b]), -1, 2)
    for kernel in (columns, rows):
        maps = jnp.matmul(maps, kernel, precision=lax.Precision.HIGHEST).swapaxes(-1, -2)
    mean_a, mean_b, square_a, square_b, product = maps
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    level = jnp.moveaxis(level, -1, 1)
    mean_a, mean_b = mean_a + level, mean_b + level
    c1, c2 = (k1 * peak) ** 2, (k2 * peak) ** 2
    similar_means = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    similar_structure = (2 * covariance + c2) / (variances + c2)
    return jnp.mean(similar_means * similar_structure, axis=(1, 2, 3))


def _checked(a: ArrayLike, b: ArrayLike, peak: float) -> tuple[Array, Array]:
    """Both in float32, [B, H, W, C] or [B, H, W], after checks."""
    check_rank("a", a, 3, 4)
    if a.shape != b.shape:
        raise bad_argument("b", f"shape {tuple(b.shape)}", f"pass images of the shape of a, {tuple(a.shape)}")
    if 0 in a.shape[1:]:
        raise bad_argument("a", f"shape {tuple(a.shape)}", "pass images with one pixel or more")
    if not peak > 0:
        raise bad_argument("peak", peak, "pass a number above 0, as 255 for uint8")
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def _filter(size: int, window: int, sigma: float) -> np.ndarray:
    """The Gaussian window at each position where it fits, a column each: [size, size - window + 1] float32."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    columns = np.zeros((size, size - window + 1), np.float32)
    for start in range(columns.shape[1]):
        columns[start : start + window, start] = weights / weights.sum()
    return columns
