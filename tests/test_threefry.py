"""Random words against published ones, and normal draws against SciPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxcl import threefry

pytestmark = pytest.mark.core
# Key, counter and words of Threefry-2x32-20 in the known-answer tests of Random123 1.14.0
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
@pytest.mark.parametrize("library", [np, jnp])
def test_words_are_the_published_ones(key, counter, words, library):
    key, counter = ([library.asarray([word], library.uint32) for word in pair] for pair in (key, counter))
    found = threefry.threefry_2x32(key, counter)
    assert all(word.dtype == np.uint32 for word in found)
    assert tuple(int(word[0]) for word in found) == words


def test_words_are_the_same_under_jit():
    rng = np.random.default_rng(0)
    key, counter = ([rng.integers(0, 2**32, 100, np.uint32) for _ in range(2)] for _ in range(2))
    for own, jitted in zip(
        threefry.threefry_2x32(key, counter), jax.jit(threefry.threefry_2x32)(key, counter), strict=True
    ):
        np.testing.assert_array_equal(own, jitted)


def test_normal_variables_are_quantiles_to_both_sides():
    magnitudes = np.unique(np.geomspace(1, 2**31 - 1, 20_000).astype(np.uint32))
    expected = -special.ndtri((magnitudes + 0.5) / 2**32)
    upper = np.asarray(threefry.normal_of_word(jnp.asarray(magnitudes)))
    np.testing.assert_allclose(upper, expected, rtol=0, atol=2e-3)
    common = expected < 5.2
    np.testing.assert_allclose(upper[common], expected[common], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(threefry.normal_of_word(jnp.asarray(magnitudes + 2**31, jnp.uint32)), -upper)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 67, 1001)])
def test_draws_are_of_the_standard_normal_distribution(shape, implementation):
    draws = threefry.standard_normal(jax.random.key(0, impl=implementation), shape)
    assert draws.shape == shape and draws.dtype == jnp.float32
    draws = np.asarray(draws).ravel()
    assert draws.size == math.prod(shape) and np.isfinite(draws).all()
    if draws.size > 1:
        assert stats.kstest(draws, "norm").pvalue > 0.01
        half = draws.size // 2  # the two words of a counter have nothing to do with each other
        assert abs(np.corrcoef(draws[:half], draws[-half:])[0, 1]) < 0.01


def test_waiting_times_are_exponential_and_finite():
    words = jax.random.bits(jax.random.key(0), (500, 401), jnp.uint32)
    draws = np.asarray(threefry.exponential_of_word(words))
    assert np.isfinite(threefry.exponential_of_word(jnp.asarray([0, 2**32 - 1], jnp.uint32))).all()
    assert draws.shape == (500, 401) and (draws > 0).all() and (draws < 17).all()
    assert stats.kstest(draws.ravel(), "expon").pvalue > 0.01
    assert stats.kstest(draws.min(axis=1) * 401, "expon").pvalue > 0.01  # the shortest are not rounded


def test_keys_give_draws_of_their_own():
    draws = np.asarray([threefry.standard_normal(key, (1000,)) for key in jax.random.split(jax.random.key(1), 20)])
    assert np.abs(np.corrcoef(draws) - np.eye(20)).max() < 0.2
    together = jax.vmap(lambda key: threefry.standard_normal(key, (1000,)))(jax.random.split(jax.random.key(1), 20))
    np.testing.assert_array_equal(together, draws)
