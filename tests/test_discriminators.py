"""The discriminator of patches against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl.nets.discriminators import PatchDiscriminator


def small(width=16, layers=2, shape=(3, 13, 8, 2)):
    """A network, parameters that all count, and inputs."""
    net = PatchDiscriminator(width, layers)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def draw(leaf):  # the initialiser would be compiled for each leaf
        if leaf.ndim == 1:
            return jnp.asarray(1 + 0.2 * rng.normal(size=leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    return net, jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), inputs)), inputs


def convolution(x, kernel, stride):
    """NumPy: of 4 x 4, zeros around so that size / stride, rounded up, comes out; the odd one behind."""
    padding = [(0, 0)]
    for size in x.shape[1:3]:
        missing = max(0, (-(-size // stride) - 1) * stride + 4 - size)
        padding.append((missing // 2, missing - missing // 2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [*padding, (0, 0)]), (4, 4), axis=(1, 2))
    return np.einsum("bhwcij,ijcd->bhwd", windows[:, ::stride, ::stride], kernel, optimize=True)


def group_norm(x, weights):
    """Over groups of 16 channels and all positions of an image."""
    grouped = x.reshape(len(x), -1, x.shape[-1] // 16, 16)
    mean, variance = (moment(grouped, axis=(1, 3), keepdims=True) for moment in (np.mean, np.var))
    return ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * weights["scale"] + weights["bias"]


def leaky(x):
    return np.maximum(x, 0.2 * x)


def forward(weights, x, layers):
    x = leaky(convolution(x, weights["Conv_0"]["kernel"], 2) + weights["Conv_0"]["bias"])
    for number in range(1, layers + 1):
        stride = 2 if number < layers else 1
        x = convolution(x, weights[f"Conv_{number}"]["kernel"], stride)
        x = leaky(group_norm(x, weights[f"GroupNorm_{number - 1}"]))
    last = weights[f"Conv_{layers + 1}"]
    return (convolution(x, last["kernel"], 1) + last["bias"])[..., 0]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_is_the_published_network_with_group_normalisation(layers):
    net, params, inputs = small(layers=layers)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    expected = forward(weights, np.asarray(inputs, np.float64), layers)
    assert_close(jax.jit(net.apply)(params, inputs), expected, 1e-4)
    assert_close(net.apply(params, inputs), expected, 1e-4)


@pytest.mark.parametrize(
    ("size", "layers", "patches"),
    [((8, 8), 3, (1, 1)), ((8, 8), 1, (4, 4)), ((32, 32), 3, (4, 4)), ((256, 256), 3, (32, 32)), ((5, 1), 2, (2, 1))],
)
def test_small_images_have_patches_too(size, layers, patches):
    net = PatchDiscriminator(layers=layers)
    images = jnp.zeros((2, *size, 1))
    params = jax.eval_shape(net.init, jax.random.key(0), images)
    assert jax.eval_shape(net.apply, params, images).shape == (2, *patches)
    kernels = [params["params"][f"Conv_{number}"]["kernel"].shape for number in range(layers + 2)]
    widths = [1, 64, 128, 256, 512][: layers + 2]
    assert kernels == [(4, 4, *pair) for pair in zip(widths, [*widths[1:], 1], strict=True)]


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_published_patch(layers, field):
    """Of the reference above, whose kernels here are ones, without normalisation, which lets all pixels have a say."""
    x = np.eye(128)[:, :, None, None]  # one row of each image is 1
    for number in range(layers + 2):
        x = convolution(x, np.ones((4, 4, 1, 1)), 2 if number < layers else 1)
    assert (x[:, x.shape[1] // 2] > 0).sum() == field


def test_it_sees_each_image_alone():
    net, params, inputs = small()
    apply = jax.jit(net.apply)
    expected = apply(params, inputs)
    assert_close(jax.vmap(lambda image: apply(params, image[None])[0])(inputs), expected)
    others = apply(params, inputs.at[1:].set(7 - inputs[:0:-1] ** 3))
    assert_close(others[0], expected[0])
    assert not np.allclose(others[1], expected[1], atol=1e-2)


@pytest.mark.parametrize("size", [8, 32])
def test_images_of_both_precisions_and_gradients(size):
    net, params, inputs = small(layers=3, shape=(2, size, size, 1))
    exact = jax.jit(net.apply)(params, inputs)
    rounded = jax.jit(net.apply)(params, inputs.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32  # parameters and sums are
    assert_close(rounded, exact, 0.05)
    grads = jax.jit(jax.grad(lambda *args: jnp.square(net.apply(*args)).mean(), argnums=(0, 1)))(params, inputs)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 8, 8), "inputs: got shape (2, 8, 8); pass an array with 4 axes"),
        ({"layers": 0}, (2, 8, 8, 1), "layers: got 0; pass 1 or more"),
    ],
)
def test_bad_arguments_are_named(options, shape, message):
    with pytest.raises(ValueError) as caught:
        PatchDiscriminator(**options).init(jax.random.key(0), jnp.zeros(shape))
    assert str(caught.value) == message
