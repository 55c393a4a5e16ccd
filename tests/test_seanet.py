"""SEANet against its formulas in NumPy, and what it can see of the audio."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl import nets
from jaxcl.trees import parameter_count

STRIDES, DILATIONS = (2, 3), (1, 3)
HOP, CHANNELS, WIDTH = 6, 4, 5


def networks(strides=STRIDES, dilations=DILATIONS):
    return (
        nets.SEANetEncoder(width=WIDTH, channels=CHANNELS, strides=strides, dilations=dilations),
        nets.SEANetDecoder(channels=CHANNELS, strides=strides, dilations=dilations),
    )


def drawn(net, inputs):
    """Parameters that all count: the initialiser would be compiled for each, and leaves biases at zero."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), inputs))


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The networks in NumPy, float64, one example


def elu(x):
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def convolution(weights, x, dilation=1):
    """[L, c] to [L, channels] with zeros on both sides alike."""
    kernel, edge = weights["kernel"], dilation * (len(weights["kernel"]) - 1) // 2
    padded = np.pad(x, ((edge, edge), (0, 0)))
    return sum(padded[tap * dilation :][: len(x)] @ kernel[tap] for tap in range(len(kernel))) + weights["bias"]


def strided_convolution(weights, x, stride):
    """[L, c] to [L / stride, channels]: windows of twice the stride, the first half a stride before the start."""
    padded = np.pad(x, ((stride // 2, 2 * stride), (0, 0)))
    windows = [padded[start : start + 2 * stride] for start in range(0, len(x), stride)]
    return np.einsum("ltc,tcd->ld", np.array(windows), weights["kernel"]) + weights["bias"]


def transposed_convolution(weights, x, stride):
    """Each input adds its kernel to the outputs; what lies before the first and behind the last is dropped."""
    kernel = weights["kernel"]
    outputs = np.zeros((len(x) * stride + stride, kernel.shape[-1]))
    for position, vector in enumerate(x):
        outputs[position * stride : position * stride + 2 * stride] += np.einsum("c,tcd->td", vector, kernel)
    return outputs[stride // 2 :][: len(x) * stride] + weights["bias"]


def residual_units(layer, x, dilations):
    for dilation in dilations:
        inner = convolution(layer(), elu(x), dilation)
        x = x + convolution(layer(), elu(inner))
    return x


def layers(params, kind):
    """A function that gives the next layer of a kind."""
    numbers = iter(range(100))
    return lambda: jax.tree.map(np.float64, params["params"][f"{kind}_{next(numbers)}"])


def encode(params, audio, strides, dilations):
    layer = layers(params, "Conv")
    x = convolution(layer(), np.float64(audio)[:, None])
    for stride in strides:
        x = residual_units(layer, x, dilations)
        x = strided_convolution(layer(), elu(x), stride)
    return convolution(layer(), elu(x))


def decode(params, codes, strides, dilations):
    layer, widen = layers(params, "Conv"), layers(params, "_Upsample")
    x = convolution(layer(), np.float64(codes))
    for stride in strides[::-1]:
        x = residual_units(layer, transposed_convolution(widen(), elu(x), stride), dilations)
    return convolution(layer(), elu(x))[:, 0]


@pytest.mark.parametrize(("strides", "dilations"), [(STRIDES, DILATIONS), ((5, 1, 4), (2,)), ((4,), ())])
def test_the_networks_are_their_formulas(strides, dilations):
    encoder, decoder = networks(strides, dilations)
    hop = int(np.prod(strides))
    audio, codes = noise(1, 2, 4 * hop), noise(2, 2, 4, WIDTH)
    params = drawn(encoder, audio)
    actual = jax.jit(encoder.apply)(params, audio)
    assert actual.shape == codes.shape
    assert_close(actual, [encode(params, clip, strides, dilations) for clip in audio], 1e-4)
    params = drawn(decoder, codes)
    actual = jax.jit(decoder.apply)(params, codes)
    assert actual.shape == audio.shape
    assert_close(actual, [decode(params, clip, strides, dilations) for clip in codes], 1e-4)


def test_they_have_as_many_parameters_as_the_papers_layers():
    encoder, decoder = nets.SEANetEncoder(width=64), nets.SEANetDecoder()
    stages = [(32, 2), (64, 4), (128, 5)]
    # Weights and biases: three units of two convolutions a stage, and the convolution of twice the stride.
    units = sum(3 * (3 * c * c // 2 + c // 2 + c // 2 * c + c) for c, _ in stages)
    down = sum(2 * stride * c * 2 * c + 2 * c for c, stride in stages)
    up = sum(2 * stride * c * 2 * c + c for c, stride in stages)
    ends = 7 * 32 + 32 + 7 * 256 * 64 + 64
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 80)))
    assert parameter_count(shapes) == units + down + ends
    for codes in (jnp.zeros((1, 2, 64)), jnp.zeros((3, 7, 64))):  # lengths and batches make no difference
        shapes = jax.eval_shape(decoder.init, jax.random.key(0), codes)
        assert parameter_count(shapes) == units + up + 7 * 64 * 256 + 256 + 7 * 32 + 1


def test_a_transposed_convolution_keeps_the_scale():
    """An output is a sum over two positions of all inputs, so that a weight's variance is one over twice these."""
    decoder = nets.SEANetDecoder(channels=16, strides=(8,), dilations=())
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2, 4)))["params"]["_Upsample_0"]
    assert params["kernel"].shape == (16, 32, 16)
    assert float(params["kernel"].std()) == pytest.approx((2 * 32) ** -0.5, rel=0.03)
    assert not np.asarray(params["bias"]).any()


# What depends on what


def seen(convolutions, position):
    """First and last input that an output depends on, layer by layer from the last: (before, after, stride) each."""
    first = last = position
    for before, after, stride in reversed(convolutions):
        first, last = first * stride - before, last * stride + after
    return first, last


def reach(strides, dilations):
    """The encoder's layers as `seen` takes them; a layer of stride s sees 2s samples from s // 2 before on."""
    convolutions = [(3, 3, 1)]
    for stride in strides:
        convolutions += [(dilation, dilation, 1) for dilation in dilations]
        convolutions.append((stride // 2, 2 * stride - 1 - stride // 2, stride))
    return [*convolutions, (3, 3, 1)]


@functools.cache
def dependence(strides, dilations):
    """By derivatives: samples that a vector sees [frames, samples], vectors that a sample sees [samples, frames]."""
    encoder, decoder = networks(strides, dilations)
    hop, frames = int(np.prod(strides)), 24
    audio, codes = noise(4, 1, frames * hop), noise(5, 1, frames, WIDTH)
    params = drawn(encoder, audio)
    of_audio = jax.jit(jax.jacrev(lambda audio: encoder.apply(params, audio).sum(axis=-1)))(audio)[0, :, 0]
    params = drawn(decoder, codes)
    of_codes = jax.jit(jax.jacfwd(lambda codes: decoder.apply(params, codes)))(codes)[0, :, 0].sum(axis=-1)
    return np.asarray(of_audio) != 0, np.asarray(of_codes) != 0


@pytest.mark.parametrize(("strides", "dilations"), [((2, 4), (1, 3)), ((3, 2), (1,))])
def test_a_vector_sees_as_far_to_either_side(strides, dilations):
    encoded, _ = dependence(strides, dilations)
    hop = int(np.prod(strides))
    for frame in (10, 12):
        samples = np.flatnonzero(encoded[frame])
        first, last = seen(reach(strides, dilations), frame)
        assert (samples[0], samples[-1]) == (first, last)
        before, after = frame * hop - first, last - (frame * hop + hop - 1)
        if all(stride % 2 == 0 for stride in strides):
            assert before == after
        else:  # one input of the first layer more
            assert after - before == 1


@pytest.mark.parametrize(("strides", "dilations"), [((2, 4), (1, 3)), ((3, 2), (1,))])
def test_the_decoder_reaches_as_far_as_the_encoder_sees(strides, dilations):
    """Forwards from codes, it is the encoder's geometry read backwards."""
    encoded, decoded = dependence(strides, dilations)
    for frame in (10, 12):
        seen_by, reached = np.flatnonzero(encoded[frame]), np.flatnonzero(decoded[:, frame])
        assert (seen_by[0], seen_by[-1]) == (reached[0], reached[-1])


# Training


def test_the_gradient_reaches_every_parameter_and_is_the_numerical_one():
    encoder, decoder = networks()
    audio = noise(7, 2, 4 * HOP)
    params = drawn(encoder, audio)
    params = (params, drawn(decoder, jnp.zeros((2, 4, WIDTH))))

    def loss(params):
        return jnp.square(decoder.apply(params[1], encoder.apply(params[0], audio)) - audio).mean()

    grads = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)

    def expected(step, direction):
        moved = jax.tree.map(lambda leaf, along: np.float64(leaf) + step * along, params, direction)
        decoded = [decode(moved[1], encode(moved[0], clip, STRIDES, DILATIONS), STRIDES, DILATIONS) for clip in audio]
        return np.square(np.array(decoded) - audio).mean()

    rng = np.random.default_rng(8)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    slope = (expected(1e-5, direction) - expected(-1e-5, direction)) / 2e-5
    along = jax.tree.map(lambda grad, way: np.sum(np.float64(grad) * way), grads, direction)
    assert_close(sum(jax.tree.leaves(along)), slope, 1e-4)


def test_bfloat16_audio_and_codes():
    """Parameters and sums are float32."""
    for net, function, shape in zip(networks(), (encode, decode), ((4 * HOP,), (4, WIDTH)), strict=True):
        inputs = jnp.asarray(noise(9, 1, *shape), jnp.bfloat16)
        params = drawn(net, inputs)
        outputs = jax.jit(net.apply)(params, inputs)
        assert outputs.dtype == jnp.float32
        assert_close(outputs[0], function(params, inputs[0].astype(jnp.float32), STRIDES, DILATIONS), 0.05)


def test_seeds_under_vmap():
    encoder, _ = networks((2,), (1,))
    audio = noise(11, 3, 1, 8)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), drawn(encoder, audio[0]))
    together = jax.jit(jax.vmap(encoder.apply))(params, audio)
    for seed in range(3):
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        assert_close(together[seed, 0], encode(own, audio[seed, 0], (2,), (1,)), 1e-4)


# Bad arguments


@pytest.mark.parametrize(
    ("net", "inputs", "message"),
    [
        (networks()[0], (2, 13), "audio: got 13 samples; pass a multiple of 6, the product of the strides: pad with"),
        (networks()[0], (2, 0), "audio: got 0 samples; pass a multiple of 6"),
        (networks()[0], (12,), "audio: got shape (12,); pass an array with 2 axes"),
        (networks()[1], (2, 4), "codes: got shape (2, 4); pass an array with 3 axes"),
        (nets.SEANetEncoder(width=0), (1, 40), "width: got 0; pass 1 or more"),
        (nets.SEANetEncoder(width=4, channels=1), (1, 40), "channels: got 1; pass 2 or more"),
        (nets.SEANetEncoder(width=4, strides=(2, 0)), (1, 40), "strides: got 0; pass 1 or more"),
        (nets.SEANetDecoder(dilations=(0,)), (1, 4, 4), "dilations: got 0; pass 1 or more"),
    ],
)
def test_bad_arguments_are_named(net, inputs, message):
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(inputs))
    assert str(caught.value).startswith(message)
