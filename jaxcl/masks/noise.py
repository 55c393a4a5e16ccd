"""Multiplicative noise on weights (Chen et al. 2023): what it carries, and where it is more noise than signal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import threefry
from jaxcl.typing import Array, Key

EPSILON = 1e-8  # the authors': keeps ratios of mean and variance finite


class Noise(NamedTuple):
    """z ~ N(mean, exp(log_variance)) for each weight of a leaf."""

    mean: Array  # [...]
    log_variance: Array  # [...]


def draw_noise(key: Key, shape: tuple[int, ...], *, log_variance: float = -9.0, spread: float = 0.01) -> Noise:
    """Noise [...] of new weights: means around 1 and log variances around a value, with standard deviation `spread`.

    The authors' layers have -9, their networks -10.
    """
    mean_key, variance_key = jax.random.split(key)
    return Noise(
        1 + spread * jax.random.normal(mean_key, shape),
        log_variance + spread * jax.random.normal(variance_key, shape),
    )


def noisy(key: Key, weight: Array, noise: Noise) -> Array:
    """The weight [...] times a draw of its noise; one draw serves the whole batch, as the authors have it."""
    draw = threefry.standard_normal(key, weight.shape)
    return (weight * (noise.mean + jnp.exp(noise.log_variance / 2) * draw)).astype(weight.dtype)


def information(noise: Noise) -> Array:
    """How much the weights of a leaf carry at most, in nats: the sum [] of log(1 + mean^2 / variance) / 2."""
    return 0.5 * jnp.sum(jnp.log1p(noise.mean**2 / (jnp.exp(noise.log_variance) + EPSILON)))


def log_alpha(noise: Noise) -> Array:
    """The logarithm of variance over squared mean [...]: above 0 a weight is more noise than signal."""
    return noise.log_variance - jnp.log(noise.mean**2 + EPSILON)
