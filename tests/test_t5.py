"""T5 against recorded runs of its reference, in both versions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, changed_config, compiled, drawn, golden, golden_folder, plain

from jaxcl import nets
from jaxcl.nets import t5
from jaxcl.nets.weights import read_safetensors

pytest.importorskip("safetensors")
VERSIONS = pytest.mark.parametrize("name", ["tiny_t5_relu", "tiny_t5_gated_gelu"])
GIVEN = ("input_ids", "decoder_input_ids", "attention_mask")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a recorded network as a Hugging Face folder}."""
    names = ("tiny_t5_relu", "tiny_t5_gated_gelu", "tiny_llama")
    return {name: golden_folder(tmp_path_factory.mktemp(name), name) for name in names}


def small(**fields):
    """A network, parameters that all count, and tokens of both sides, the encoder's longer than `farthest`."""
    sizes = {"vocabulary": 20, "width": 16, "head_width": 6, "heads": 2, "hidden": 12, "layers": 1, "decoder_layers": 2}
    net = nets.T5(**(sizes | {"buckets": 8, "farthest": 9} | fields))
    rng = np.random.default_rng(0)
    tokens, decoder_tokens = (jnp.asarray(rng.integers(0, 20, (2, length)), jnp.int32) for length in (12, 7))
    return net, drawn(net, tokens, decoder_tokens), tokens, decoder_tokens


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "wrap"), [("tiny_t5_relu", compiled), ("tiny_t5_gated_gelu", compiled), ("tiny_t5_gated_gelu", plain)]
)
def test_logits_are_those_of_the_reference(name, wrap, folders):
    arrays, _ = golden(name)
    net, params = nets.load_t5(folders[name])
    logits = wrap(net.apply)(params, *(jnp.asarray(arrays[given]) for given in GIVEN))
    assert_close(logits, arrays["logits"], 1e-5)
    labels = arrays["labels"]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.maximum(labels, 0)[..., None], axis=-1)
    assert_close(-chosen[..., 0][labels >= 0].mean(), arrays["loss"], 1e-5)


@VERSIONS
def test_vectors_of_both_stacks_are_those_of_the_reference(name, folders):
    arrays, _ = golden(name)
    net, params = nets.load_t5(folders[name])
    apply = jax.jit(partial(net.apply, capture_intermediates=True))
    _, state = apply(params, *(jnp.asarray(arrays[given]) for given in GIVEN))
    kept = state["intermediates"]
    for stack in ("encoder", "decoder"):
        assert_close(kept[stack]["output_norm"]["__call__"][0], arrays[f"{stack}_last_hidden_state"], 1e-5)


def test_a_call_is_encode_and_decode():
    net, params, tokens, decoder_tokens = small()
    mask = jnp.arange(12) < jnp.array([[12], [5]])
    encoded = jax.jit(partial(net.apply, method="encode"))(params, tokens, mask)
    assert encoded.shape == (2, 12, 16)
    logits = jax.jit(partial(net.apply, method="decode"))(params, decoder_tokens, encoded, mask)
    assert_close(jax.jit(net.apply)(params, tokens, decoder_tokens, mask), logits, 1e-6)


@pytest.mark.parametrize(
    ("buckets", "farthest", "causal"), [(32, 128, False), (32, 128, True), (8, 9, True), (10, 20, False)]
)
def test_buckets_are_those_of_the_formula(buckets, farthest, causal):
    """With the logarithms of Raffel et al.'s text, rounded where they are whole."""

    def bucket(offset):
        side = buckets if causal else buckets // 2
        single, distance = side // 2, max(-offset, 0) if causal else abs(offset)
        share = np.log(max(distance, 1) / single) / np.log(farthest / single)
        beyond = single + int(share * (side - single) + 1e-9)
        return (0 if causal or offset <= 0 else side) + (distance if distance < single else min(beyond, side - 1))

    offsets = np.arange(-150, 151)
    found = t5._buckets(jnp.asarray(offsets), buckets, farthest, causal=causal)
    np.testing.assert_array_equal(found, [bucket(offset) for offset in offsets.tolist()])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_masked_changes_nothing(tied):
    net, params, tokens, decoder_tokens = small(tied=tied)
    apply = jax.jit(net.apply)
    mask, decoder_mask = jnp.arange(12) < jnp.array([[8], [8]]), jnp.array([[1, 1, 0, 1, 1, 1, 1]] * 2)
    whole = apply(params, tokens, decoder_tokens, mask, decoder_mask)
    assert_close(whole[:, :2], apply(params, tokens[:, :8], decoder_tokens[:, :2]), 1e-5)
    other = apply(params, tokens.at[:, 8:].set(3), decoder_tokens.at[:, 2].set(5), mask, decoder_mask)
    real = np.array([0, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(whole[:, real], other[:, real])


def test_the_decoder_does_not_see_what_is_to_come():
    net, params, tokens, decoder_tokens = small()
    apply = jax.jit(net.apply)
    whole = apply(params, tokens, decoder_tokens)
    other = apply(params, tokens, decoder_tokens.at[:, 4:].set(0))
    np.testing.assert_array_equal(whole[:, :4], other[:, :4])
    assert jnp.abs(whole - other)[:, 4:].max() > 1e-3


@VERSIONS
def test_bfloat16_is_near(name, folders):
    arrays, _ = golden(name)
    net, params = nets.load_t5(folders[name], jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    logits = jax.jit(net.apply)(params, *(jnp.asarray(arrays[given]) for given in GIVEN))
    assert logits.dtype == jnp.float32
    assert_close(logits, arrays["logits"], 0.05)
    assert np.abs(logits - arrays["logits"]).max() > 1e-4


def test_every_parameter_has_a_gradient():
    net, params, tokens, decoder_tokens = small(gated=True, activation="gelu_new", tied=False)
    gradients = jax.jit(jax.grad(lambda params: (net.apply(params, tokens, decoder_tokens) ** 2).sum()))(params)
    assert all(jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_layers_have_the_names_that_adapters_go_by():
    params = small(gated=True, tied=False)[1]["params"]
    layer = {
        "query", "key", "value", "attention_output", "gate", "intermediate", "output", "attention_norm",
        "intermediate_norm",
    }  # fmt: skip
    assert set(params) == {"token_embedding", "encoder", "decoder", "head"}
    assert set(params["encoder"]) == {"position_bias", "layers_0", "output_norm"}
    assert set(params["decoder"]) == {"position_bias", "layers_0", "layers_1", "output_norm"}
    assert set(params["encoder"]["layers_0"]) == layer
    cross = {"cross_query", "cross_key", "cross_value", "cross_output", "cross_norm"}
    assert set(params["decoder"]["layers_1"]) == layer | cross


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swish"}, "activation: got 'swish'; choose one of"),
        ({"buckets": 3}, "buckets: got 3; pass 4 or more"),
        ({"farthest": 7}, "farthest: got 7; pass 8 or more"),
    ],
)
def test_other_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_other_ranks_are_refused():
    net, params, tokens, decoder_tokens = small()
    with pytest.raises(ValueError, match=r"^tokens: got shape \(12,\)"):
        net.apply(params, tokens[0], decoder_tokens)
    with pytest.raises(ValueError, match=r"decoder_tokens: got shape \(7,\)"):
        net.apply(params, tokens, decoder_tokens[0])
    with pytest.raises(ValueError, match=r"encoded: got shape \(2, 12\)"):
        net.apply(params, decoder_tokens, tokens, method="decode")


# Loading


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_kv": None}, "folder: got .*KeyError.*d_kv.*damaged or not that of a T5"),
        ({"model_type": "bart"}, "model_type 'bart'; pass a folder with a T5"),
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj: got 'gated-silu'; choose one of 'relu', 'gated-gelu'",
        ),
        ({"num_layers": 3}, "missing: encoder.block.2.layer.0.SelfAttention.k.weight"),
        ({"num_decoder_layers": 1}, "unexpected: decoder.block.1.layer"),
        ({"d_ff": 63}, r"mis-shaped: .*layer.2.DenseReluDense.wi.weight \(64, 32\) for .*\(32, 63\)"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"decoder_start_token_id": 7}, "decoder_start_token_id 7; pass a T5 that begins to write at 0"),
        ({"feed_forward_proj": "gated-gelu"}, r"missing: .*wi_0.weight.*unexpected: .*wi.weight"),
    ],
)
def test_other_folders_are_refused(changes, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        nets.load_t5(changed_config(folders["tiny_t5_relu"], tmp_path, **changes))


def test_another_network_is_refused(folders):
    with pytest.raises(ValueError, match="model_type 'llama'; pass a folder with a T5"):
        nets.load_t5(folders["tiny_llama"])


def test_what_older_folders_leave_out_is_known(folders, tmp_path):
    older = dict.fromkeys(("num_decoder_layers", "feed_forward_proj", "tie_word_embeddings"))
    net, params = nets.load_t5(changed_config(folders["tiny_t5_relu"], tmp_path, **older))
    expected, known = nets.load_t5(folders["tiny_t5_relu"])
    assert net == expected
    jax.tree.map(np.testing.assert_array_equal, params, known)


def test_a_head_that_newer_folders_only_call_tied_is_read(folders, tmp_path):
    newer = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    net, params = nets.load_t5(changed_config(folders["tiny_t5_gated_gelu"], tmp_path, **newer))
    expected, known = nets.load_t5(folders["tiny_t5_gated_gelu"])
    assert net == expected and not net.tied
    jax.tree.map(np.testing.assert_array_equal, params, known)


def test_copies_of_the_embedding_are_left_alone(folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = changed_config(folders["tiny_t5_relu"], tmp_path)
    tensors = load_file(path / "model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    more = tensors | {name: tensors["shared.weight"].copy() for name in copies} | {UNUSED: np.ones((8, 4))}
    save_file(more, path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nets.load_t5(path)[1], nets.load_t5(folders["tiny_t5_relu"])[1])
    save_file(more | {"lm_head.weight": tensors["shared.weight"] + 1}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: lm_head.weight;"):
        nets.load_t5(path)


@pytest.mark.parametrize("name", ["tiny_t5_relu", "tiny_t5_gated_gelu"])
def test_what_is_saved_is_read_again(name, tmp_path):
    net, params = nets.load_t5(golden_folder(tmp_path, name))
    nets.save_t5(tmp_path / "saved", net, params)
    again, read = nets.load_t5(tmp_path / "saved")
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, read, params)
    before, after = (read_safetensors(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "saved"))
    assert after.keys() <= before.keys()
    for tensor, own in after.items():
        np.testing.assert_array_equal(own, before[tensor])


def test_a_network_that_files_have_no_name_for_is_refused_before_anything_is_written(tmp_path):
    net = nets.T5(24, 16, 1, 1, 2, 8, 32, activation="relu", gated=True)
    with pytest.raises(ValueError, match="net: got activation 'relu', gated True; files know"):
        nets.save_t5(tmp_path / "saved", net, {})
    assert not (tmp_path / "saved").exists()
