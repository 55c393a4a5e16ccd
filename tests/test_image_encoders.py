"""ResNet-50 and ConvMixer against renderings in NumPy, from files with the tensor names of their publishers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy.special import erf

from jaxcl import nets
from jaxcl.nets import convmixer

pytest.importorskip("safetensors")
from safetensors.numpy import save_file

RNG = np.random.default_rng(0)
IMAGES = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
BLOCKS, WIDTH, PROJECTED = (2, 1, 1, 1), 8, 12


def draw(*shape):
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


def normalisation(name, channels):
    return {
        f"{name}.weight": 1 + 0.2 * draw(channels), f"{name}.bias": draw(channels),
        f"{name}.running_mean": draw(channels), f"{name}.running_var": 0.5 + RNG.random(channels).astype(np.float32),
        f"{name}.num_batches_tracked": np.array(3, np.int64),
    }  # fmt: skip


def convolve(x, weight, stride=1, bias=None):
    """[H, W, C] as PyTorch does, with size // 2 zeros on each side; each channel by itself if weights have one."""
    size, depthwise = weight.shape[-1], weight.shape[1] == 1 and x.shape[-1] > 1
    x = np.pad(x, ((size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]
    made = (
        np.einsum("hwcij,cij->hwc", windows, weight[:, 0])
        if depthwise
        else np.einsum("hwcij,ocij->hwo", windows, weight)
    )
    return made if bias is None else made + bias


def normed(x, tensors, name):
    weight, bias, mean, variance = (
        tensors[f"{name}.{end}"] for end in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def mean_of_two(x):
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def relu(x):
    return np.maximum(x, 0)


def resnet_tensors(clip):
    found = {}

    def convolution(name, norm, out, inputs, size):
        found[f"{name}.weight"] = draw(out, inputs, size, size)
        found.update(normalisation(norm, out))

    if clip:
        for number, (out, inputs) in enumerate(((WIDTH // 2, 3), (WIDTH // 2, WIDTH // 2), (WIDTH, WIDTH // 2)), 1):
            convolution(f"conv{number}", f"bn{number}", out, inputs, 3)
    else:
        convolution("conv1", "bn1", WIDTH, 3, 7)
    inputs = WIDTH
    for stage, blocks in enumerate(BLOCKS):
        width = WIDTH * 2**stage
        for number in range(blocks):
            name = f"layer{stage + 1}.{number}"
            convolution(f"{name}.conv1", f"{name}.bn1", width, inputs, 1)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            convolution(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if not number:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    if clip:
        found["attnpool.positional_embedding"] = draw(5, inputs)
        for part, out in (("q", inputs), ("k", inputs), ("v", inputs), ("c", PROJECTED)):
            found |= {f"attnpool.{part}_proj.weight": draw(out, inputs), f"attnpool.{part}_proj.bias": draw(out)}
    else:
        found |= {"fc.weight": draw(7, inputs), "fc.bias": draw(7)}
    return found


def resnet_feature(tensors, x, clip):
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = x.astype(np.float64)

    def layer(x, convolution, norm, stride=1):
        return normed(convolve(x, tensors[f"{convolution}.weight"], stride), tensors, norm)

    if clip:
        for number in (1, 2, 3):
            x = relu(layer(x, f"conv{number}", f"bn{number}", 2 if number == 1 else 1))
        x = mean_of_two(x)
    else:
        x = np.pad(relu(layer(x, "conv1", "bn1", 2)), ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max(axis=(3, 4))
    for stage, blocks in enumerate(BLOCKS):
        for number in range(blocks):
            name, stride = f"layer{stage + 1}.{number}", 2 if stage and not number else 1
            y = relu(layer(x, f"{name}.conv1", f"{name}.bn1"))
            y = relu(layer(y, f"{name}.conv2", f"{name}.bn2", 1 if clip else stride))
            around = x
            if clip and stride == 2:
                y, around = mean_of_two(y), mean_of_two(x)
            if not number:
                around = layer(around, f"{name}.downsample.0", f"{name}.downsample.1", 1 if clip else stride)
            x = relu(layer(y, f"{name}.conv3", f"{name}.bn3") + around)
    places = x.reshape(-1, x.shape[-1])
    if not clip:
        return places.mean(axis=0)
    places = np.concatenate([places.mean(axis=0, keepdims=True), places]) + tensors["attnpool.positional_embedding"]
    query, key, value = (
        places @ tensors[f"attnpool.{part}_proj.weight"].T + tensors[f"attnpool.{part}_proj.bias"] for part in "qkv"
    )
    heads = []
    for own in np.split(np.arange(places.shape[1]), places.shape[1] // 64):
        chances = np.exp(query[0, own] @ key[:, own].T / 8)
        heads.append(chances / chances.sum() @ value[:, own])
    return np.concatenate(heads) @ tensors["attnpool.c_proj.weight"].T + tensors["attnpool.c_proj.bias"]


@pytest.mark.parametrize("kind", ["torchvision", "dino", "clip"])
def test_resnet_features_are_those_of_the_formula(kind, tmp_path):
    tensors = resnet_tensors(kind == "clip")
    prefix = {"torchvision": "", "dino": "backbone.", "clip": "visual."}[kind]
    file = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if prefix:  # what else such files hold
        file |= {"head.mlp.0.weight": draw(2, 2), "positional_embedding": draw(77, 8)}
    save_file(file, tmp_path / "resnet.safetensors")
    net, params = nets.load_resnet50(tmp_path / "resnet.safetensors")
    assert (net.blocks, net.width, net.positions) == (BLOCKS, WIDTH, 5 if kind == "clip" else None)
    expected = np.stack([resnet_feature(tensors, image, kind == "clip") for image in IMAGES])
    assert_close(jax.jit(net.apply)(params, IMAGES), expected, 1e-4)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_normalisation_of_another_width_is_listed(shape, tmp_path):
    tensors = resnet_tensors(False) | {f"bn1.{name}": np.ones(shape, np.float32) for name in ("weight", "running_var")}
    save_file(tensors, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"mis-shaped: .*bn1.* \(one number for each of \d+ channels is needed\)"):
        nets.load_resnet50(tmp_path / "resnet.safetensors")


def test_resnet50_has_as_many_parameters_as_is_known():
    """25,557,032 of torchvision's less the classifier's 2,049,000 and, folded, a scale a channel: 26,560."""
    shapes = jax.eval_shape(nets.ResNet50().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 25_557_032 - 2_049_000 - 26_560


def convmixer_tensors(width, layers, patch, size):
    found = {"stem.0.weight": draw(width, 3, patch, patch), "stem.0.bias": draw(width)} | normalisation("stem.2", width)
    for number in range(layers):
        name = f"blocks.{number}"
        found |= {f"{name}.0.fn.0.weight": draw(width, 1, size, size), f"{name}.0.fn.0.bias": draw(width)}
        found |= {f"{name}.1.weight": draw(width, width, 1, 1), f"{name}.1.bias": draw(width)}
        found |= normalisation(f"{name}.0.fn.2", width) | normalisation(f"{name}.3", width)
    return found


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def convmixer_feature(tensors, x, layers, patch, activation):
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    cut = x.astype(np.float64).reshape(x.shape[0] // patch, patch, x.shape[1] // patch, patch, 3)
    x = np.einsum("aibjc,ocij->abo", cut, tensors["stem.0.weight"]) + tensors["stem.0.bias"]
    x = normed(activation(x), tensors, "stem.2")
    for number in range(layers):
        name = f"blocks.{number}"
        mixed = convolve(x, tensors[f"{name}.0.fn.0.weight"], bias=tensors[f"{name}.0.fn.0.bias"])
        x = x + normed(activation(mixed), tensors, f"{name}.0.fn.2")
        x = activation(convolve(x, tensors[f"{name}.1.weight"], bias=tensors[f"{name}.1.bias"]))
        x = normed(x, tensors, f"{name}.3")
    return x.mean(axis=(0, 1))


def authors_name(name):
    """As in the authors' Sequential of three layers."""
    if name.startswith("stem."):
        return name.removeprefix("stem.")
    _, number, rest = name.split(".", 2)
    return f"{int(number) + 3}.{rest}"


@pytest.mark.parametrize(("named", "activation"), [("timm", None), ("authors", "relu")])
def test_convmixer_features_are_those_of_the_formula(named, activation, tmp_path):
    tensors = convmixer_tensors(16, 3, 8, 5)
    file = {authors_name(name) if named == "authors" else name: tensor for name, tensor in tensors.items()}
    head = "8" if named == "authors" else "head"
    file |= {f"{head}.weight": draw(7, 16), f"{head}.bias": draw(7)}
    save_file(file, tmp_path / "convmixer.safetensors")
    net, params = nets.load_convmixer(tmp_path / "convmixer.safetensors", activation=activation)
    assert net == nets.ConvMixer(8, 16, 3, 5, activation or "gelu")
    expected = np.stack([convmixer_feature(tensors, image, 3, 8, relu if activation else gelu) for image in IMAGES])
    assert_close(jax.jit(net.apply)(params, IMAGES), expected, 1e-4)


@pytest.mark.parametrize(("width", "layers", "activation"), [(768, 32, "relu"), (1536, 20, "gelu"), (1024, 20, "gelu")])
def test_published_convmixers_have_their_activation(width, layers, activation, monkeypatch):
    shapes = {"stem.0.weight": (width, 3, 7, 7)} | {
        f"blocks.{number}.0.fn.0.weight": (width, 1, 7, 7) for number in range(layers)
    }
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    monkeypatch.setattr(convmixer, "read_safetensors", lambda path: tensors)
    monkeypatch.setattr(convmixer, "load_by_name", lambda *args, **settings: None)
    net, _ = nets.load_convmixer("published.safetensors")
    assert (net.width, net.layers, net.activation) == (width, layers, activation)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (nets.load_resnet50, r"path: got .*no tensor layer1.0.conv1.weight; pass a ResNet-50's"),
        (nets.load_convmixer, r"path: got .*no tensor stem.0.weight; pass a ConvMixer's"),
    ],
)
def test_another_networks_file_is_refused(load, message, tmp_path):
    save_file({"embeddings.weight": draw(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "other.safetensors")


def test_a_file_becomes_an_encoder_of_images(tmp_path):
    """Pixels are scaled, and shifted and scaled again by the statistics of the weights' training, or by those given."""
    path = tmp_path / "resnet.safetensors"
    save_file(resnet_tensors(clip=True), path)
    images = RNG.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    encoder = nets.pretrained_encoder("resnet50", path)
    net, params = nets.load_resnet50(path)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = net.apply(params, ((images / 255 - mean) / deviation).astype(np.float32))
    assert_close(encoder.apply(encoder.params, images), expected, 1e-4)
    # A grey image stays grey at any size, so resizing it changes nothing.
    grey = np.full((1, 10, 10, 3), 128, np.uint8)
    assert_close(
        encoder.apply(encoder.params, grey), encoder.apply(encoder.params, np.full((1, 64, 64, 3), 128, np.uint8)), 1e-4
    )
    other = nets.pretrained_encoder("resnet50", path, mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0))
    assert_close(other.apply(other.params, images), net.apply(params, (images / 255).astype(np.float32)), 1e-4)
    assert other.name != encoder.name
    with pytest.raises(ValueError, match="network: got 'alexnet'; choose one of 'vit'"):
        nets.pretrained_encoder("alexnet", path)
    with pytest.raises(ValueError, match="activation: got gelu; leave it out: a resnet50 has relu"):
        nets.pretrained_encoder("resnet50", path, activation="gelu")
    with pytest.raises(ValueError, match="images: got dtype float32"):
        encoder.apply(encoder.params, images.astype(np.float32))


@pytest.mark.parametrize("net", [nets.ResNet50((1, 1), 8), nets.ConvMixer(8, 4, 1, 3)])
def test_images_that_are_not_preprocessed_are_refused(net):
    with pytest.raises(ValueError, match="images: got dtype uint8; pass them through"):
        net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8))
    with pytest.raises(ValueError, match="images: got shape"):
        net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
