"""Encoders and decoders of images against plain NumPy, and what a convolution must and must not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl import nets
from jaxcl.trees import parameter_count


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def shaken(params):
    """Parameters with no entry left at 0 or 1, so that each counts."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(structure, [leaf + 0.3 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves])


def dense(weights, x):
    return x @ weights["kernel"] + weights["bias"]


def layer_norm(weights, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * weights["scale"] + weights["bias"]


def gelu(x):
    """The tanh form, which Linen has by default."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mixed(params, x, blocks):
    for number in range(blocks):
        weights = params[f"_MixerBlock_{number}"]
        y = layer_norm(weights["LayerNorm_0"], x).swapaxes(1, 2)
        x = x + dense(weights["Dense_1"], gelu(dense(weights["Dense_0"], y))).swapaxes(1, 2)
        y = layer_norm(weights["LayerNorm_1"], x)
        x = x + dense(weights["Dense_3"], gelu(dense(weights["Dense_2"], y)))
    return layer_norm(params["LayerNorm_0"], x)


@pytest.mark.parametrize("jitted", [False, True])
def test_the_patch_encoder_is_a_mixer_of_patches(jitted):
    net = nets.PatchEncoder(width=5, patch=2, hidden=7, blocks=2)
    images = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
    params = shaken(net.init(jax.random.key(0), images))
    weights = float64(params["params"])
    patches = np.array(
        [[image[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2, 4)] for image in images], np.float64
    )
    expected = dense(weights["Dense_1"], mixed(weights, dense(weights["Dense_0"], patches), 2))
    apply = jax.jit(net.apply) if jitted else net.apply
    assert_close(apply(params, images), expected.reshape(3, 2, 3, 5), 1e-4)


def test_the_patch_decoder_lays_patches_where_they_belong():
    net = nets.PatchDecoder(image_channels=2, patch=2, hidden=7, blocks=1)
    codes = np.random.default_rng(1).normal(size=(3, 2, 3, 5)).astype(np.float32)
    params = shaken(net.init(jax.random.key(0), codes))
    weights = float64(params["params"])
    patches = dense(weights["output"], mixed(weights, dense(weights["Dense_0"], codes.reshape(3, 6, 5)), 1))
    expected = np.zeros((3, 4, 6, 2))
    for position in range(6):
        i, j = 2 * (position // 3), 2 * (position % 3)
        expected[:, i : i + 2, j : j + 2] = patches[:, position].reshape(3, 2, 2, 2)
    assert_close(net.apply(params, codes), expected, 1e-4)


def convolution(weights, x, stride=1):
    """3 x 3 (or 1 x 1) with zeros around; a stride of 2 pads after the end alone, as "SAME" does at even sizes."""
    size = weights["kernel"].shape[0]
    before = 0 if stride == 2 else size // 2
    after = size // 2 if stride == 1 else 1
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcd->bhwd", windows, weights["kernel"], optimize=True) + weights["bias"]


def swish_norm(weights, x, groups):
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = (moment(grouped, axis=(1, 3), keepdims=True) for moment in (np.mean, np.var))
    y = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * weights["scale"] + weights["bias"]
    return y / (1 + np.exp(-y))


def residual_block(weights, x):
    y = convolution(weights["Conv_0"], swish_norm(weights["GroupNorm_0"], x, np.gcd(32, x.shape[-1])))
    y = convolution(weights["Conv_1"], swish_norm(weights["GroupNorm_1"], y, np.gcd(32, y.shape[-1])))
    return y + (convolution(weights["Conv_2"], x) if "Conv_2" in weights else x)


def test_the_convolutional_encoder_is_vqgans():
    net = nets.ConvEncoder(width=3, channels=4, multipliers=(1, 2), blocks=1)
    images = np.random.default_rng(2).normal(size=(2, 4, 6, 3)).astype(np.float32)
    params = shaken(net.init(jax.random.key(0), images))
    weights = float64(params["params"])
    x = residual_block(weights["_ResidualBlock_0"], convolution(weights["Conv_0"], images))
    x = residual_block(weights["_ResidualBlock_1"], convolution(weights["Conv_1"], x, stride=2))
    expected = convolution(weights["Conv_2"], swish_norm(weights["GroupNorm_0"], x, 8))
    assert_close(jax.jit(net.apply)(params, images), expected, 1e-4)


def test_the_convolutional_decoder_is_vqgans():
    net = nets.ConvDecoder(image_channels=3, channels=4, multipliers=(1, 2), blocks=1)
    codes = np.random.default_rng(2).normal(size=(2, 2, 3, 5)).astype(np.float32)
    params = shaken(net.init(jax.random.key(0), codes))
    weights = float64(params["params"])
    x = residual_block(weights["_ResidualBlock_0"], convolution(weights["Conv_0"], codes))
    x = convolution(weights["Conv_1"], x.repeat(2, axis=1).repeat(2, axis=2))
    x = residual_block(weights["_ResidualBlock_1"], x)
    expected = convolution(weights["output"], swish_norm(weights["GroupNorm_0"], x, 4))
    assert_close(jax.jit(net.apply)(params, codes), expected, 1e-4)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (nets.PatchEncoder(5, 4, 8, 1), nets.PatchDecoder(1, 4, 8, 1)),
        (nets.ConvEncoder(5, 4, (1, 1, 2), 1), nets.ConvDecoder(1, 4, (1, 1, 2), 1)),
    ],
)
def test_decoders_give_back_the_size_and_gradients_reach_every_parameter(encoder, decoder):
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 1))
    first = jax.jit(encoder.init)(jax.random.key(1), images)
    codes = jax.jit(encoder.apply)(first, images)
    assert codes.shape == (2, 2, 3, 5)
    second = jax.jit(decoder.init)(jax.random.key(2), codes)
    assert jax.jit(decoder.apply)(second, codes).shape == images.shape
    assert jax.jit(encoder.apply)(first, images.astype(jnp.bfloat16)).shape == codes.shape

    def error(params):
        return jnp.square(decoder.apply(params[1], encoder.apply(params[0], images)) - images).sum()

    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.jit(jax.grad(error))((first, second))))
    assert parameter_count(first) > 0


@pytest.mark.parametrize(("net", "step"), [(nets.PatchEncoder(5, 4), 4), (nets.ConvEncoder(5, 4, (1, 1, 1)), 4)])
def test_sizes_that_do_not_divide_are_refused(net, step):
    with pytest.raises(
        ValueError, match=rf"images: got shape \(2, 8, 10, 1\); pass a height and width that {step} divides"
    ):
        net.init(jax.random.key(0), jnp.zeros((2, 8, 10, 1)))
    with pytest.raises(ValueError, match="images: got shape"):
        net.init(jax.random.key(0), jnp.zeros((8, 8, 1)))
