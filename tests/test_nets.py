"""Networks against their formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import assert_close, host_mesh
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl import nets
from jaxcl.nets import attention
from jaxcl.nets.gelu import gelu
from jaxcl.nets.layer_norm import LayerNorm
from jaxcl.trees import parameter_count


@pytest.mark.parametrize("hidden", [(), (5,), (5, 3)])
def test_mlp_is_affine_maps_with_relu_between(hidden):
    net = nets.MLP(hidden, classes=4)
    inputs = jax.random.normal(jax.random.key(0), (6, 2, 3))
    params = net.init(jax.random.key(1), inputs)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that biases count
    x = np.asarray(inputs, np.float64).reshape(6, 6)
    for layer in range(len(hidden) + 1):
        x = x if layer == 0 else np.maximum(x, 0)
        weights = params["params"][f"Dense_{layer}"]
        x = x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"], np.float64)
    np.testing.assert_allclose(net.apply(params, inputs), x, atol=1e-5)
    np.testing.assert_allclose(jax.jit(net.apply)(params, inputs), x, atol=1e-5)
    assert net.apply(params, inputs.astype(jnp.bfloat16)).shape == (6, 4)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", [(1, 8), (8, 1)])
def test_attention_to_few_examples_at_a_time_is_that_to_all(monkeypatch, rows, split):
    """Parts that examples share and parts of their own, grouped heads, and a batch that is no multiple of a few."""
    keys = jax.random.split(jax.random.key(0), 6)
    query = jax.random.normal(keys[0], (8, 5, 4, 3))
    key, value = (jax.random.normal(own, (8, 6, 2, 3)) for own in keys[1:3])
    bias = jax.random.normal(keys[3], (rows[0], 4, 5, 6))
    mask = jax.random.bernoulli(keys[4], 0.7, (rows[1], 1, 5, 6)).at[..., 0].set(True)
    weights = jax.random.normal(keys[5], query.shape)

    def gradient(attend):
        def weighed(query, key, value, bias):
            return (attend(query, key, value, bias=bias, mask=mask, scale=0.7) * weights).sum()

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2, 3)))

    arguments = query, key, value, bias
    expected = gradient(jax.nn.dot_product_attention)(*arguments)
    if split:
        of_batch = NamedSharding(host_mesh(), PartitionSpec("devices"))
        arguments = *jax.device_put((query, key, value), of_batch), bias
    monkeypatch.setattr(attention, "_IN_CACHE", 3 * 4 * 5 * 6)
    few = gradient(attention.dot_product_attention)
    assert "while" in few.lower(*arguments).as_text()
    jax.tree.map(assert_close, few(*arguments), expected)


def convolution(x, kernel, stride):
    """NumPy, zeros on all sides: [B, H, W, c] and [size, size, c, channels]."""
    edge = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijcd->bhwd", windows[:, ::stride, ::stride], kernel, optimize=True)


def group_norm(x, weights, groups):
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = (moment(grouped, axis=(1, 3), keepdims=True) for moment in (np.mean, np.var))
    return ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * weights["scale"] + weights["bias"]


def resnet18(params, x, *, small_images):
    """The forward pass of He et al. 2016 with group normalisation, in NumPy."""

    def normalised(weights, number, x, stride):
        x = convolution(x, weights[f"Conv_{number}"]["kernel"], stride)
        return group_norm(x, weights[f"GroupNorm_{number}"], GROUPS[x.shape[-1]])

    x = np.maximum(normalised(params, 0, x, 1 if small_images else 2), 0)
    if not small_images:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        x = windows[:, ::2, ::2].max(axis=(-2, -1))
    for block in range(8):
        weights, stride = params[f"_Block_{block}"], 2 if block in (2, 4, 6) else 1
        y = normalised(weights, 1, np.maximum(normalised(weights, 0, x, stride), 0), 1)
        x = np.maximum(y + (normalised(weights, 2, x, stride) if stride == 2 else x), 0)
    return x.mean(axis=(1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def small_resnet(small_images=True, width=8):
    """The network, parameters that all count, and inputs."""
    net = nets.ResNet18(classes=5, width=width, small_images=small_images)
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(4, 17, 12, 3)), jnp.float32)

    def draw(leaf):  # the initialiser would be compiled for each of 62 leaves
        if leaf.ndim == 1:
            return jnp.asarray(1 + 0.2 * rng.normal(size=leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    return net, jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), inputs)), inputs


# Groups by channels: 32, or as many as divide both 32 and the channels.
GROUPS = {8: 8, 16: 16, 32: 32, 64: 32, 6: 2, 12: 4, 24: 8, 48: 16}


@pytest.mark.parametrize(("small_images", "width"), [(True, 8), (False, 6)])
def test_resnet18_is_the_published_network(small_images, width):
    net, params, inputs = small_resnet(small_images, width)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    expected = resnet18(weights, np.asarray(inputs, np.float64), small_images=small_images)
    assert_close(jax.jit(net.apply)(params, inputs), expected, 1e-4)


@pytest.mark.parametrize(
    ("net", "stem_and_head"),
    [
        (nets.ResNet18(classes=10), 3 * 3 * 3 * 64 + 2 * 64 + (512 + 1) * 10),
        (nets.ResNet18(classes=1000, small_images=False), 7 * 7 * 3 * 64 + 2 * 64 + (512 + 1) * 1000),
    ],
)
def test_resnet18_has_as_many_parameters_as_is_known(net, stem_and_head):
    # Convolutions, then scales and shifts of the norms; from the second stage on with a shortcut.
    stages = [
        4 * 9 * 64 * 64 + 4 * 2 * 64,
        9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128 + 5 * 2 * 128,
        9 * 128 * 256 + 3 * 9 * 256 * 256 + 128 * 256 + 5 * 2 * 256,
        9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512 + 5 * 2 * 512,
    ]
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert parameter_count(params) == sum(stages) + stem_and_head
    assert parameter_count(params) in (11_173_962, 11_689_512)  # what PyTorch's have with batch normalisation


def test_vgg16_is_the_published_network():
    net, rng = nets.VGG16(classes=3, width=2), np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(2, 37, 32, 3)), jnp.float32)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 + rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32),
        jax.eval_shape(net.init, jax.random.key(0), inputs),
    )
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    x, layer = np.asarray(inputs, np.float64), 0
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):  # configuration D
        for _ in range(convolutions):
            x = convolution(x, weights[f"Conv_{layer}"]["kernel"], 1)
            x = np.maximum(group_norm(x, weights[f"GroupNorm_{layer}"], x.shape[-1]), 0)
            layer += 1
        assert x.shape[-1] == min(2 * 2**stage, 16)
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        x = np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))
    expected = x.mean(axis=(1, 2)) @ weights["head"]["kernel"] + weights["head"]["bias"]
    assert_close(jax.jit(net.apply)(params, inputs), expected, 1e-4)


def test_vgg16_has_as_many_weights_as_is_known():
    net = nets.VGG16(classes=10)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernels = {path: own for path, own in params.items() if path.startswith("Conv")}
    assert parameter_count(kernels) == 14_714_688 - 4_224  # PyTorch's `features`, less their biases
    assert parameter_count(params["head"]) == 5_130


def test_resnet18_sees_each_example_alone():
    net, params, inputs = small_resnet()
    apply = jax.jit(net.apply)
    others = inputs.at[1:].set(7 - inputs[:0:-1] ** 3)
    assert_close(apply(params, others)[0], apply(params, inputs)[0], 1e-5)
    assert_close(apply(params, inputs[:1])[0], apply(params, inputs)[0], 1e-5)
    assert not np.allclose(apply(params, others)[1], apply(params, inputs)[1], atol=1e-2)


def test_resnet18_in_bfloat16_and_its_gradient():
    net, params, inputs = small_resnet()

    def loss(params, inputs):
        return jnp.square(net.apply(params, inputs)).mean()

    exact = jax.jit(net.apply)(params, inputs)
    rounded = jax.jit(net.apply)(params, inputs.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32  # parameters and sums are
    assert_close(rounded, exact, 0.05)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params, inputs)):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


def test_resnet18_refuses_images_without_channels():
    with pytest.raises(ValueError, match=r"inputs: got shape \(2, 8, 8\); pass an array with 4 axes"):
        nets.ResNet18(classes=2, width=8).init(jax.random.key(0), jnp.zeros((2, 8, 8)))


@pytest.mark.parametrize("shape", [(3, 4, 6, 2), (2, 5, 7, 1), (2, 1, 4, 3)])
def test_pooling_and_its_gradient_are_those_of_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    pools = (nets.max_pool_2x2, lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    (ours, pull), (theirs, their_pull) = (jax.vjp(pool, x) for pool in pools)
    np.testing.assert_array_equal(ours, theirs)
    cotangent = jax.random.normal(jax.random.key(1), ours.shape)
    np.testing.assert_array_equal(pull(cotangent)[0], their_pull(cotangent)[0])


def test_gelu_and_its_derivatives_are_those_of_the_normal_distribution():
    x = np.concatenate([np.linspace(-30, 30, 1001), [0.0, 1e-6, -1e-6]])
    below, density = scipy.stats.norm.cdf(x), scipy.stats.norm.pdf(x)
    inputs = jnp.asarray(x, jnp.float32)
    slope = jax.grad(gelu)
    for found, expected in (
        (gelu(inputs), x * below),
        (jax.vmap(slope)(inputs), below + x * density),
        (jax.vmap(jax.grad(slope))(inputs), (2 - x**2) * density),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    half = gelu(inputs.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), x * below, atol=0.02, rtol=0.02)
    narrow = jnp.linspace(-4, 4, 101, dtype=jnp.bfloat16)  # far below 0 too, where 1 + erf of so few bits is 0
    np.testing.assert_allclose(gelu(narrow).astype(jnp.float32), gelu(narrow.astype(jnp.float32)), rtol=0.005)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layer_norm_and_its_derivatives_are_those_of_flax(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x, change, weights = (2 + 3 * jax.random.normal(key, (3, 4, 16)) for key in keys[:3])
    ours, theirs = LayerNorm(1e-3, dtype), nn.LayerNorm(1e-3, dtype)
    params = {"params": dict(zip(("scale", "bias"), jax.random.normal(keys[3], (2, 16)), strict=True))}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ours.init(keys[0], x))

    def all_of(net):
        def weighed(params, x):
            return (net.apply(params, x) * weights).sum()

        first = jax.grad(weighed, argnums=(0, 1))
        forward = jax.jvp(net.apply, (params, x), (params, change))
        return net.apply(params, x), forward, first(params, x), jax.jvp(first, (params, x), (params, change))

    found, expected = jax.jit(lambda: (all_of(ours), all_of(theirs)))()
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)
    tolerance = 1e-5 if dtype is None else 0.02
    jax.tree.map(lambda ours, theirs: assert_close(ours, theirs, tolerance), found, expected)


def test_what_attention_keeps_is_no_copy(monkeypatch):
    monkeypatch.setattr(attention, "_IN_CACHE", 2 * 4 * 5 * 5)
    query, key, value = (jnp.ones((8, 5, 4, 3)) for _ in range(3))
    forward = jax.jit(lambda *parts: jax.vjp(attention.dot_product_attention, *parts)).lower(query, key, value)
    assert forward.as_text().count("stablehlo.dynamic_update_slice") == 1  # of the outcome, part by part
