"""A bank of masks as a file: what each task keeps, entropy-coded, and what that costs to the byte.

The file: a magic, the length of a header and the header as JSON (leaves, bits of scales, each task's lengths), then for
each task its coded masks and scale codes, its levels (or scales, if they are floats) and its own leaves, then the
weights that any task keeps, if they are to be there, and at last a CRC of all before it. A mask is coded weight by
weight, given which earlier tasks kept the weight and how much of its row and column this task has kept so far; a scale
code given those before it. Counts adapt as coding goes on, so nothing but the masks is told. What decides a probability
is kept in integers, so that every machine decodes the same.
"""

import heapq
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import files
from jaxcl.masks.contract import FREE, Bank, Named, unpacked_masks
from jaxcl.masks.scales import FewScales
from jaxcl.trees import leaves_by_path
from jaxcl.typing import PyTree, bad_argument, check_between

_MAGIC = b"JAXCLMK2"
_UNIT = 1 << 16  # what a probability of 1 is in integers
_SHRINK = 8  # so many expected weights a row or column weighs against what was seen of it
_LAST = 3  # tasks, of which each counts by itself in a weight's context
_CONTEXTS = 8 * 2**_LAST  # those, and how many tasks kept the weight, up to 7
_RUN = 32  # symbols between two changes of the counts, at least
_RUNS = 8192  # of a mask, about, at most, and as many rows: what coding takes is time for runs
_SURE = 1e-3  # no weight is held to be kept, or not, with a chance below it
_FLOAT = 32  # bits of scales that are not coded
_WEIGHTS_A_BYTE = 6000  # at most so many: 8 / -log2(1 - _SURE) is 5,541
_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMBERS = "bfloat16", "float16", "float32", "float64", "complex64", "complex128"
_TYPES = {name: np.dtype(name) for name in ("bool", *_INTEGERS, *_NUMBERS)}  # of leaves without a mask, and of weights
# (probabilities [n] or [n, levels], symbols [n] or None) -> symbols [n]: writes the symbols, or reads them
_Code = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


class TaskCost(NamedTuple):
    """Bytes that a task adds to a file."""

    masks: int  # masks and scales
    own: int  # leaves without a mask


def save_bank(path: str | os.PathLike[str], bank: Bank, tasks: int, *, weights: PyTree | None = None) -> list[TaskCost]:
    """Writes what the first tasks keep, whole or not at all; what each of them costs.

    Args:
        path: of the file.
        bank: of a mask method's state.
        tasks: how many are committed, 1 to T.
        weights: the network's parameters: those that these tasks keep go into the file as well, which then holds all
            that it takes to answer. None leaves them out: they are the network's, once for all tasks.

    Raises:
        ImportError: constriction is missing.
        ValueError: more tasks than the bank has, weights of another network, leaves of a type that no file has, or
            tasks that were not committed in the order of their numbers.
        OSError: the file cannot be written.
    """
    check_between("tasks", tasks, 1, len(next(iter(bank.masks.values()))))
    masks, own = unpacked_masks(bank, tasks), {name: np.asarray(leaf) for name, leaf in bank.own.items()}
    for name, mask in masks.items():
        owner = np.asarray(bank.owner[name]).reshape(-1)
        if np.any(np.where(owner < tasks, owner, FREE) != _owners(mask)):
            raise bad_argument("bank", f"{name} of other owners", "commit tasks once each: 0, 1, 2 and so on")
    shapes = {name: owner.shape for name, owner in bank.owner.items()}
    if unknown := {leaf.dtype.name for leaf in own.values()} - _TYPES.keys():
        raise bad_argument("bank", f"leaves of {', '.join(unknown)}", f"a file has leaves of {', '.join(_TYPES)}")
    few = {name: scales for name, scales in bank.scales.items() if isinstance(scales, FewScales)}
    bits = int(math.log2(next(iter(few.values())).levels.shape[-1])) if few else 0
    floats = [few[name].levels if few else bank.scales[name] for name in masks if bank.scales]
    bodies, costs = [], []
    for task in range(tasks):
        coded = _encode(masks, shapes, _codes(few, masks, bits, task), bits, task)
        plain = b"".join(np.asarray(leaf[task], "<f4").tobytes() for leaf in floats)
        leaves = b"".join(leaf[task].tobytes() for leaf in own.values())
        bodies.append(coded + plain + leaves)
        costs.append((len(coded), TaskCost(len(coded) + len(plain), len(leaves))))
    header = {
        "masks": {name: list(shape) for name, shape in shapes.items()},
        "own": {name: [leaf.dtype.name, *leaf.shape[1:]] for name, leaf in own.items()},
        "scale_bits": (bits if few else _FLOAT) if bank.scales else None,
        "coded": [length for length, _ in costs],
    }
    if weights is not None:
        found = {name: np.asarray(leaf) for name, leaf in leaves_by_path(weights).items() if name in shapes}
        if {name: leaf.shape for name, leaf in found.items()} != shapes:
            given = {name: leaf.shape for name, leaf in found.items()}
            raise bad_argument("weights", given, f"pass parameters whose leaves with masks are {shapes}")
        kept = {name: found[name].reshape(-1)[mask.any(axis=0)] for name, mask in masks.items()}
        header["weights"] = {name: [of.dtype.name, of.size] for name, of in kept.items()}
        bodies += [of.tobytes() for of in kept.values()]
    text = json.dumps(header).encode()
    content = b"".join([_MAGIC, struct.pack("<I", len(text)), text, *bodies])
    files.write_atomic(path, content + struct.pack("<I", zlib.crc32(content)))
    return [cost for _, cost in costs]


class StoredBank(NamedTuple):
    """What a file holds."""

    bank: Bank
    tasks: int  # how many are committed
    weights: Named | None  # by path of a masked leaf, of its shape, 0 where no task keeps a weight; None if left out


def load_bank(path: str | os.PathLike[str], *, capacity: int | None = None) -> StoredBank:
    """Reads what `save_bank` wrote; no mask [T, ceil(n / 8)] differs in a bit.

    Args:
        path: of the file.
        capacity: T of the bank; None takes as many tasks as the file has.

    Raises:
        ImportError: constriction is missing.
        ValueError: the file is damaged or none of this kind, has more tasks than `capacity`, or has leaves of 64 bits
            where JAX has none.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    fault = bad_argument("path", path, "it is damaged, or no file of masks: copy it again")
    try:
        header = _read_header(content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        raise fault from error
    for kind, _ in [*header.own.values(), *(header.weights or {}).values()]:
        if jax.dtypes.canonicalize_dtype(kind) != kind:
            raise bad_argument("path", f"{path}, with leaves of {kind}", "set jax_enable_x64 before loading it")
    tasks, at = len(header.coded), header.end
    if capacity is not None:
        check_between("capacity", capacity, tasks, FREE)
    room, bits = capacity or tasks, header.code_bits
    masks = {name: np.zeros((room, math.prod(shape)), bool) for name, shape in header.masks.items()}
    codes = {name: np.zeros(mask.shape, np.uint8) for name, mask in masks.items()}
    floats = {
        name: np.zeros((room, *_floats_of_scales(header.scale_bits, shape)), np.float32)
        for name, shape in header.masks.items()
    }
    own = {name: np.zeros((room, *shape), kind) for name, (kind, shape) in header.own.items()}
    plain = [*floats.values(), *own.values()]
    for task, length in enumerate(header.coded):
        try:
            _decode(content[at : at + length], masks, header.masks, codes, bits, task)
        except (AssertionError, ValueError) as error:  # which the decoder raises where no encoder can have come
            raise fault from error
        at += length
        for leaf in plain:
            leaf[task] = np.frombuffer(content, leaf.dtype, leaf[task].size, at).reshape(leaf[task].shape)
            at += leaf[task].nbytes
    weights: Named = {}
    for name, (kind, count) in (header.weights or {}).items():
        kept = masks[name].any(axis=0)
        if kept.sum() != count:
            raise fault
        leaf = np.zeros(kept.size, kind)
        leaf[kept] = np.frombuffer(content, kind, count, at)
        at += count * kind.itemsize
        weights[name] = jnp.asarray(leaf.reshape(header.masks[name]))
    places = np.arange(bits, dtype=np.uint8)[:, None]
    scales: dict[str, Any] = {}
    for name, leaf in floats.items() if header.scale_bits is not None else ():
        planes = [np.packbits((of_task >> places) & 1) for of_task in codes[name]]
        few = header.scale_bits != _FLOAT
        scales[name] = FewScales(jnp.asarray(leaf), jnp.asarray(np.stack(planes))) if few else jnp.asarray(leaf)
    bank = Bank(
        {name: jnp.asarray(np.packbits(mask, axis=1)) for name, mask in masks.items()},
        {name: jnp.asarray(_owners(mask).reshape(header.masks[name])) for name, mask in masks.items()},
        {name: jnp.asarray(leaf) for name, leaf in own.items()},
        scales,
    )
    return StoredBank(bank, tasks, None if header.weights is None else weights)


def huffman_bits(bank: Bank, tasks: int) -> float:
    """Bits a weight that the first tasks' masks take together as WSN stores them, without the code's table.

    The masks of all tasks are one symbol a weight, and symbols have a Huffman code (Kang et al. 2022, section 3.3).

    Args:
        bank: with masks [T, ceil(n / 8)].
        tasks: how many count.
    """
    together = np.concatenate(list(unpacked_masks(bank, tasks).values()), axis=1)
    _, counts = np.unique(np.packbits(together, axis=0), axis=1, return_counts=True)
    heap = sorted(counts.tolist())
    if len(heap) == 1:
        return 0.0
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged  # each of its weights gets one bit longer
        heapq.heappush(heap, merged)
    return total / together.shape[1]


class _Header(NamedTuple):
    masks: dict[str, tuple[int, ...]]  # shapes of leaves
    own: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]  # dtypes and shapes of the others
    scale_bits: int | None  # of a code, or `_FLOAT`; None for no scales
    coded: list[int]  # bytes of each task's masks and scale codes
    weights: dict[str, tuple[np.dtype[Any], int]] | None  # dtypes, and how many are kept
    end: int  # where the first task begins

    @property
    def code_bits(self) -> int:
        """Of a scale code."""
        return self.scale_bits % _FLOAT if self.scale_bits else 0


def _read_header(content: bytes) -> _Header:
    """What the file says of itself; any error means that it is damaged, or not as long as it says."""
    if content[: len(_MAGIC)] != _MAGIC or zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        raise ValueError("magic or sum")
    start = len(_MAGIC) + 4
    end = start + struct.unpack("<I", content[len(_MAGIC) : start])[0]
    header = json.loads(content[start:end])
    shapes = {name: _shape(shape) for name, shape in header["masks"].items()}
    own = {name: (_TYPES[kind], _shape(shape)) for name, (kind, *shape) in header["own"].items()}
    bits, lengths = header["scale_bits"], _sizes(header["coded"])
    if not (bits is None or type(bits) is int) or bits not in (None, *range(9), _FLOAT):
        raise ValueError(f"{bits} bits")
    if not 1 <= len(lengths) <= FREE or not shapes or shapes.keys() & own.keys():
        raise ValueError(f"{len(lengths)} tasks, leaves {sorted(shapes)} and {sorted(own)}")
    floats = sum(math.prod(_floats_of_scales(bits, shape)) for shape in shapes.values())
    leaves = sum(kind.itemsize * math.prod(shape) for kind, shape in own.values())
    weights = {name: (_TYPES[kind], _shape([count])[0]) for name, (kind, count) in header.get("weights", {}).items()}
    if weights and weights.keys() != shapes.keys():
        raise ValueError(f"weights of {sorted(weights)}")
    stored = sum(kind.itemsize * count for kind, count in weights.values())
    length = end + sum(lengths) + len(lengths) * (4 * floats + leaves) + stored
    if length != len(content) - 4:
        raise ValueError(f"{len(content)} bytes")
    if sum(map(math.prod, shapes.values())) * len(lengths) > _WEIGHTS_A_BYTE * len(content):
        raise ValueError(f"{shapes} in {len(content)} bytes")
    return _Header(shapes, own, bits, lengths, weights or None, end)


def _sizes(sizes: list[int]) -> list[int]:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return list(sizes)


def _shape(sizes: list[int]) -> tuple[int, ...]:
    # Sizes that NumPy refuses even where another one is 0
    if len(sizes) > 32 or math.prod(filter(None, _sizes(sizes))) >= 2**40:
        raise ValueError(f"shape {sizes}")
    return tuple(sizes)


def _floats_of_scales(bits: int | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is not coded of a leaf's scales, for one task: its levels, or all of them."""
    if bits is None:
        return (0,)
    return shape if bits == _FLOAT else (2**bits,)


def _owners(masks: np.ndarray) -> np.ndarray:
    """The first task that keeps each weight, or FREE, uint8 [n], of bool [T, n]."""
    return np.where(masks.any(axis=0), masks.argmax(axis=0), FREE).astype(np.uint8)


def _codes(
    scales: Mapping[str, FewScales], masks: Mapping[str, np.ndarray], bits: int, task: int
) -> dict[str, np.ndarray]:
    """By path, the scale code of each weight uint8 [n]."""
    found = {}
    for name, mask in masks.items():
        size = mask.shape[1]
        packed = np.asarray(scales[name].codes[task]) if bits else np.zeros(0, np.uint8)
        planes = np.unpackbits(packed, count=bits * size).reshape(bits, size)
        found[name] = np.asarray((planes << np.arange(bits, dtype=np.uint8)[:, None]).sum(axis=0, dtype=np.uint8))
    return found


def _encode(
    masks: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], codes: Mapping[str, np.ndarray],
    bits: int, task: int,
) -> bytes:  # fmt: skip
    stream = _constriction().stream
    encoder = stream.queue.RangeEncoder()

    def code(probabilities: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        assert symbols is not None
        encoder.encode(symbols.astype(np.int32), _model(stream, probabilities), probabilities)
        return symbols

    for name, mask in masks.items():
        _code_mask(code, mask[:task], shapes[name], mask[task])
        _code_scales(code, bits, _reused(mask, task), codes[name])
    words: np.ndarray = encoder.get_compressed()
    return words.astype("<u4").tobytes()


def _decode(
    coded: bytes, masks: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]],
    codes: Mapping[str, np.ndarray], bits: int, task: int,
) -> None:  # fmt: skip
    """Fills in the masks and codes of a task, those before it being there."""
    stream = _constriction().stream
    decoder = stream.queue.RangeDecoder(np.frombuffer(coded, "<u4").astype(np.uint32))

    def code(probabilities: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        return np.asarray(decoder.decode(_model(stream, probabilities), probabilities))

    for name, mask in masks.items():
        mask[task] = _code_mask(code, mask[:task], shapes[name], None)
        codes[name][task] = _code_scales(code, bits, _reused(mask, task), None)


def _model(stream: Any, probabilities: np.ndarray) -> Any:
    return (stream.model.Bernoulli if probabilities.ndim == 1 else stream.model.Categorical)(perfect=False)


def _reused(mask: np.ndarray, task: int) -> np.ndarray:
    """Which weights [n] a task keeps that others kept before it, of bool [T, n]."""
    return mask[task] & mask[:task].any(axis=0)


def _code_mask(code: _Code, before: np.ndarray, shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """The mask bool [n] of a leaf, row by row and in runs of columns, given those of earlier tasks [t, n].

    What is expected of a weight by its context alone is held against what came of its row and column so far. Rows
    shorter than a run are taken several at once, and so are those of a leaf that has very many.
    """
    size = math.prod(shape)
    columns = shape[-1] if shape and size > shape[-1] else 1
    columns *= max(-(-_RUN // columns), -(-size // (columns * _RUNS)))
    contexts, found = _context(before), np.zeros(size, bool)
    ones, seen = np.ones(_CONTEXTS, np.int64), np.full(_CONTEXTS, 2, np.int64)
    in_column, expected_in_column = np.zeros(columns, np.int64), np.zeros(columns, np.int64)  # the latter in units
    run_length = max(_RUN, size // _RUNS)
    for begin in range(0, size, columns):
        in_row, expected_in_row, of_row = 0, 0, min(columns, size - begin)
        for start in range(0, of_row, run_length):
            part = slice(start, min(start + run_length, of_row))
            weights = slice(begin + part.start, begin + part.stop)
            context = contexts[weights]
            base = ones[context] * _UNIT // seen[context]
            odds = base / (_UNIT - base)
            odds = odds * _surprise(in_column[part], expected_in_column[part], begin // columns)
            odds = odds * _surprise(in_row, expected_in_row, start)
            probabilities = np.clip(odds / (1 + odds), _SURE, 1 - _SURE)
            run = code(probabilities, None if mask is None else mask[weights]).astype(bool)
            found[weights] = run
            ones += np.bincount(context[run], minlength=_CONTEXTS)
            seen += np.bincount(context, minlength=_CONTEXTS)
            in_column[part] += run
            expected_in_column[part] += base
            in_row += int(run.sum())
            expected_in_row += int(base.sum())
    return found


def _context(before: np.ndarray) -> np.ndarray:
    """What earlier tasks [t, n] tell of a weight, uint8 [n]: which of the last three kept it, how many of all did."""
    last = before[::-1][:_LAST].astype(np.uint8)
    which = np.sum(last << np.arange(len(last), dtype=np.uint8)[:, None], axis=0, dtype=np.uint8)
    many = np.minimum(before.sum(axis=0, dtype=np.uint8), _CONTEXTS // 2**_LAST - 1)
    return np.asarray(which + 2**_LAST * many, np.uint8)


def _surprise(count: Any, expected: Any, of: int) -> Any:
    """By what the odds of a weight change that lies where so many of some are kept, and so many units were expected."""
    more = (count + _SHRINK) * _UNIT / (expected + _SHRINK * _UNIT)
    fewer = (of - count + _SHRINK) * _UNIT / (of * _UNIT - expected + _SHRINK * _UNIT)
    return more / fewer


def _code_scales(code: _Code, bits: int, reused: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    """The scale codes uint8 [n] of a leaf, of re-used weights; 0 elsewhere."""
    found = np.zeros(len(reused), np.uint8)
    places = np.flatnonzero(reused)
    counts = np.ones(2**bits, np.int64)
    for start in range(0, len(places) if bits else 0, _RUN):
        part = places[start : start + _RUN]
        probabilities = np.tile(counts / counts.sum(), (len(part), 1))
        found[part] = code(probabilities, None if codes is None else codes[part])
        counts += np.bincount(found[part], minlength=2**bits)
    return found


def _constriction() -> Any:
    try:
        import constriction  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('files of masks need constriction: pip install "jaxcl[coding]"') from error
    return constriction
