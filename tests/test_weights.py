"""Reading safetensors, and putting tensors into parameters by name."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.nets.weights import Source, data_file, load_by_name, read_safetensors

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


# Into parameters

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
