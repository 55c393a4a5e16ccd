"""Llama against a recorded run of its reference."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, changed_config, drawn, golden, golden_folder

from jaxcl import nets
from jaxcl.nets import llama

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recorded decoder as a Hugging Face folder."""
    return golden_folder(tmp_path_factory.mktemp("tiny_llama"), "tiny_llama")


def small(**fields):
    """A network, parameters that all count, and tokens."""
    sizes = {"vocabulary": 20, "width": 16, "layers": 2, "heads": 4, "key_value_heads": 2, "head_width": 6}
    net = nets.Llama(**(sizes | {"hidden": 12} | fields))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 9)), jnp.int32)
    return net, drawn(net, tokens), tokens


@pytest.mark.core
@both_ways
def test_logits_are_those_of_the_reference(wrap, folder):
    arrays, _ = golden("tiny_llama")
    net, params = nets.load_llama(folder)
    apply, tokens, mask = wrap(net.apply), jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    logits = apply(params, tokens, mask)
    assert_close(logits * mask[..., None], arrays["logits"], 1e-5)
    assert_close(apply(params, tokens), arrays["logits_unmasked"], 1e-5)
    labels = arrays["labels"][:, 1:]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], np.maximum(labels, 0)[..., None], -1)
    assert_close(-chosen[..., 0][labels >= 0].mean(), arrays["loss"], 1e-5)


def test_each_layer_is_that_of_the_reference(folder):
    arrays, _ = golden("tiny_llama")
    net, params = nets.load_llama(folder)
    tokens, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    _, state = jax.jit(partial(net.apply, capture_intermediates=True))(params, tokens, mask)
    kept = state["intermediates"]
    assert_close(kept["token_embedding"]["__call__"][0], arrays["embedding_output"], 1e-5)
    layer, _ = kept["layers_0"]["__call__"][0]
    assert_close(layer * mask[..., None], arrays["layer1_output"] * mask[..., None], 1e-5)
    assert_close(kept["output_norm"]["__call__"][0] * mask[..., None], arrays["final_norm_output"], 1e-5)


def test_what_is_masked_changes_nothing():
    net, params, tokens = small()
    apply = jax.jit(net.apply)
    mask = jnp.array([[1, 1, 1, 0, 1, 1, 1, 0, 0]] * 2)
    whole = apply(params, tokens, mask)
    other = apply(params, tokens.at[:, 3].set(1).at[:, 7:].set(2), mask)
    real = np.flatnonzero(mask[0])
    np.testing.assert_array_equal(whole[:, real], other[:, real])
    assert_close(whole[:, :3], apply(params, tokens[:, :3]), 1e-5)


def test_only_distances_count():
    """Masked tokens in front move all positions."""
    net, params, tokens = small()
    apply = jax.jit(net.apply)
    moved = jnp.pad(tokens, ((0, 0), (5, 0)))
    assert_close(apply(params, moved, jnp.arange(14)[None] >= 5)[:, 5:], apply(params, tokens), 1e-4)


def test_heads_that_share_keys_are_heads_with_equal_keys():
    net, params, tokens = small()
    each = net.clone(key_value_heads=4)
    copied = jax.tree.map(lambda leaf: leaf, params)
    for layer in ("layers_0", "layers_1"):
        for name in ("key", "value"):
            kernel = params["params"][layer][name]["kernel"].reshape(16, 2, 6)
            copied["params"][layer][name]["kernel"] = kernel.repeat(2, axis=1).reshape(16, 24)
    assert_close(jax.jit(each.apply)(copied, tokens), jax.jit(net.apply)(params, tokens), 1e-5)


def test_a_tied_head_is_the_embedding():
    net, params, tokens = small(tied=True)
    embedding = params["params"]["token_embedding"]["embedding"]
    apart = {"params": params["params"] | {"head": {"kernel": embedding.T}}}
    untied = net.clone(tied=False)
    assert_close(jax.jit(untied.apply)(apart, tokens), jax.jit(net.apply)(params, tokens), 1e-5)


def test_slow_pairs_are_slowed():
    """The rule of Llama 3.1 pair by pair, by wavelengths."""
    base, factor, low, high, length = 500.0, 8.0, 1.0, 4.0, 128
    expected = []
    for pair in range(16):
        frequency = base ** (-2 * pair / 32)
        wavelength = 2 * np.pi / frequency
        if wavelength > length / low:
            frequency /= factor
        elif wavelength >= length / high:
            smooth = (length / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    plain = llama._frequencies(32, base, None)
    slowed = llama._frequencies(32, base, nets.RotaryScaling(factor, low, high, length))
    np.testing.assert_allclose(slowed, expected, rtol=1e-12)
    kinds = np.array(plain) / slowed
    assert kinds[0] == 1 and np.isclose(kinds[-1], 8) and ((kinds > 1.01) & (kinds < 7.9)).any()


def test_bfloat16_is_near(folder):
    arrays, _ = golden("tiny_llama")
    net, params = nets.load_llama(folder, jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    logits = jax.jit(net.apply)(params, jnp.asarray(arrays["input_ids"]))
    assert logits.dtype == jnp.float32
    assert_close(logits, arrays["logits_unmasked"], 0.05)
    assert np.abs(logits - arrays["logits_unmasked"]).max() > 1e-4


def test_every_parameter_has_a_gradient():
    net, params, tokens = small()
    gradients = jax.jit(jax.grad(lambda params: (net.apply(params, tokens) ** 2).sum()))(params)
    assert all(jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_layers_have_the_names_that_adapters_go_by():
    params = small()[1]["params"]
    assert set(params) == {"token_embedding", "layers_0", "layers_1", "output_norm", "head"}
    assert set(params["layers_1"]) == {
        "query", "key", "value", "attention_output", "gate", "intermediate", "output", "attention_norm",
        "intermediate_norm",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_value_heads": 3}, "heads: got 4; pass a multiple of key_value_heads, which are 3"),
        ({"head_width": 5}, "head_width: got 5; pass an even number"),
    ],
)
def test_other_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_other_ranks_are_refused():
    net, params, tokens = small()
    with pytest.raises(ValueError, match=r"tokens: got shape \(9,\)"):
        net.apply(params, tokens[0])


# Loading

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALING = nets.RotaryScaling(8, 1, 4, 64)


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_parameters": None, "rope_theta": 500.0}, 500.0, None),
        ({"rope_parameters": None}, 10_000.0, None),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "llama3"} | LLAMA3}, 7.0, SCALING),
        (
            {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "llama3"} | LLAMA3},
            500.0, SCALING,
        ),
    ],
)  # fmt: skip
def test_rotations_are_read_where_they_stand(changes, base, scaling, folder, tmp_path):
    net, _ = nets.load_llama(changed_config(folder, tmp_path, **changes))
    assert (net.rotary_base, net.rotary_scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "folder: got .*KeyError.*rms_norm_eps.*damaged or not that of a Llama"),
        ({"model_type": "t5"}, "model_type 't5'; pass a folder with a Llama"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; choose one of 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: got 'yarn'; choose one of 'default', 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type: got 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "folder: got a rotary embedding with factor None"),
        ({"rope_parameters": [8]}, r"folder: got a rotary embedding \[8\]"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; a Llama has none such"),
        ({"num_key_value_heads": None}, r"mis-shaped: .*k_proj.weight \(16, 32\) for .*\(32, 32\)"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": True}, "unexpected: lm_head.weight"),
    ],
)
def test_other_folders_are_refused(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        nets.load_llama(changed_config(folder, tmp_path, **changes))


def test_shards_and_a_tied_head_give_the_same(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = changed_config(folder, tmp_path, tie_word_embeddings=True, head_dim=None)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    place = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for shard in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    params = nets.load_llama(path)[1]["params"]
    expected = dict(nets.load_llama(folder)[1]["params"])
    del expected["head"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
