"""What several test files use: golden values and weights, both ways to call, closeness, gradients, a device mesh."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDENS = Path(__file__).parent / "goldens"
# What `conftest` turns off.
_WITH_CARE = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


def plain(function, **_):
    """In place of `compiled`."""
    return function


def compiled(function, **options):
    """`jax.jit` with all the compiler's passes, as users have it."""
    flags = os.environ["XLA_FLAGS"]
    return jax.jit(
        function, compiler_options={flag: _WITH_CARE[flag] for flag in _WITH_CARE if f"--{flag}=" in flags}, **options
    )


def code_cells(notebook):
    """What a notebook runs, but for the installation."""
    cells = json.loads(notebook.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if "%pip" not in source]


def run_notebook(cells, out, monkeypatch):
    """The names that cells leave, in smoke form, and the pages that they show."""
    display, shown = types.ModuleType("IPython.display"), []
    display.HTML = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("JAXCL_PRESET", "smoke")
    monkeypatch.setenv("JAXCL_OUT", str(out / "runs"))
    monkeypatch.chdir(out)
    names = {}
    for cell in cells:
        exec(compile(cell, "notebook", "exec"), names)  # our own file
    return names, shown


def steps_of(wrap):
    """Plain calls compile anew each time: one step of three is enough."""
    return range(1) if wrap is plain else range(3)


both_ways = pytest.mark.parametrize("wrap", [plain, compiled])


def golden(name):
    """The arrays of goldens/`name`.npz as a dict, and its `meta`, the options they were made with."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def golden_folder(folder, name):
    """`folder` with config.json and model.safetensors of goldens/`name`, as Hugging Face has them."""
    shutil.copy(GOLDENS / f"{name}.config.json", folder / "config.json")
    shutil.copy(GOLDENS / f"{name}.safetensors", folder / "model.safetensors")
    return folder


def changed_config(folder, tmp_path, **changes):
    """A copy of the folder with other entries in config.json; None takes one away."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return tmp_path / "copy"


def drawn(net, *arguments, scale=0.4):
    """Parameters of a network, all of which count: the initialiser would be compiled for each leaf."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), shapes)


def assert_close(actual, expected, tolerance=1e-5):
    """Asserts equal shapes and a largest difference under `tolerance`, relative to max(1, the largest entry)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def numerical_gradient(function, x, step=1e-5):
    """Gradient of a scalar NumPy `function` at `x` by central differences in float64."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def host_mesh(axis="devices", count=8):
    """A mesh of the first `count` devices along one axis, whose shardings the compiler propagates."""
    devices = jax.devices()
    assert len(devices) >= count, f"{len(devices)} devices: set XLA_FLAGS as tests/conftest.py does"
    return jax.sharding.Mesh(np.asarray(devices[:count]), (axis,))
