"""PSNR and SSIM against their definitions, position by position in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, numerical_gradient

from jaxcl.reconstruction import psnr, ssim


def pair(*shape, peak=255.0, noise=0.1, seed=0):
    """Smooth images in [0, peak] and noisy ones of them."""
    rng = np.random.default_rng(seed)
    a = np.cumsum(rng.normal(size=shape), axis=1)
    a = (a - a.min()) / np.ptp(a)
    b = np.clip(a + noise * rng.normal(size=shape), 0, 1)
    return (peak * a).astype(np.float32), (peak * b).astype(np.float32)


def similarity(a, b, peak, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """Wang et al. 2004, eq. 13 to 17, of two images [H, W, C], with a two-dimensional window and explicit loops."""
    a, b = np.float64(a), np.float64(b)
    height, width, channels = a.shape
    while window > min(height, width):
        window -= 2
    middle = (window - 1) / 2
    weights = np.zeros((window, window))
    for row in range(window):
        for column in range(window):
            weights[row, column] = np.exp(-((row - middle) ** 2 + (column - middle) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    c1, c2 = (k1 * peak) ** 2, (k2 * peak) ** 2
    values = []
    for channel in range(channels):
        for top in range(height - window + 1):
            for left in range(width - window + 1):
                x, y = (image[top : top + window, left : left + window, channel] for image in (a, b))
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
                covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                values.append(
                    (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                    / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
                )  # fmt: skip
    return np.mean(values)


@both_ways
@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("shape", [(3, 7, 5, 2), (3, 7, 5)])
def test_psnr_is_its_formula(wrap, peak, shape):
    a, b = pair(*shape, peak=peak)
    error = ((np.float64(a) - b) ** 2).reshape(3, -1).mean(axis=1)
    result = wrap(lambda a, b: psnr(a, b, peak=peak))(a, b)
    assert result.dtype == jnp.float32
    assert_close(result, 10 * np.log10(peak**2 / error))


def test_psnr_of_known_errors():
    white, black = np.full((1, 4, 4, 3), 255, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    assert_close(psnr(white, black, peak=255), [0.0])
    assert_close(psnr(black, white, peak=255), [0.0])  # unsigned integers must not wrap
    assert_close(psnr(black, black + 1, peak=255), [48.1308], 1e-5)  # 20 log10 255
    assert_close(psnr(black / 1.0, black + 0.1, peak=1), [20.0])
    assert psnr(white, white, peak=255)[0] == np.inf


@both_ways
@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("size", [(17, 13), (11, 12)], ids=str)
def test_ssim_is_its_definition(wrap, peak, size):
    a, b = pair(2, *size, 3, peak=peak)
    expected = [similarity(*images, peak) for images in zip(a, b, strict=True)]
    assert min(expected) > 0.1 and max(expected) < 0.95
    result = wrap(lambda a, b: ssim(a, b, peak=peak))(a, b)
    assert result.dtype == jnp.float32
    assert_close(result, expected)
    assert_close(wrap(lambda a, b: ssim(b, a, peak=peak))(a, b), expected)


@pytest.mark.parametrize("size", [(8, 8), (30, 5), (4, 9), (1, 6), (2, 2)], ids=str)
def test_the_window_shrinks_to_the_largest_odd_size_that_fits(size):
    a, b = pair(2, *size, 1)
    assert_close(ssim(a, b, peak=255), [similarity(*images, 255) for images in zip(a, b, strict=True)])


def test_ssim_takes_other_windows_and_constants():
    a, b = pair(2, 12, 9, 2)
    options = {"window": 7, "sigma": 0.8, "k1": 0.05, "k2": 0.1}
    assert_close(
        ssim(a, b, peak=100, **options), [similarity(*images, 100, **options) for images in zip(a, b, strict=True)]
    )


def test_ssim_of_equal_images_is_one_and_of_a_negative_is_below_zero():
    a, _ = pair(3, 16, 16, 3)
    np.testing.assert_array_equal(ssim(a, a, peak=255), np.ones(3))
    assert (np.asarray(ssim(a, 255 - a, peak=255)) < 0).all()


@pytest.mark.parametrize("levels", [(255, 250), (7, 7), (0, 255)])
def test_ssim_of_constant_images_compares_their_means(levels):
    a, b = (np.full((1, 16, 16), level, np.uint8) for level in levels)
    (x, y), c1 = levels, 2.55**2
    assert_close(ssim(a, b, peak=255), [(2 * x * y + c1) / (x**2 + y**2 + c1)], 1e-6)


def test_ssim_keeps_its_digits_in_bright_images():
    """Faint texture on white: squares of 255 would round by as much as the constants are."""
    rng = np.random.default_rng(0)
    a, b = (np.float32(254 + 0.3 * rng.normal(size=(1, 20, 20, 1))) for _ in range(2))
    assert_close(ssim(a, b, peak=1), [similarity(a[0], b[0], 1)], 1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_are_taken_one_by_one_in_any_dtype(metric):
    a, b = (image.round().astype(np.uint8) for image in pair(4, 13, 14, 3))
    of = jax.jit(partial(metric, peak=255))
    together = of(a, b)
    assert together.shape == (4,)
    assert_close(of(np.float32(a), np.float32(b)), together, 1e-6)
    assert_close(jax.vmap(lambda a, b: of(a[None], b[None])[0])(a, b), together, 1e-6)
    assert_close(of(a[..., 0], b[..., 0]), of(a[..., :1], b[..., :1]), 1e-6)
    rounded = [jnp.asarray(image, jnp.bfloat16) for image in (a, b)]
    assert of(*rounded).dtype == jnp.float32
    assert_close(of(*rounded), of(*(np.float32(image) for image in rounded)), 1e-6)


def test_the_gradients_are_those_of_the_definitions():
    a, b = pair(1, 6, 5, 2, peak=1.0)
    of_psnr, of_ssim = (
        jax.jit(jax.grad(lambda a, metric=metric: metric(a, b, peak=1.0).sum()))(a) for metric in (psnr, ssim)
    )
    assert_close(of_psnr, numerical_gradient(lambda a: -10 * np.log10(((a - b) ** 2).mean()), a), 1e-4)
    assert_close(of_ssim, numerical_gradient(lambda a: similarity(a[0], b[0], 1.0), a), 1e-4)
    same = jax.grad(lambda a: ssim(a, a, peak=1.0).sum())(a)
    assert np.isfinite(same).all()


IMAGES = np.zeros((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "peak", "message"),
    [
        (IMAGES[0, 0], IMAGES[0, 0], 1, r"a: got shape \(4, 3\); pass an array with 3 or 4 axes"),
        (IMAGES, IMAGES[:1], 1, r"b: got shape \(1, 4, 4, 3\); pass images of the shape of a, \(2, 4, 4, 3\)"),
        (IMAGES[:, :0], IMAGES[:, :0], 1, r"a: got shape \(2, 0, 4, 3\); pass images with one pixel or more"),
        (IMAGES, IMAGES, 0, "peak: got 0; pass a number above 0"),
    ],
)
def test_bad_images_are_refused(metric, a, b, peak, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b, peak=peak)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: got 0; pass 1 or more"),
        ({"window": 8}, "window: got 8; pass an odd number"),
        ({"sigma": 0.0}, "sigma: got 0.0; pass a number above 0"),
    ],
)
def test_bad_windows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ssim(IMAGES, IMAGES, peak=1, **options)
