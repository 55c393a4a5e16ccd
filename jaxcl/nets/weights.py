"""Published weights: safetensors files and Hugging Face folders, and tensors put into parameters by name."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.files import write_atomic
from jaxcl.trees import leaves_by_path, replace_leaves
from jaxcl.typing import Array, PyTree, bad_argument, check_rank, check_width

_LISTED = 10  # names of a kind that an error shows


class Source(NamedTuple):
    """Where a parameter comes from."""

    names: tuple[str, ...]  # tensors in the file
    transform: Callable[..., np.ndarray]  # of those tensors, in that order, to the parameter


def data_file(name: str) -> Path:
    """Path of the file `name` in the folder that the environment variable JAXCL_DATA names.

    Raises:
        ValueError: the variable is unset, or its folder has no such file.
    """
    folder = os.environ.get("JAXCL_DATA")
    if not folder:
        raise bad_argument("JAXCL_DATA", "no such environment variable", f"set it to the folder that holds {name}")
    if not (path := Path(folder) / name).is_file():
        raise bad_argument("JAXCL_DATA", folder, f"set it to a folder that holds {name}")
    return path


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, each of any shape; bfloat16 ones have the dtype that JAX gives it.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: the file is damaged, or holds a dtype that NumPy does not have.
        OSError: it cannot be read, or is not there.
    """
    try:
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.numpy import load_file  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('safetensors files need safetensors: pip install "jaxcl[text]"') from error
    try:
        return load_file(path)
    except (SafetensorError, AttributeError) as error:  # the latter names a dtype that NumPy lacks
        raise bad_argument(
            "path", f"{path}: {error}", "the file is damaged or no safetensors file of plain floats: copy it again"
        ) from error


def read_checkpoint(folder: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder by name, each of any shape, as `read_safetensors` gives them.

    They are those of model.safetensors, or, where there is no such file, of the shards (files in the same folder) that
    model.safetensors.index.json lists.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: a file is damaged; or the index lists shards outside the folder or that are not there, or tensors
            that their shards lack: one error lists them all.
        OSError: a file cannot be read, or there is neither model.safetensors nor an index.
    """
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return read_safetensors(whole)
    try:
        shards: dict[str, list[str]] = {}
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            if not isinstance(shard, str):
                raise TypeError(f"{name} in {shard!r}, which is no file name")
            shards.setdefault(shard, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_argument("folder", f"{index}: {error!r}", "the index is damaged: copy it again") from error
    tensors: dict[str, np.ndarray] = {}
    faults: dict[str, list[str]] = {"shards outside the folder": [], "missing shards": [], "tensors not in shards": []}
    for shard, names in shards.items():
        if "/" in shard or "\\" in shard:
            faults["shards outside the folder"].append(shard)
        elif not (path := Path(folder) / shard).is_file():
            faults["missing shards"].append(shard)
        else:
            held = read_safetensors(path)
            tensors |= {name: held[name] for name in names if name in held}
            faults["tensors not in shards"] += [f"{name} ({shard})" for name in names if name not in held]
    if any(faults.values()):
        raise bad_argument("folder", f"{index}: {_said(faults)}", "copy the folder again, with all of its shards")
    return tensors


def read_config(
    folder: str | Path,
    model_type: str,
    network: str,
    names: Mapping[str, str],
    module: type,
    defaults: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """{field: its value} from config.json in a Hugging Face folder.

    Args:
        folder: holds the file.
        model_type: what the file must say that it is of.
        network: the same in words, for errors.
        names: {field: its name in the file}.
        module: the network's class; values of its fields are held to their types, numbers being above 0.
        defaults: {name in the file: the value where the file has none}; one that is None may be null in the file.

    Raises:
        ValueError: the file is damaged, lacks a name without a default, is of another model type, or has a value of
            another type.
        OSError: it cannot be read, or is not there.
    """
    path, defaults = Path(folder) / "config.json", defaults or {}
    try:
        config = dict(defaults) | json.loads(path.read_text())
        kind = config["model_type"]
        values = {field: config[name] for field, name in names.items()} if kind == model_type else {}
    except (ValueError, KeyError, TypeError) as error:
        raise bad_argument(
            "folder", f"{path}: {error!r}", f"the file is damaged or not that of {network}: copy it again"
        ) from error
    if kind != model_type:
        raise bad_argument("folder", f"{path}: model_type {kind!r}", f"pass a folder with {network}")
    for field, value in values.items():
        if not _fits(value, module.__annotations__.get(field)) and (value, defaults.get(names[field], 0)) != (
            None,
            None,
        ):
            raise bad_argument("folder", f"{path}: {names[field]} {value!r}", f"{network} has none such: copy it again")
    return values


def _fits(value: object, kind: type | None) -> bool:
    """Whether a value is of a field's type; numbers are above 0, and other types are the caller's to check."""
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and 0 < value < float("inf")  # type: ignore[operator]
    return not isinstance(kind, type) or kind not in (bool, str) or isinstance(value, kind)


def sources_of(names: Mapping[str, str]) -> dict[str, Source]:
    """{path of a parameter: its source} for layers without biases.

    Args:
        names: {path of a parameter without "params/": its tensor's name without ".weight"}. Kernels [in, out] are
            tensors [out, in].
    """
    return {
        f"params/{path}": Source((f"{name}.weight",), np.transpose if path.endswith("/kernel") else np.asarray)
        for path, name in names.items()
    }


def is_copy(tensors: Mapping[str, np.ndarray], name: str, original: str) -> bool:
    """Whether the tensor of `name`, of any shape, is that of `original` once more, as tied ones may be saved."""
    return original in tensors and np.array_equal(tensors[name], tensors[original])


def save_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors, by name and each of any shape, to a file that is whole or not there.

    Raises:
        ImportError: the safetensors package is missing.
        OSError: the file cannot be written.
    """
    try:
        from safetensors.numpy import save  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('safetensors files need safetensors: pip install "jaxcl[text]"') from error
    write_atomic(path, save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))


def load_by_name(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, Source],
    template: PyTree,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> PyTree:
    """Parameters with the structure, shapes and dtypes of `template`, made of `tensors` of any shape.

    Args:
        tensors: {name: tensor}, as `read_safetensors` gives.
        wanted: {path of a parameter: its source}, where a path is the keys joined by "/", as in
            "params/Dense_0/kernel". Two parameters may come from one tensor, as tied ones do.
        template: parameters, or their shapes as `jax.eval_shape` gives them.
        ignored: whether the tensor of a name may be left over.

    Raises:
        ValueError: tensors are missing, unexpected or of a wrong shape, or `wanted` and `template` have different
            paths; one error lists them all.
    """
    shapes = leaves_by_path(template)
    used = {name for source in wanted.values() for name in source.names}
    faults = {
        "missing": [*(used - tensors.keys())],
        "unexpected": [name for name in tensors.keys() - used if not ignored(name)],
        "parameters without a source": [*(shapes.keys() - wanted.keys())],
        "sources without a parameter": [*(wanted.keys() - shapes.keys())],
        "mis-shaped": [],
    }
    params = {}
    for path in shapes.keys() & wanted.keys():
        names, transform = wanted[path]
        if any(name not in tensors for name in names):
            continue
        given = " and ".join(f"{name} {tensors[name].shape}" for name in names)
        try:
            value = transform(*(tensors[name] for name in names))
        except (ValueError, IndexError) as error:  # such as a transposition of too many axes
            faults["mis-shaped"].append(f"{given} for {path} ({error})")
            continue
        if value.shape == shapes[path].shape:
            params[path] = jnp.asarray(value, shapes[path].dtype)
        else:
            faults["mis-shaped"].append(f"{given} for {path} {shapes[path].shape}")
    if any(faults.values()):
        raise bad_argument("tensors", _said(faults), "pass the file and the sizes that belong to each other")
    return replace_leaves(template, params)


def check_images(images: Array, preprocessing: str = "the weights' preprocessing") -> None:
    """Raises ValueError unless images are [B, H, W, 3] and of floats, as `preprocessing` leaves them."""
    check_rank("images", images, 4)
    check_width("images", images, 3, "RGB")
    if not jnp.issubdtype(images.dtype, jnp.inexact):
        raise bad_argument("images", f"dtype {images.dtype}", f"pass them through {preprocessing}")


def image_side(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of any shape without the text side, and without what stands before all names of a network in another."""
    for prefix in ("visual.", "backbone."):
        if own := {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}:
            return own
    return dict(tensors)


def folded(path: str, convolution: str, norm: str, *, epsilon: float, squeeze: bool = False) -> dict[str, Source]:
    """Sources of the kernel [h, w, in, out] and bias at `path`: a convolution and the batch normalisation after it.

    Args:
        path: of the layer.
        convolution: name of its tensor [out, in, h, w], which has no bias, without ".weight".
        norm: name of the normalisation's tensors, without what follows the last point.
        epsilon: of the normalisation.
        squeeze: whether axes of length 1 are left out.
    """

    def factor(scale: np.ndarray, variance: np.ndarray, channels: int) -> np.ndarray:
        if scale.shape != (channels,) or variance.shape != (channels,):
            raise ValueError(f"one number for each of {channels} channels is needed")
        return scale / np.sqrt(variance.astype(np.float64) + epsilon)

    def kernel(weight: np.ndarray, scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
        made = (weight * factor(scale, variance, len(weight))[:, None, None, None]).transpose(2, 3, 1, 0)
        return made.squeeze() if squeeze else made

    def shift(bias: np.ndarray, mean: np.ndarray, scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return bias - mean * factor(scale, variance, bias.size)

    scale, bias, mean, variance = (f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    return {
        f"{path}/kernel": Source((f"{convolution}.weight", scale, variance), kernel),
        f"{path}/bias": Source((bias, mean, scale, variance), shift),
    }


def _said(faults: Mapping[str, Collection[str]]) -> str:
    """The faults that there are, {kind: names}, in words."""
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names)


def _listed(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
