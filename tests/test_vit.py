"""The vision Transformer against a rendering in NumPy, from files with the names of CLIP, DINO and timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy.special import erf

from jaxcl import nets
from jaxcl.nets import vit

pytest.importorskip("safetensors")
from safetensors.numpy import save_file

WIDTH, HIDDEN, LAYERS, PATCH, SIDE, PROJECTED = 128, 96, 3, 4, 12, 24
PLACES = 1 + (SIDE // PATCH) ** 2


def random_tensors(kind):
    """Names and shapes as published for `kind`, numbers at random."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-1])

    def norm(name):
        return {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}

    if kind == "clip":
        found = {
            "class_embedding": draw(WIDTH),
            "positional_embedding": draw(PLACES, WIDTH),
            "proj": draw(WIDTH, PROJECTED),
        }
        found |= {"conv1.weight": draw(WIDTH, 3, PATCH, PATCH)} | norm("ln_pre") | norm("ln_post")
        layer, parts = (
            "transformer.resblocks.{}.",
            ("ln_1", "attn.in_proj_", "attn.out_proj.", "ln_2", "mlp.c_fc.", "mlp.c_proj."),
        )
    else:
        found = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, PLACES, WIDTH)} | norm("norm")
        found |= {"patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(WIDTH)}
        layer, parts = "blocks.{}.", ("norm1", "attn.qkv.", "attn.proj.", "norm2", "mlp.fc1.", "mlp.fc2.")
    first_norm, qkv, out, second_norm, into, back = parts
    for number in range(LAYERS):
        name = layer.format(number)
        found |= norm(name + first_norm) | norm(name + second_norm)
        for part, rows, columns in (
            (qkv, 3 * WIDTH, WIDTH), (out, WIDTH, WIDTH), (into, HIDDEN, WIDTH), (back, WIDTH, HIDDEN),
        ):  # fmt: skip
            found |= {f"{name}{part}weight": draw(rows, columns), f"{name}{part}bias": draw(rows)}
    return found, layer, parts


def reference(kind, images):
    """The feature [B, D] in float64, one image, one head and one layer at a time."""
    tensors, layer, (first_norm, qkv, out, second_norm, into, back) = random_tensors(kind)
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    clip = kind == "clip"

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + (1e-5 if clip else 1e-6))
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def dense(x, name):
        return x @ tensors[f"{name}weight"].T + tensors[f"{name}bias"]

    features = []
    for image in images.astype(np.float64):
        weight = tensors["conv1.weight" if clip else "patch_embed.proj.weight"]
        cut = [
            np.einsum("hwc,ochw->o", image[row : row + PATCH, column : column + PATCH], weight)
            for row in range(0, SIDE, PATCH)
            for column in range(0, SIDE, PATCH)
        ]
        patches = np.stack(cut) + (0 if clip else tensors["patch_embed.proj.bias"])
        token, places = ("class_embedding", "positional_embedding") if clip else ("cls_token", "pos_embed")
        x = np.concatenate([tensors[token].reshape(1, -1), patches]) + tensors[places].reshape(PLACES, WIDTH)
        if clip:
            x = norm(x, "ln_pre")
        for number in range(LAYERS):
            name = layer.format(number)
            query, key, value = np.split(dense(norm(x, name + first_norm), name + qkv), 3, axis=1)
            heads = []
            for head in range(WIDTH // 64):
                own = slice(64 * head, 64 * head + 64)
                scores = query[:, own] @ key[:, own].T / 8
                chances = np.exp(scores - scores.max(axis=1, keepdims=True))
                heads.append(chances / chances.sum(axis=1, keepdims=True) @ value[:, own])
            x = x + dense(np.concatenate(heads, axis=1), name + out)
            inner = dense(norm(x, name + second_norm), name + into)
            inner = inner / (1 + np.exp(-1.702 * inner)) if clip else inner * (1 + erf(inner / np.sqrt(2))) / 2
            x = x + dense(inner, name + back)
        feature = norm(x[0], "ln_post" if clip else "norm")
        features.append(feature @ tensors["proj"] if clip else feature)
    return np.stack(features)


def write(path, kind):
    """As such files come: CLIP's with a text side, DINO's inside another module, timm's with a head."""
    tensors = random_tensors(kind)[0]
    if kind == "clip":
        tensors = {f"visual.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"positional_embedding": np.ones((77, 8)), "transformer.resblocks.0.ln_1.weight": np.ones(8)}
    elif kind == "dino":
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()} | {
            "head.mlp.0.weight": np.ones((2, 2))
        }
    else:
        tensors |= {"head.weight": np.ones((5, WIDTH), np.float32), "head.bias": np.ones(5, np.float32)}
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["clip", "dino", "timm"])
def test_features_are_those_of_the_formula(kind, tmp_path):
    write(tmp_path / "vit.safetensors", kind)
    net, params = nets.load_vit(tmp_path / "vit.safetensors")
    assert (net.patch, net.width, net.layers, net.heads, net.hidden) == (PATCH, WIDTH, LAYERS, 2, HIDDEN)
    images = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    assert_close(jax.jit(net.apply)(params, images), reference(kind, images), 1e-4)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (768, 12), (1024, 16), (1280, 16), (1664, 16)])
def test_published_sizes_have_their_heads(width, heads, monkeypatch):
    """ViT-Ti, B, L, H and OpenCLIP's bigG; activations that tensors do not tell are the caller's to name."""
    shapes = {
        "class_embedding": (width,), "conv1.weight": (width, 3, 14, 14), "positional_embedding": (257, width),
        "transformer.resblocks.0.ln_1.weight": (width,), "proj": (width, 512),
    }  # fmt: skip
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    monkeypatch.setattr(vit, "read_safetensors", lambda path: tensors)
    monkeypatch.setattr(vit, "load_by_name", lambda *args, **settings: None)
    net, _ = nets.load_vit("published.safetensors")
    assert (net.heads, net.activation) == (heads, "quick_gelu")
    assert nets.load_vit("published.safetensors", activation="gelu")[0].activation == "gelu"


def test_what_does_not_belong_is_listed(tmp_path):
    path = tmp_path / "vit.safetensors"
    tensors = random_tensors("timm")[0]
    save_file({name: tensor for name, tensor in tensors.items() if "blocks.1.mlp.fc2" not in name}, path)
    with pytest.raises(ValueError, match=r"missing: blocks.1.mlp.fc2.bias, blocks.1.mlp.fc2.weight"):
        nets.load_vit(path)
    save_file({"conv1.weight": np.ones((2, 3, 4, 4), np.float32)}, path)
    with pytest.raises(ValueError, match=r"path: got .*no tensor patch_embed.proj.weight; pass a ViT"):
        nets.load_vit(path)


@pytest.mark.parametrize(("name", "shape"), [
    ("patch_embed.proj.weight", (8, 48)), ("patch_embed.proj.weight", (8, 3, 0, 0)), ("pos_embed", (1, 4, 8)),
    ("pos_embed", (0, 8)),
])  # fmt: skip
def test_tensors_of_no_vit_are_told(name, shape, tmp_path):
    tensors = random_tensors("timm")[0] | {name: np.zeros(shape, np.float32)}
    save_file(tensors, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"path: got .*, with patches of shape .* and positions of shape"):
        nets.load_vit(tmp_path / "vit.safetensors")


@pytest.mark.parametrize(("name", "shape"), [("proj", (8,)), ("transformer.resblocks.0.mlp.c_fc.weight", ())])
def test_tensors_of_another_rank_are_listed(name, shape, tmp_path):
    tensors = random_tensors("clip")[0]
    assert name in tensors
    save_file(tensors | {name: np.zeros(shape, np.float32)}, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=rf"mis-shaped: .*{name} "):
        nets.load_vit(tmp_path / "vit.safetensors")


def test_images_of_another_size_are_refused():
    net = nets.ViT(PATCH, WIDTH, 1, 2, HIDDEN, PLACES)
    for images, message in (
        (jnp.zeros((1, 8, 8, 3)), "images: got 8 x 8; resize them to 12 x 12"),
        (jnp.zeros((1, 12, 12, 3), jnp.uint8), "images: got dtype uint8"),
        (jnp.zeros((1, 12, 12, 1)), "images: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            net.init(jax.random.key(0), images)
