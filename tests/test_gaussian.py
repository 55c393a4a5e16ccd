"""Diagonal Gaussians against SciPy, and Mean-KL against its budget and the golden table of scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, compiled, golden, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from jaxcl import gaussian
from jaxcl.gaussian import Gaussian

pytestmark = pytest.mark.core


def table(kind):
    arrays, _ = golden("mean_kl_table")
    dtype = jnp.float64 if kind == "f64" else jnp.float32
    kappa, delta = (jnp.asarray(arrays[f"{kind}_{name}"], dtype) for name in ("kappa", "delta"))
    return kappa, delta, {name[4:]: array for name, array in arrays.items() if name.startswith(kind)}


def relative(found, expected):
    return np.max(np.abs(np.asarray(found, np.float64) - expected) / np.maximum(np.abs(expected), 1e-30))


@both_ways
def test_scales_and_derivatives_of_the_golden_table(wrap):
    kappa, delta, expected = table("f32")
    ratio = np.asarray(wrap(gaussian.mean_kl_scale)(kappa, delta), np.float64)
    assert relative(ratio, expected["sigma_over_rho"]) < 1e-6
    assert relative(ratio**2, expected["s"]) < 1e-6
    slopes = wrap(jax.vmap(jax.grad(gaussian.mean_kl_scale, (0, 1))))(kappa, delta)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert relative(slopes[0], expected["dratio_dkappa"]) < 1e-4
    assert relative(slopes[1], expected["dratio_ddelta"]) < 1e-4
    squares = wrap(jax.vmap(jax.grad(lambda *at: gaussian.mean_kl_scale(*at) ** 2, (0, 1))))(kappa, delta)
    assert relative(squares[0], expected["ds_dkappa"]) < 1e-4
    assert relative(squares[1], expected["ds_ddelta"]) < 1e-4


def test_scales_of_the_golden_table_in_float64():
    with jax.enable_x64(True):
        kappa, delta, expected = table("f64")
        ratio = compiled(gaussian.mean_kl_scale)(kappa, delta)
        assert ratio.dtype == jnp.float64
        assert relative(ratio, expected["sigma_over_rho"]) < 1e-12
        slopes = jax.vmap(jax.grad(gaussian.mean_kl_scale, (0, 1)))(kappa, delta)
        assert relative(slopes[0], expected["dratio_dkappa"]) < 1e-9
        assert relative(slopes[1], expected["dratio_ddelta"]) < 1e-9


@both_ways
def test_the_scale_is_the_priors_at_the_edge_and_nan_beyond_it(wrap):
    arrays, _ = golden("mean_kl_table")
    at = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    np.testing.assert_array_equal(wrap(gaussian.mean_kl_scale)(at["boundary_kappa"], at["boundary_delta"]), 1)
    assert np.isnan(wrap(gaussian.mean_kl_scale)(at["infeasible_kappa"], at["infeasible_delta"])).all()
    assert jax.grad(lambda delta: gaussian.mean_kl_scale(1, delta))(0.5) == jax.grad(gaussian.mean_kl_scale, 1)(
        1.0, 0.5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scales_of_broadcast_arguments_are_float32(dtype):
    kappa, delta = jnp.asarray([0.5, 2.0], dtype), jnp.asarray(0.25, dtype)
    ratio = gaussian.mean_kl_scale(kappa, delta)
    assert ratio.shape == (2,) and ratio.dtype == jnp.float32
    spent = 0.5 * (ratio**2 + 0.25**2 - 1 - 2 * jnp.log(ratio))
    assert_close(spent, [0.5, 2.0])
    slopes = jax.jacobian(gaussian.mean_kl_scale)(kappa, delta)
    assert slopes.shape == (2, 2) and jnp.isfinite(slopes).all()


def random_tree(key, sizes, spread):
    leaves = {}
    for name, shape in sizes.items():
        key, raw_key, share_key, prior_key = jax.random.split(key, 4)
        prior = jax.random.normal(prior_key, (2, 1))
        leaves[name] = (
            spread * jax.random.normal(raw_key, shape), spread * jax.random.normal(share_key, shape), prior[0],
            jnp.exp(prior[1]),
        )  # fmt: skip
    return [{name: leaf[part] for name, leaf in leaves.items()} for part in range(4)]


SIZES = {"a": (3, 30), "b": (2, 2, 7), "c": (1,)}


@settings(deadline=None, max_examples=40)
@given(some.integers(0, 2**31 - 1), some.floats(0.02, 20.0), some.floats(0.01, 3.0))
def test_the_kl_of_mean_kl_is_its_budget(seed, nats_a_weight, spread):
    raw_mean, raw_share, prior_mean, prior_scale = random_tree(jax.random.key(seed), SIZES, spread)
    budget = {name: jnp.full(shape[:-1], nats_a_weight * shape[-1]) for name, shape in SIZES.items()}
    prior = Gaussian(prior_mean, prior_scale)
    q = gaussian.mean_kl(raw_mean, raw_share, budget, prior)
    for name, shape in SIZES.items():
        assert q.mean[name].shape == q.scale[name].shape == shape
        delta = (np.asarray(q.mean[name], np.float64) - np.asarray(prior_mean[name])) / np.asarray(prior_scale[name])
        ratio = np.asarray(q.scale[name], np.float64) / np.asarray(prior_scale[name])
        if ratio.min() < 1e-37:  # a budget of 85 nats and more on one weight
            continue
        spent = np.sum(0.5 * (ratio**2 + delta**2 - 1 - 2 * np.log(ratio)), axis=-1)
        np.testing.assert_allclose(spent, np.asarray(budget[name], np.float64), rtol=1e-5)


def test_gradients_of_mean_kl_are_those_of_float64_differences():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((2, 6))

    def loss(arguments):
        raw_mean, raw_share = arguments[:6], arguments[6:12]
        q = gaussian.mean_kl(raw_mean, raw_share, arguments[12], Gaussian(jnp.asarray(0.3), jnp.exp(arguments[13])))
        return jnp.sum(weights[0] * q.mean) + jnp.sum(weights[1] * q.scale)

    at = np.concatenate([rng.standard_normal(12), [2.5, 0.2]])
    with jax.enable_x64(True):
        expected = numerical_gradient(lambda x: float(loss(jnp.asarray(x))), at)
    assert_close(jax.grad(loss)(jnp.asarray(at, jnp.float32)), expected, 1e-4)


@both_ways
def test_gradients_are_finite_where_shares_and_slacks_vanish(wrap):
    raw_mean = jnp.asarray([[0.0, 300.0, -300.0, 1.0], [0.0, 0.0, 50.0, -50.0]])
    raw_share = jnp.asarray([[500.0, -500.0, 0.0, 499.0], [0.0, 0.0, 0.0, 0.0]])

    def total(*arguments):
        return sum(jnp.sum(leaf) for leaf in gaussian.mean_kl(*arguments, Gaussian(jnp.zeros(1), jnp.ones(1))))

    for budget in (1e-6, 1.0, 100.0, 1e4):
        for gradient in wrap(jax.grad(total, (0, 1, 2)))(raw_mean, raw_share, jnp.full(2, budget)):
            assert np.isfinite(gradient).all()


def test_kl_is_the_textbooks_and_keeps_its_precision_near_the_prior():
    rng = np.random.default_rng(0)
    q, p = (Gaussian({"w": rng.standard_normal((5, 3))}, {"w": np.exp(rng.standard_normal((5, 3)))}) for _ in range(2))
    found = gaussian.kl(*jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (q, p)))["w"]
    ratio, delta = q.scale["w"] / p.scale["w"], (q.mean["w"] - p.mean["w"]) / p.scale["w"]
    assert_close(found, 0.5 * (ratio**2 + delta**2 - 1) - np.log(ratio))
    for prior in np.float32([0.7, 1.0, 1.3]):
        scales = prior * np.float32([1, 1 - 2**-10, 1 + 2**-10, 1 - 2**-22, 1 + 2**-22, 1 - 2**-3, 0.4, 1e-6, 30])
        zero = jnp.zeros(len(scales))
        close = gaussian.kl(Gaussian(zero, jnp.asarray(scales)), Gaussian(zero, jnp.full(len(scales), prior)))
        offset = (scales.astype(np.float64) - prior) / prior
        expected = 0.5 * (2 * offset + offset**2) - np.log1p(offset)
        np.testing.assert_allclose(close, expected, rtol=1e-5, atol=1e-20)


def test_samples_follow_their_gaussians():
    q = gaussian.mean_var({"a": jnp.full(20_000, 3.0), "b": jnp.zeros((2, 10_000))}, {"a": -1.0, "b": jnp.asarray(0.5)})
    draw = gaussian.sample(jax.random.key(0), q)
    assert stats.kstest(np.asarray(draw["a"]), stats.norm(3, np.exp(-1)).cdf).pvalue > 0.01
    assert stats.kstest(np.asarray(draw["b"]).ravel(), stats.norm(0, np.exp(0.5)).cdf).pvalue > 0.01
    assert draw["b"].shape == (2, 10_000)


def test_outputs_of_a_dense_layer_have_the_mean_and_variance_of_its_weights():
    rng = np.random.default_rng(0)
    q = Gaussian(
        {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)},
        {"kernel": rng.uniform(0.1, 1, (4, 3)), "bias": rng.uniform(0.1, 1, 3)},
    )
    inputs = rng.standard_normal((2, 4))
    expected = inputs @ q.mean["kernel"] + q.mean["bias"]
    spread = np.sqrt(inputs**2 @ q.scale["kernel"] ** 2 + q.scale["bias"] ** 2)

    def layer(params, x):
        return x @ params["kernel"] + params["bias"]

    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), q)
    many = jnp.repeat(jnp.asarray(inputs, jnp.float32)[None], 20_000, axis=0)
    drawn = np.asarray(gaussian.sample_outputs(jax.random.key(0), layer, single, many))
    for row, column in np.ndindex(2, 3):
        own = stats.norm(expected[row, column], spread[row, column])
        assert stats.kstest(drawn[:, row, column], own.cdf).pvalue > 0.001
    assert abs(np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]) < 0.03  # examples draw for themselves


def test_outputs_of_a_convolution_have_the_spread_of_sampled_kernels():
    q = Gaussian(jnp.full((3, 3, 2, 4), 0.3), jnp.full((3, 3, 2, 4), 0.5))
    inputs = jax.random.normal(jax.random.key(1), (1, 5, 5, 2))

    def layer(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    keys = jax.random.split(jax.random.key(2), 4000)
    local = jax.jit(jax.vmap(lambda key: gaussian.sample_outputs(key, layer, q, inputs)))(keys)
    whole = jax.jit(jax.vmap(lambda key: layer(gaussian.sample(key, q), inputs)))(keys)
    assert local.shape == whole.shape == (4000, 1, 3, 3, 4)
    assert_close(local.mean(axis=0), whole.mean(axis=0), 0.1)
    np.testing.assert_allclose(local.std(axis=0), whole.std(axis=0), rtol=0.08)


def test_gradients_of_sampled_outputs_are_finite_for_inputs_of_zero():
    q = Gaussian(jnp.ones((3, 2)), jnp.ones((3, 2)))

    def total(scale):
        own = Gaussian(q.mean, scale)
        return jnp.sum(gaussian.sample_outputs(jax.random.key(0), lambda w, x: x @ w, own, jnp.zeros((4, 3))))

    np.testing.assert_array_equal(jax.grad(total)(q.scale), 0)
