"""EfficientNet-Lite0 against recorded values, and against its definition in NumPy."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, golden, numerical_gradient

from jaxcl.nets import efficientnet
from jaxcl.nets.efficientnet import EfficientNetLite0, efficientnet_lite0_preprocess, load_efficientnet_lite0
from jaxcl.trees import parameter_count

WEIGHTS = Path(os.environ.get("JAXCL_DATA", "missing")) / "efficientnet_lite0.safetensors"
# Of each block: inputs, hidden channels, outputs, size of the kernel, stride.
BLOCKS = [
    (32, 32, 16, 3, 1),
    (16, 96, 24, 3, 2),
    (24, 144, 24, 3, 1),
    (24, 144, 40, 5, 2),
    (40, 240, 40, 5, 1),
    (40, 240, 80, 3, 2),
    (80, 480, 80, 3, 1),
    (80, 480, 80, 3, 1),
    (80, 480, 112, 5, 1),
    (112, 672, 112, 5, 1),
    (112, 672, 112, 5, 1),
    (112, 672, 192, 5, 2),
    (192, 1152, 192, 5, 1),
    (192, 1152, 192, 5, 1),
    (192, 1152, 192, 5, 1),
    (192, 1152, 320, 3, 1),
]


@jax.jit
def features_and_logits(params, images):
    net = EfficientNetLite0()
    return net.apply(params, images, method="features"), net.apply(params, images)


# The definition, with the names and layouts of the published file


def shapes():
    """{name: shape} of a file."""
    layers = {("_conv_stem", "_bn0"): (32, 3, 3, 3), ("_conv_head", "_bn1"): (1280, 320, 1, 1)}
    for number, (inputs, hidden, outputs, size, _) in enumerate(BLOCKS):
        block = f"_blocks.{number}."
        if number:
            layers[f"{block}_expand_conv", f"{block}_bn0"] = (hidden, inputs, 1, 1)
        layers[f"{block}_depthwise_conv", f"{block}_bn1"] = (hidden, 1, size, size)
        layers[f"{block}_project_conv", f"{block}_bn2"] = (outputs, hidden, 1, 1)
    named = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    for (convolution, norm), shape in layers.items():
        named[f"{convolution}.weight"] = shape
        named |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
        named[f"{norm}.num_batches_tracked"] = ()
    return named


def random_tensors():
    """Tensors of which each matters to the result."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes().items():
        value = rng.normal(size=shape)
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(0)
            continue
        if name.endswith("running_var"):
            value = 0.5 * np.exp(0.3 * value)  # so that neither images nor rounding errors fade or grow without end
        elif len(shape) > 1:
            value /= np.sqrt(np.prod(shape[1:]))
        elif ".weight" in name:
            value = 1 + 0.2 * value
        else:
            value *= 0.3
        tensors[name] = value.astype(np.float32)
    return tensors


def convolution(x, weight, stride):
    """[B, H, W, in] and [out, in / groups, h, w], padded as TensorFlow's SAME is: more at the end."""
    size, edges = weight.shape[-1], []
    for length in x.shape[1:3]:
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        edges.append((total // 2, total - total // 2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), *edges, (0, 0))), (size, size), axis=(1, 2))
    form = "bhwcij,coij->bhwc" if weight.shape[1] == 1 else "bhwcij,ocij->bhwo"
    weight = weight if weight.shape[1] > 1 else weight.reshape(len(weight), 1, size, size)
    return np.einsum(form, windows[:, ::stride, ::stride], weight, optimize=True)


def reference(tensors, x):
    """Features and logits."""

    def normalised(x, weights, norm, stride=1):
        x = convolution(x, tensors[f"{weights}.weight"].astype(np.float64), stride)
        scale, bias, mean, variance = (
            tensors[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * scale + bias

    def relu6(x):
        return np.minimum(np.maximum(x, 0), 6)

    x = relu6(normalised(np.float64(x), "_conv_stem", "_bn0", 2))
    for number, (inputs, _, outputs, _, stride) in enumerate(BLOCKS):
        block, y = f"_blocks.{number}.", x
        if number:
            y = relu6(normalised(y, f"{block}_expand_conv", f"{block}_bn0"))
        y = relu6(normalised(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = normalised(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if inputs == outputs and stride == 1 else y
    features = relu6(normalised(x, "_conv_head", "_bn1")).mean(axis=(1, 2))
    return features, features @ tensors["_fc.weight"].T.astype(np.float64) + tensors["_fc.bias"]


def write(path, tensors):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weights") / "efficientnet_lite0.safetensors", random_tensors())


@pytest.fixture(scope="module")
def params(file):
    return load_efficientnet_lite0(file)


def small_images(height=32, width=32, count=2):
    return np.random.default_rng(1).uniform(-1, 1, size=(count, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)], ids=str)
def test_the_network_is_the_published_one(params, size):
    images = small_images(*size)
    features, logits = features_and_logits(params, images)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    expected = reference(random_tensors(), images)
    assert np.abs(expected[0][0] - expected[0][1]).max() > 0.1  # the images are told apart
    assert_close(features, expected[0])
    assert_close(logits, expected[1])


def test_it_has_as_many_parameters_as_is_known():
    params = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    norms = sum(np.prod(shape) for name, shape in shapes().items() if name.endswith("running_mean"))
    assert parameter_count(params) == 4_652_008 - norms  # PyTorch's, whose scales of normalisation are folded here


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="JAXCL_DATA has no efficientnet_lite0.safetensors")
def test_the_published_weights_give_the_recorded_features():
    arrays, _ = golden("effnet_lite0")
    images = efficientnet_lite0_preprocess(arrays["image_u8_32"])
    features, logits = features_and_logits(load_efficientnet_lite0(), images)
    assert_close(features, arrays["pooled"])
    assert_close(logits, arrays["logits"])
    np.testing.assert_array_equal(np.argmax(logits, axis=1), arrays["logits_argmax"])


def test_no_example_sees_another(params):
    images = small_images()
    alone = jax.jit(jax.vmap(lambda image: EfficientNetLite0().apply(params, image[None], method="features")[0]))
    assert_close(alone(images), features_and_logits(params, images)[0])


def test_bfloat16_is_kept():
    net, images = EfficientNetLite0(), jnp.zeros((1, 32, 32, 3), jnp.bfloat16)
    params = jax.eval_shape(net.init, jax.random.key(0), images)
    rounded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    assert jax.eval_shape(net.apply, rounded, images).dtype == jnp.bfloat16
    assert jax.eval_shape(net.apply, params, images).dtype == jnp.float32


# The two forms of a convolution of each channel by itself


@pytest.mark.parametrize("form", [efficientnet._shifted, efficientnet._grouped])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_each_form_of_the_convolution_is_its_formula(form, size, stride):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(size, size, 4)).astype(np.float32)
    for height, width in ((7, 6), (1, 2), (8, 11)):
        x = rng.normal(size=(2, height, width, 4)).astype(np.float32)
        expected = convolution(x, kernel.transpose(2, 0, 1)[:, None], stride)
        assert_close(jax.jit(partial(form, stride=stride))(x, kernel), expected)
    assert_close(form(jnp.asarray(x), jnp.asarray(kernel), stride=stride), expected)
    rounded = jax.jit(partial(form, stride=stride))(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded, expected, 0.03)


@pytest.mark.parametrize("argument", [0, 1])
def test_the_convolution_has_its_gradient(argument):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(3, 3, 2))
    projection = rng.normal(size=(1, 2, 3, 2))

    def of(arguments, convolve):
        return (projection * convolve(*arguments)).sum()

    def at(value):
        arguments = [x, kernel]
        arguments[argument] = value
        return of(arguments, lambda x, kernel: convolution(x, kernel.transpose(2, 0, 1)[:, None], 2))

    form = partial(efficientnet._shifted, stride=2)
    gradients = jax.grad(lambda arguments: of(arguments, form))([jnp.float32(x), jnp.float32(kernel)])
    assert_close(gradients[argument], numerical_gradient(at, (x, kernel)[argument]), 1e-4)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 1), ("cuda", 17), ("tpu", 17)])
def test_each_platform_gets_its_form(platform, convolutions):
    net, images = EfficientNetLite0(), jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), images)
    text = jax.jit(net.apply).trace(params, images).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


# Preprocessing


@pytest.mark.parametrize(("given", "size"), [((32, 32), 224), ((40, 53), 17), ((28, 28), 28), ((9, 30), 20)], ids=str)
def test_images_are_resized_as_pillow_does(given, size):
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, *given, 3)).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    result = jax.jit(partial(efficientnet_lite0_preprocess, size=size))(images)
    assert result.dtype == jnp.float32
    levels = np.asarray(result) * 128 + 127 - np.stack(resized)
    assert np.abs(levels).max() <= 1 and (levels != 0).mean() < 0.02
    assert size != 224 or not levels.any()


def test_pixels_are_shifted_and_scaled_as_published():
    images = np.array([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(efficientnet_lite0_preprocess(images, size=None), [[[[-127 / 128, 0, 1]]]])
    np.testing.assert_array_equal(efficientnet_lite0_preprocess(images, size=2)[0, 1, 1], [-127 / 128, 0, 1])


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), 8, r"images: got shape \(2, 4, 4\); pass an array with 4 axes"),
        (np.zeros((2, 4, 4, 1), np.uint8), 8, r"images: got shape \(2, 4, 4, 1\); its last axis must be 3"),
        (np.zeros((2, 4, 4, 3), np.float32), 8, "images: got dtype float32; pass uint8, 0 to 255"),
        (np.zeros((2, 4, 4, 3), np.uint8), 0, "size: got 0; pass 1 or more"),
    ],
)
def test_preprocessing_refuses(images, size, message):
    with pytest.raises(ValueError, match=message):
        efficientnet_lite0_preprocess(images, size=size)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((4, 4, 3)), r"images: got shape \(4, 4, 3\); pass an array with 4 axes"),
        (jnp.zeros((1, 4, 4, 1)), r"images: got shape \(1, 4, 4, 1\); its last axis must be 3, the width of RGB"),
        (jnp.zeros((1, 4, 4, 3), jnp.uint8), "dtype uint8; pass them through efficientnet_lite0_preprocess"),
    ],
)
def test_the_network_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), images)


# Loading


def test_the_folder_of_data_is_where_weights_are_looked_for(file, params, monkeypatch):
    monkeypatch.setenv("JAXCL_DATA", str(file.parent))
    jax.tree.map(np.testing.assert_array_equal, load_efficientnet_lite0(), params)
    monkeypatch.delenv("JAXCL_DATA")
    with pytest.raises(ValueError, match=r"JAXCL_DATA: .* set it to the folder that holds efficientnet_lite0.safetens"):
        load_efficientnet_lite0()


def test_another_file_is_refused(tmp_path):
    tensors = random_tensors()
    del tensors["_blocks.3._bn1.running_var"]
    tensors |= {"_fc.weight": np.zeros((10, 1280), np.float32), "_se.weight": np.zeros(2, np.float32)}
    with pytest.raises(
        ValueError,
        match=r"missing: _blocks.3._bn1.running_var; unexpected: _se.weight; mis-shaped: _fc.weight \(10, 1280\)",
    ):
        load_efficientnet_lite0(write(tmp_path / "x.safetensors", tensors))
