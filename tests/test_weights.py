"""Reading safetensors, and putting tensors into parameters by name."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.nets.weights import (
    Source,
    data_file,
    is_copy,
    load_by_name,
    read_checkpoint,
    read_config,
    read_safetensors,
    sources_of,
)

pytestmark = pytest.mark.core


def safetensors_bytes(tensors):
    """A file from the format's description: the length of a JSON header, the header, the tensors end to end."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


ARRAYS = {
    "a.weight": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "count": ("I64", np.array(7)),
    "half": ("BF16", np.asarray(jnp.arange(3) + 0.5, jnp.bfloat16)),
}


def test_tensors_are_read_by_name(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(ARRAYS))
    for given in (path, str(path)):
        tensors = read_safetensors(given)
        assert set(tensors) == set(ARRAYS)
        for name, (_, array) in ARRAYS.items():
            assert isinstance(tensors[name], np.ndarray) and tensors[name].dtype == array.dtype
            np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello" * 30,
        safetensors_bytes(ARRAYS)[:-1],
        safetensors_bytes(ARRAYS)[:40],
        safetensors_bytes(ARRAYS) + b"more",
        safetensors_bytes(ARRAYS).replace(b'"F32"', b'"F33"'),
        safetensors_bytes(ARRAYS).replace(b"[2, 3]", b"[9, 3]"),
        safetensors_bytes({"a": ("F8_E4M3", np.zeros(2, np.uint8))}),
    ],
    ids=["empty", "text", "cut short", "half a header", "too long", "unknown dtype", "wrong size", "8-bit floats"],
)
def test_a_damaged_file_gives_one_clear_error(content, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: got .*x.safetensors: .*; the file is damaged or no safetensors file"):
        read_safetensors(path)


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcl\[text\]"'):
        read_safetensors(tmp_path / "x.safetensors")


def test_the_data_folder_is_looked_into(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"JAXCL_DATA: got no such environment variable; set it to .* a.npz"):
        data_file("a.npz")
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"JAXCL_DATA: got .*; set it to a folder that holds a.npz"):
        data_file("a.npz")
    (tmp_path / "a.npz").touch()
    assert data_file("a.npz") == tmp_path / "a.npz"


# Hugging Face folders

INDEX = "model.safetensors.index.json"


def shards(folder, weight_map, index=None):
    """Files of one float tensor a name each, full of its place in the map, and the index of them."""
    pytest.importorskip("safetensors")
    held = {}
    for place, (name, shard) in enumerate(weight_map.items()):
        held.setdefault(shard, {})[name] = ("F32", np.full((2, 2), place, np.float32))
    for shard, tensors in held.items():
        (folder / shard).write_bytes(safetensors_bytes(tensors))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}) if index is None else index)


SHARDS = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}


def test_shards_are_read_by_their_index(tmp_path):
    shards(tmp_path, SHARDS)
    tensors = read_checkpoint(str(tmp_path))
    assert {name: tensor[0, 0] for name, tensor in tensors.items()} == {"a": 0, "b": 1, "c": 2}


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path):
    shards(tmp_path, SHARDS)
    whole = safetensors_bytes({name: ("F32", np.full(3, 9, np.float32)) for name in "abc"})
    (tmp_path / "2.safetensors").write_bytes(whole)
    assert {name: tensor.shape for name, tensor in read_checkpoint(tmp_path).items()} == {
        "a": (2, 2), "b": (3,), "c": (2, 2),
    }  # fmt: skip


def test_one_file_goes_before_an_index(tmp_path):
    shards(tmp_path, SHARDS)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(ARRAYS))
    assert set(read_checkpoint(tmp_path)) == set(ARRAYS)


def test_a_folder_without_weights_is_said_so(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path)


def test_one_error_lists_what_the_shards_lack(tmp_path):
    away = {"d": "../d.safetensors", "e": "/e.safetensors", "f": "sub\\f.safetensors", "g": "3.safetensors", "h": ""}
    index = json.dumps({"weight_map": SHARDS | away | {"i": "2.safetensors"}})
    shards(tmp_path, SHARDS, index)
    with pytest.raises(ValueError, match="folder: got") as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"folder: got {tmp_path / INDEX}: "
        "shards outside the folder: ../d.safetensors, /e.safetensors, sub\\f.safetensors; "
        "missing shards: , 3.safetensors; tensors not in shards: i (2.safetensors); "
        "copy the folder again, with all of its shards"
    )


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": ',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_a_damaged_index_is_refused(index, tmp_path):
    shards(tmp_path, SHARDS, index)
    with pytest.raises(ValueError, match=r"folder: got .*index.json: .*; the index is damaged: copy it again"):
        read_checkpoint(tmp_path)


def test_a_damaged_shard_is_refused(tmp_path):
    shards(tmp_path, SHARDS)
    (tmp_path / "2.safetensors").write_bytes(b"hello" * 30)
    with pytest.raises(ValueError, match=r"path: got .*2.safetensors: .*; the file is damaged"):
        read_checkpoint(tmp_path)


NAMES = {"width": "d_model", "farthest": "max_distance"}


class Sizes:
    width: int
    farthest: int


def test_a_config_is_read_by_names(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 32, "other": null}')
    values = read_config(tmp_path, "t5", "a T5", NAMES, Sizes, {"max_distance": 128, "d_model": 1})
    assert values == {"width": 32, "farthest": 128}


@pytest.mark.parametrize("width", ['"32"', "0", "-3", "6.5", "null", "true", "NaN", "[32]"])
def test_values_of_other_types_are_refused(width, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "t5", "d_model": {width}, "max_distance": 8}}')
    with pytest.raises(ValueError, match=r"folder: got .*config\.json: d_model .*; a T5 has none such"):
        read_config(tmp_path, "t5", "a T5", NAMES, Sizes)


def test_a_value_whose_default_is_none_may_be_null(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 32, "max_distance": null}')
    assert read_config(tmp_path, "t5", "a T5", NAMES, Sizes, {"max_distance": None})["farthest"] is None
    with pytest.raises(ValueError, match="max_distance None"):
        read_config(tmp_path, "t5", "a T5", NAMES, Sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "t5", "d_model": 32}', "KeyError.*max_distance.*damaged or not that of a T5: copy it again"),
        ('{"d_model": 32}', "KeyError.*model_type.*damaged or not that of a T5"),
        ('{"model_type": "bart"}', "model_type 'bart'; pass a folder with a T5"),
        ("[1]", "TypeError.*damaged or not that of a T5"),
        ('{"model_type"', "JSONDecodeError.*damaged or not that of a T5"),
    ],
)
def test_another_config_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"folder: got .*config.json: .*{message}"):
        read_config(tmp_path, "t5", "a T5", NAMES, Sizes)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "none", "t5", "a T5", NAMES, Sizes)


def test_copies_are_told_from_others():
    tensors = {"a": np.ones(2), "b": np.ones(2), "c": np.zeros(2), "d": np.ones(3)}
    assert is_copy(tensors, "b", "a")
    assert not any(is_copy(tensors, name, original) for name, original in ("ca", "da", "az"))


# Into parameters


def test_sources_of_layers_without_biases():
    template = {"params": {"fc": {"kernel": jnp.zeros((3, 2))}, "norm": {"scale": jnp.zeros(2)}}}
    tensors = {"x.weight": np.arange(6.0).reshape(2, 3), "y.weight": np.arange(2.0)}
    params = load_by_name(tensors, sources_of({"fc/kernel": "x", "norm/scale": "y"}), template)["params"]
    np.testing.assert_array_equal(params["fc"]["kernel"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(params["norm"]["scale"], [0, 1])


TEMPLATE = {
    "params": {
        "Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)},
        "layers": [{"scale": jnp.zeros(4)}, {"scale": jnp.zeros(4)}],
    }
}
TENSORS = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fc.bias": np.array([1.5, -2.0], np.float32),
    "norm.weight": np.arange(4, dtype=np.float16),
    "norm.extra": np.full(4, 10, np.float16),
}
WANTED = {
    "params/Dense_0/kernel": Source(("fc.weight",), np.transpose),
    "params/Dense_0/bias": Source(("fc.bias",), np.asarray),
    "params/layers/0/scale": Source(("norm.weight",), np.asarray),
    "params/layers/1/scale": Source(("norm.weight", "norm.extra"), np.add),
}


@pytest.mark.parametrize("template", [TEMPLATE, jax.eval_shape(lambda: TEMPLATE)], ids=["values", "shapes"])
def test_each_parameter_comes_from_its_tensors(template):
    params = load_by_name(TENSORS, WANTED, template)
    assert jax.tree.structure(params) == jax.tree.structure(TEMPLATE)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(TEMPLATE), strict=True):
        assert isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    layers = params["params"]["layers"]
    np.testing.assert_array_equal(params["params"]["Dense_0"]["kernel"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(params["params"]["Dense_0"]["bias"], [1.5, -2.0])
    np.testing.assert_array_equal([layers[0]["scale"], layers[1]["scale"]], [[0, 1, 2, 3], [10, 11, 12, 13]])


def test_tensors_may_be_ignored():
    more = TENSORS | {"step": np.array(3), "head.weight": np.zeros(2)}
    params = load_by_name(more, WANTED, TEMPLATE, ignored=lambda name: name in ("step", "head.weight"))
    np.testing.assert_array_equal(params["params"]["Dense_0"]["bias"], [1.5, -2.0])
    with pytest.raises(ValueError, match=r"tensors: got unexpected: head.weight; pass"):
        load_by_name(more, WANTED, TEMPLATE, ignored=lambda name: name == "step")


def test_one_error_lists_all_that_is_wrong():
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "norm.extra"}
    tensors |= {"fc.weight": np.zeros((2, 4)), "fc.bias": np.zeros(3), "other": np.zeros(1)}
    wanted = {path: source for path, source in WANTED.items() if path != "params/layers/0/scale"}
    wanted["params/nothing"] = Source(("norm.weight",), np.asarray)
    with pytest.raises(ValueError, match="tensors: got") as caught:
        load_by_name(tensors, wanted, TEMPLATE)
    assert str(caught.value) == (
        "tensors: got missing: norm.extra; unexpected: other; "
        "parameters without a source: params/layers/0/scale; sources without a parameter: params/nothing; "
        "mis-shaped: fc.bias (3,) for params/Dense_0/bias (2,), fc.weight (2, 4) for params/Dense_0/kernel (3, 2); "
        "pass the file and the sizes that belong to each other"
    )


def test_a_tensor_that_cannot_be_transformed_is_mis_shaped():
    wanted = WANTED | {"params/Dense_0/kernel": Source(("fc.weight",), lambda tensor: tensor.transpose(2, 0, 1))}
    with pytest.raises(ValueError, match=r"fc.weight \(2, 3\) for params/Dense_0/kernel \(axes don't match"):
        load_by_name(TENSORS, wanted, TEMPLATE)


def test_a_long_list_is_cut():
    tensors = TENSORS | {f"other.{number}": np.zeros(1) for number in range(10, 35)}
    with pytest.raises(ValueError, match=r"unexpected: other.10, .*, other.19 and 15 more; pass"):
        load_by_name(tensors, WANTED, TEMPLATE)
