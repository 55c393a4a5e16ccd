"""Adversarial and perceptual losses against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, numerical_gradient

from jaxcl.reconstruction.learned import (
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    perceptual_loss,
)

both_dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The hinge losses


def hinge(real, fake):
    return (np.maximum(0, 1 - real) + np.maximum(0, 1 + fake)).reshape(len(real), -1).mean(axis=1)


@both_ways
@both_dtypes
@pytest.mark.parametrize("shape", [(5,), (5, 3, 4), (5, 1, 1)])
def test_the_hinge_losses(wrap, dtype, tolerance, shape):
    real, fake = 2 * normal(0, *shape), 2 * normal(1, *shape)
    discriminator = wrap(discriminator_hinge_loss)(jnp.asarray(real, dtype), jnp.asarray(fake, dtype))
    generator = wrap(generator_hinge_loss)(jnp.asarray(fake, dtype))
    assert discriminator.dtype == generator.dtype == jnp.float32
    assert_close(discriminator, hinge(real, fake), tolerance)
    assert_close(generator, -fake.reshape(5, -1).mean(axis=1), tolerance)


@both_ways
def test_the_hinge_losses_stop_where_the_margin_is_kept(wrap):
    real, fake = 2 * normal(0, 5, 3, 4), 2 * normal(1, 5, 3, 4)
    grads = wrap(jax.grad(lambda *logits: discriminator_hinge_loss(*logits).sum(), argnums=(0, 1)))(real, fake)
    assert_close(grads[0], (real < 1) / -12)
    assert_close(grads[1], (fake > -1) / 12)
    assert_close(wrap(jax.grad(lambda fake: generator_hinge_loss(fake).sum()))(fake), np.full_like(fake, -1 / 12))


def test_the_hinge_losses_under_vmap():
    real, fake = normal(0, 2, 5, 3), normal(1, 2, 5, 3)
    assert_close(
        jax.vmap(discriminator_hinge_loss)(real, fake), [hinge(*pair) for pair in zip(real, fake, strict=True)]
    )


# The adaptive weight


def trees(scale=1.0):
    reconstruction = {"kernel": normal(0, 3, 3, 4), "bias": normal(1, 4)}
    return reconstruction, {"layer": scale * normal(2, 7), "more": [scale * normal(3, 2, 2)]}


def length(tree):
    return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


@both_ways
@both_dtypes
def test_the_adaptive_weight_is_the_quotient_of_lengths(wrap, dtype, tolerance):
    reconstruction, adversarial = trees(0.1)
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (reconstruction, adversarial))
    weight = wrap(adaptive_weight)(*cast)
    assert weight.shape == () and weight.dtype == jnp.float32
    expected = length(reconstruction) / (length(adversarial) + 1e-4)
    assert weight == pytest.approx(expected, rel=tolerance)
    published = adaptive_weight(*cast, epsilon=1e-6)
    assert published == pytest.approx(length(reconstruction) / (length(adversarial) + 1e-6), rel=tolerance)


def test_the_adaptive_weight_has_a_limit_and_no_holes():
    reconstruction, adversarial = trees(1e-9)
    assert adaptive_weight(reconstruction, adversarial) == 1e4
    assert adaptive_weight(reconstruction, adversarial, limit=10.0) == 10
    nothing = jax.tree.map(jnp.zeros_like, adversarial)
    assert adaptive_weight(reconstruction, nothing, limit=1e9) == pytest.approx(length(reconstruction) / 1e-4, rel=1e-5)
    assert adaptive_weight(nothing, nothing) == 0


def test_the_adaptive_weight_is_a_constant_to_gradients():
    reconstruction, adversarial = trees()

    def weighed(scale):
        scaled = jax.tree.map(lambda leaf: scale * leaf, (reconstruction, adversarial))
        return scale * adaptive_weight(scaled[0], adversarial) + 0 * adaptive_weight(reconstruction, scaled[1])

    expected = 2 * length(reconstruction) / (length(adversarial) + 1e-4)
    assert jax.grad(weighed)(2.0) == pytest.approx(expected, rel=1e-5)


def test_the_adaptive_weight_balances_the_pulls_on_a_last_layer():
    """With it both losses' gradients in the layer's weights have the same length."""
    inputs, kernel = normal(0, 6, 4), normal(1, 4, 3)
    losses = (lambda w: jnp.square(inputs @ w - 1).mean(), lambda w: -0.01 * jnp.tanh(inputs @ w).mean())
    gradients = [jax.grad(loss)(kernel) for loss in losses]
    weight = adaptive_weight(*gradients, epsilon=0.0)
    assert length(weight * gradients[1]) == pytest.approx(length(gradients[0]), rel=1e-5)


# The perceptual loss

KERNELS = [normal(5, 2, 6), normal(6, 6, 3)]


def features(images, np=jnp):
    """Two maps: a layer at each pixel, then one at each pixel of means over 2 x 2."""
    first = np.tanh(images @ KERNELS[0])
    b, h, w, c = first.shape
    return first, np.maximum(first.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4)) @ KERNELS[1], -0.5)


def reference(a, b):
    total = 0.0
    for x, y in zip(features(a, np), features(b, np), strict=True):
        unit_x, unit_y = (v / np.sqrt((v**2).sum(axis=-1, keepdims=True)) for v in (x, y))
        total = total + ((unit_x - unit_y) ** 2).sum(axis=-1).mean(axis=(1, 2))
    return total


@both_ways
@both_dtypes
def test_the_perceptual_loss(wrap, dtype, tolerance):
    a, b = normal(0, 3, 4, 6, 2), normal(1, 3, 4, 6, 2)
    loss = wrap(lambda a, b: perceptual_loss(features, a, b))(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
    assert loss.shape == (3,) and loss.dtype == jnp.float32
    assert_close(loss, reference(np.float64(a), np.float64(b)), tolerance)


@both_ways
def test_the_gradient_of_the_perceptual_loss(wrap):
    a, b = normal(0, 2, 2, 2, 2), normal(1, 2, 2, 2, 2)
    grads = wrap(jax.grad(lambda a, b: perceptual_loss(features, a, b).sum(), argnums=(0, 1)))(a, b)
    a, b = np.float64(a), np.float64(b)
    assert_close(grads[0], numerical_gradient(lambda a: reference(a, b).sum(), a), 1e-4)
    assert_close(grads[1], numerical_gradient(lambda b: reference(a, b).sum(), b), 1e-4)


def test_the_perceptual_loss_compares_directions_only():
    a, b = jnp.asarray(normal(0, 3, 4, 4, 2)), jnp.asarray(normal(1, 3, 4, 4, 2))

    def itself(images):
        return [images]

    assert_close(perceptual_loss(itself, a, 5 * a), np.zeros(3))
    assert_close(perceptual_loss(itself, a, -2 * a), np.full(3, 4.0))  # opposite vectors of unit length
    assert_close(perceptual_loss(itself, 3 * a, b), perceptual_loss(itself, a, b))
    assert_close(perceptual_loss(features, a, b), perceptual_loss(features, b, a))
    assert_close(
        jax.vmap(lambda a, b: perceptual_loss(features, a[None], b[None])[0])(a, b), perceptual_loss(features, a, b)
    )


def test_features_of_nothing_have_finite_gradients():
    a, b = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
    loss, grad = jax.value_and_grad(lambda a: perceptual_loss(lambda images: [images], a, b).sum())(a)
    assert_close(loss, 1.0)
    assert np.isfinite(grad).all()


# Bad arguments


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: discriminator_hinge_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4))),
            "fake: got shape (2, 4); pass that of real, (2, 3)",
        ),
        (lambda: adaptive_weight(jnp.ones(2), jnp.ones(2), limit=-1.0), "limit: got -1.0; pass 0 or more"),
        (lambda: adaptive_weight(jnp.ones(2), jnp.ones(2), epsilon=-1.0), "epsilon: got -1.0; pass 0 or more"),
        (
            lambda: perceptual_loss(features, jnp.zeros((4, 4, 2)), jnp.zeros((4, 4, 2))),
            "a: got shape (4, 4, 2); pass an array with 4 axes",
        ),
        (
            lambda: perceptual_loss(features, jnp.zeros((2, 4, 4, 2)), jnp.zeros((1, 4, 4, 2))),
            "b: got shape (1, 4, 4, 2); pass that of a, (2, 4, 4, 2)",
        ),
        (
            lambda: perceptual_loss(lambda images: [], jnp.zeros((2, 4, 4, 2)), jnp.zeros((2, 4, 4, 2))),
            "features: got no map; return one feature map [B, h, w, c] or more",
        ),
        (
            lambda: perceptual_loss(
                lambda images: [images.mean(axis=(1, 2))], jnp.zeros((2, 4, 4, 2)), jnp.zeros((2, 4, 4, 2))
            ),
            "features: got shape (2, 2); pass an array with 4 axes",
        ),
    ],
)
def test_bad_arguments_are_named(function, message):
    with pytest.raises(ValueError) as caught:
        function()
    assert str(caught.value) == message
