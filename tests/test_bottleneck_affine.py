"""Keys that are SimVQ's codes: affine in what was drawn, and as near to heads as least squares brings them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import bottleneck

LAYER = bottleneck.discrete_key_value_bottleneck(12, 3, codebooks=4, pairs=32, key_width=5, spare=4)


def fitted(features, iterations, key=2):
    _, state = LAYER.init(jax.random.key(0))
    return state, bottleneck.fit_simvq_keys(jax.random.key(key), LAYER, state, features, iterations=iterations)


def some_features(count=400):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) + 3, jnp.float32)


def mean_error(state, features):
    heads, keys = (np.asarray(of, np.float64) for of in (LAYER.heads(state, features), state.keys.codebook[:, :28]))
    return np.square(heads[:, :, None] - keys[:, None]).sum(-1).min(-1).mean()


def test_one_iteration_is_the_search_and_then_least_squares():
    features = some_features()
    before, after = fitted(features, 1)
    codes = np.asarray(jax.random.normal(jax.random.key(2), (4, 32, 5)), np.float64)
    heads = np.asarray(LAYER.heads(before, features), np.float64)
    for own, x, keys in zip(codes, heads, np.asarray(after.keys.codebook), strict=True):
        first = own * x.std(axis=0) + x.mean(axis=0)
        nearest = np.square(x[:, None] - first[None, :28]).sum(-1).argmin(1)  # the last four are not in play
        chosen = np.concatenate([own[nearest], np.ones((len(x), 1))], axis=1)
        basis = np.linalg.lstsq(chosen, x, rcond=None)[0]
        expected = np.concatenate([own, np.ones((32, 1))], axis=1) @ basis
        np.testing.assert_allclose(keys, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_array_equal(after.keys.counts, after.active)  # a head each, so that `fit_keys` finds none dead
    np.testing.assert_array_equal(after.active, before.active)


def test_more_iterations_bring_keys_nearer_and_keep_them_affine():
    features = some_features()
    errors = [mean_error(fitted(features, iterations)[1], features) for iterations in (1, 3, 10)]
    assert errors[0] > errors[1] > errors[2]
    codes = np.asarray(jax.random.normal(jax.random.key(2), (4, 32, 5)))
    for own, keys in zip(codes, np.asarray(fitted(features, 10)[1].keys.codebook), strict=True):
        extended = np.concatenate([own, np.ones((32, 1))], axis=1)
        left = keys - extended @ np.linalg.lstsq(extended, keys, rcond=None)[0]
        assert np.abs(left).max() < 1e-3 * np.abs(keys).max()


def test_features_that_vary_in_one_direction_only_give_finite_keys():
    features = jnp.outer(jnp.linspace(-1, 1, 50), jnp.arange(12.0))
    assert np.isfinite(fitted(features, 5)[1].keys.codebook).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="iterations: got 0; pass 1 or more"):
        fitted(some_features(10), 0)
    with pytest.raises(ValueError, match="features: got"):
        fitted(jnp.zeros((10, 11)), 1)
