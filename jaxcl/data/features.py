"""Features of a frozen encoder, computed once and kept on disk."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxcl.files import write_atomic
from jaxcl.nets.encoders import FrozenEncoder
from jaxcl.typing import ArrayLike, RandomAccess, bad_argument, check_count

_HASHED_AT_ONCE = 1024  # inputs
_RECORDED_EVERY = 2.0  # seconds


def compute_features(
    encoder: FrozenEncoder,
    inputs: ArrayLike | RandomAccess,
    *,
    folder: str | Path,
    batch_size: int | None = None,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Features [N, D] float32 of inputs [N, ...], computed unless `folder` has them, and read from there as needed.

    The file's name is a key of all that decides the features: the encoder's name and parameters, the inputs' values,
    and the batch size, on which rounding may depend. An interrupted call leaves what it has, and the same call goes on
    from there: the features are, bit for bit, those of an undisturbed one. The finished file takes its name whole. Two
    processes must not compute the same features in one folder at a time.

    Args:
        encoder: as `nets` makes them.
        inputs: raw, as the encoder takes them; those not in memory are read twice, once for the key.
        folder: where features are kept; made if it is missing.
        batch_size: inputs at a time; None takes the encoder's. The last batch is filled up with its last input.
        callback: told how many inputs have their features, first those that an earlier call left; for a progress bar.

    Returns:
        A read-only array that is memory-mapped: rows are read from disk as they are asked for.

    Raises:
        ValueError: no inputs, a batch size below 1, or a file in `folder` that is damaged.
        OSError: `folder` cannot be written.
    """
    check_count("inputs, their number", len(inputs), 1)
    batch_size = encoder.batch_size if batch_size is None else batch_size
    check_count("batch_size", batch_size, 1)
    path = Path(folder) / f"{_content_key(encoder, inputs, batch_size)}.npy"
    if not path.exists():
        _fill(path, encoder, inputs, batch_size, callback)
    elif callback:
        callback(len(inputs))
    features = _open(path, "r")
    if len(features) != len(inputs):
        raise _damaged(path, f"{len(features)} rows instead of {len(inputs)}")
    return features


def _fill(
    path: Path,
    encoder: FrozenEncoder,
    inputs: ArrayLike | RandomAccess,
    batch_size: int,
    callback: Callable[[int], None] | None,
) -> None:
    """Computes what is missing in the unfinished file, which then takes the name `path`."""
    unfinished, record = path.with_suffix(".unfinished"), path.with_suffix(".rows")

    def batch(start: int) -> np.ndarray:
        rows = np.minimum(np.arange(start, start + batch_size), len(inputs) - 1)
        return np.asarray(encoder.apply(encoder.params, np.asarray(inputs[rows])))[: len(inputs) - start]

    if record.exists() and unfinished.exists():
        done, features = _rows(record, len(inputs)), _open(unfinished, "r+")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        first = batch(0)
        features = np.lib.format.open_memmap(unfinished, "w+", first.dtype, (len(inputs), *first.shape[1:]))
        features[: len(first)] = first
        done = len(first)
    recorded = time.monotonic()
    while done < len(inputs):
        if callback:
            callback(done)
        made = batch(done)
        features[done : done + len(made)] = made
        done += len(made)
        if time.monotonic() - recorded > _RECORDED_EVERY:
            # Rows reach the disk before the record says that they are there.
            features.flush()
            write_atomic(record, str(done))
            recorded = time.monotonic()
    features.flush()
    del features
    unfinished.replace(path)
    record.unlink(missing_ok=True)
    if callback:
        callback(done)


def _content_key(encoder: FrozenEncoder, inputs: ArrayLike | RandomAccess, batch_size: int) -> str:
    """Hexadecimal digits that stand for all that decides the features."""
    digest = hashlib.sha256(f"{encoder.name}\n{batch_size}\n".encode())
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(encoder.params):
        digest.update(jax.tree_util.keystr(leaf_path).encode())
        _add(digest, np.asarray(leaf))
    digest.update(f"{inputs.shape}".encode())
    for start in range(0, len(inputs), _HASHED_AT_ONCE):
        _add(digest, np.asarray(inputs[np.arange(start, min(start + _HASHED_AT_ONCE, len(inputs)))]))
    return digest.hexdigest()[:32]


def _add(digest: "hashlib._Hash", array: np.ndarray) -> None:
    digest.update(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _rows(record: Path, most: int) -> int:
    """How many rows the record says are done."""
    text = record.read_text(errors="replace")
    if not text.isdecimal() or int(text) > most:
        raise _damaged(record, f"{text[:20]!r} where a number up to {most} should be")
    return int(text)


def _open(path: Path, mode: Literal["r", "r+"]) -> "np.memmap[Any, Any]":
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, fault: str) -> ValueError:
    return bad_argument("folder", f"{path}: {fault}", "the file is damaged: remove it, and its features are made again")
