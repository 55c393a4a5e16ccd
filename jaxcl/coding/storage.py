"""Compressed weights as a file, which needs neither data nor the network's code to be decoded.

The file, `.jcl`: a magic with a version, the length of the header, the header (text, deflated: a line of numbers,
then one for each leaf), the prior's scale for each leaf (the upper half of a float32), the blocks' indices and a CRC of
all before it. Indices are packed at their full width or, where that is shorter, as bit lengths, entropy-coded by counts
that adapt as coding goes on, and the bits below the leading one, packed.
"""

import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl import files
from jaxcl.coding.arithmetic import decode_symbols, encode_symbols
from jaxcl.coding.candidates import chosen_candidates
from jaxcl.coding.coders import MOST_BITS
from jaxcl.coding.layout import Layout, Leaf, check_layout, nested, places
from jaxcl.typing import ArrayLike, bad_argument, check_between

_MAGIC = b"JCL1"  # ends in the version
# What most headers are made of, so that deflate need not spell it out; version 1 has it for ever
_WORDS = "\n".join((
    "params/Embed_0/embedding\t", "params/LayerNorm_0/scale\t", "params/BatchNorm_0/scale\t", "params/head/bias\t10",
    "params/head/kernel\t500 10", "params/Conv_0/bias\t32", "params/Conv_0/kernel\t3 3 3 32", "params/Conv_1/bias\t64",
    "params/Conv_1/kernel\t3 3 32 64", "params/Dense_0/bias\t100", "params/Dense_0/kernel\t784 100:",
    "params/Dense_1/bias\t", "params/Dense_1/kernel\t",
)).encode()  # fmt: skip
_HEADER_LIMIT = 1 << 20  # bytes of a header, inflated
_LINE_LIMIT = 2000  # characters of a leaf's line: its path has up to 1,000, its sizes up to 11 each
_SCALES = (1e-28, 1e37)  # candidates are from 2e-10 to 6.4: no weight is subnormal, and none overflows
LIMIT = 1 << 25  # weights, unless a caller allows more


class Message(NamedTuple):
    """What travels: the weights as indices of shared candidates, and what it takes to decode them."""

    layout: Layout
    scales: np.ndarray  # [leaves] float32, of the priors N(0, scale^2), as `storable` gives them
    bits: int  # of an index
    indices: ArrayLike  # [M] uint32
    kl: float  # what the sender spent on a block, in the mean, in bits; decoding does not need it


def storable(scales: ArrayLike) -> np.ndarray:
    """Scales [...] as a file has them, and both sides must use: the nearest float32 whose lower 16 bits are 0."""
    words = np.asarray(scales, np.float32).view(np.uint32)
    return (words + 0x8000 & 0xFFFF0000).view(np.float32)


def values(message: Message, blocks: np.ndarray | None = None) -> np.ndarray:
    """What indices stand for, float32 [M, W], or [N, W] of some `blocks` [N]: the same bits on every machine."""
    layout, indices = message.layout, np.asarray(message.indices)
    which = np.arange(layout.blocks) if blocks is None else blocks
    drawn = chosen_candidates(layout.seed, which, indices[which], layout.width)
    return drawn * message.scales[places(layout).leaf[which]]


def decode(message: Message) -> dict[str, Any]:
    """The parameter tree: nested dicts with leaves float32 [...], the same bits on every machine and JAX version."""
    flat = values(message).reshape(-1)
    return nested({path: np.asarray(flat[place]) for path, place in places(message.layout).of_weights.items()})


def save(path: str | os.PathLike[str], message: Message) -> int:
    """Writes a file, whole or not at all; returns its size in bytes.

    Raises:
        ValueError: what no file can hold, as scales that are not `storable`, or indices of more bits than it says.
        OSError: the file cannot be written.
    """
    _check(message)
    layout, scales, bits, _, kl = message
    indices = np.asarray(message.indices).astype(np.int64)
    numbers = indices + 1
    lengths = _lengths(numbers)
    plain = _pack(indices, np.full(len(indices), bits))
    adaptive = encode_symbols(lengths, bits + 1) + _pack(numbers, lengths)
    body = min(plain, adaptive, key=len)
    upper = (scales.view(np.uint32) >> 16).astype("<u2").tobytes()
    content = _header(_Header(layout, bits, kl, int(body is adaptive))) + upper + body
    content += struct.pack("<I", zlib.crc32(content))
    files.write_atomic(path, content)
    return len(content)


def header_bytes(layout: Layout, bits: int) -> int:
    """Bytes that a file of blocks of so many bits has beside its indices, to within one or two.

    Raises:
        ValueError: more leaves than a header holds.
    """
    return len(_header(_Header(layout, bits, float(bits), 0))) + 2 * len(layout.leaves) + 4


def load(path: str | os.PathLike[str], *, limit: int = LIMIT) -> Message:
    """Reads what `save` wrote.

    Args:
        path: of the file.
        limit: the most weights that it may decode to; each takes some 125 bytes while it is decoded.

    Raises:
        ValueError: the file is damaged or none of this kind, or holds more weights than `limit`.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        header, rest = _parts(content)
        weights = max(header.layout.weights, header.layout.blocks * header.layout.width)
        message = _read(header, rest) if weights <= limit else None
    except (ValueError, struct.error, zlib.error) as error:
        raise bad_argument("path", path, "it is damaged, or no file of compressed weights: copy it again") from error
    if message is None:
        raise bad_argument("limit", limit, f"{path} decodes to {weights} weights: allow them if you trust it")
    return message


class _Header(NamedTuple):
    layout: Layout
    bits: int
    kl: float
    adaptive: int  # whether bit lengths are entropy-coded


def _header(header: _Header) -> bytes:
    """The beginning of a file, which `_parts` reads."""
    layout, bits, kl, adaptive = header
    text = "\n".join([f"{kl:.2f} {layout.width} {layout.seed} {bits} {adaptive}", *map(_line, layout.leaves)]).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_WORDS)
    packed = packer.compress(text) + packer.flush()
    if len(packed) >= 1 << 16 or len(text) > _HEADER_LIMIT:
        raise bad_argument("layout", f"{len(layout.leaves)} leaves", "their paths are too much for a header")
    return _MAGIC + struct.pack("<H", len(packed)) + packed


def _parts(content: bytes) -> tuple[_Header, bytes]:
    """The header of a file and what follows it; any error means that it is damaged."""
    if content[: len(_MAGIC)] != _MAGIC or zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        raise ValueError("magic or sum")
    start = len(_MAGIC) + 2
    end = start + struct.unpack("<H", content[len(_MAGIC) : start])[0]
    inflater = zlib.decompressobj(-15, zdict=_WORDS)
    text = inflater.decompress(content[start:end], _HEADER_LIMIT)
    if not inflater.eof or inflater.unused_data:
        raise ValueError("header")
    numbers, *lines = text.decode().split("\n")
    kl, *rest = numbers.split(" ")
    width, seed, bits, adaptive = map(int, rest)
    layout = Layout(tuple(map(_leaf, lines)), width, seed)
    check_layout(layout)
    return _Header(layout, bits, float(kl), adaptive), content[end:-4]


def _read(header: _Header, content: bytes) -> Message:
    """The message behind a header; any error means that it is damaged."""
    layout, bits, kl, adaptive = header
    check_between("bits", bits, 1, MOST_BITS)
    check_between("adaptive", adaptive, 0, 1)
    upper = np.frombuffer(content, "<u2", len(layout.leaves))
    body = content[upper.nbytes :]
    if adaptive:
        lengths, at = decode_symbols(body, layout.blocks, bits + 1)
        indices = _unpack(body[at:], lengths) + (1 << lengths) - 1
    elif 8 * len(body) >= layout.blocks * bits:
        indices = _unpack(body, np.full(layout.blocks, bits))
    else:
        raise ValueError("length")
    scales = (upper.astype(np.uint32) << 16).view(np.float32)
    message = Message(layout, scales, bits, indices, kl)
    _check(message)
    return message._replace(indices=indices.astype(np.uint32))


def _check(message: Message) -> None:
    """Raises ValueError unless a file can hold the message."""
    layout, scales, bits, indices, kl = message
    indices = np.asarray(indices)
    check_layout(layout)
    check_between("message.bits", bits, 1, MOST_BITS)
    check_between("message.kl", kl, 0, 1e9)
    if indices.shape != (layout.blocks,) or not np.issubdtype(indices.dtype, np.integer):
        given = f"{indices.dtype} of shape {indices.shape}"
        raise bad_argument("message.indices", given, f"pass an integer for each of {layout.blocks} blocks")
    for index in (indices.min(), indices.max()):
        check_between("message.indices", int(index), 0, 2**bits - 1)
    low, high = _SCALES
    sound = (
        scales.dtype == np.float32
        and scales.shape == (len(layout.leaves),)
        and ((scales >= low) & (scales <= high)).all()
    )
    if not sound or not np.array_equal(scales, storable(scales)):
        fix = f"pass one from {low} to {high} for each leaf, rounded with storable() before anything is coded"
        raise bad_argument("message.scales", scales, fix)


def _line(leaf: Leaf) -> str:
    """A leaf in the header: its path, a tab, its shape, and the number of its values if that is smaller."""
    return f"{leaf.path}\t{' '.join(map(str, leaf.shape))}" + (f":{leaf.values}" if leaf.values < leaf.size else "")


def _leaf(line: str) -> Leaf:
    if len(line) > _LINE_LIMIT:  # before sizes are multiplied, of which half a million would fill a header
        raise ValueError(f"a line of {len(line)} characters")
    path, rest = line.split("\t")
    sizes, colon, kept = rest.partition(":")
    shape = tuple(map(int, sizes.split()))
    return Leaf(path, shape, int(kept) if colon else math.prod(shape))


def _lengths(numbers: np.ndarray) -> np.ndarray:
    """Bits below the leading one [M] of positive integers [M]."""
    return np.frexp(numbers.astype(np.float64))[1] - 1


def _pack(numbers: np.ndarray, lengths: np.ndarray) -> bytes:
    """The lowest bits of integers [M], of each as many as `lengths` [M] says."""
    starts, bits = np.cumsum(lengths) - lengths, np.zeros(lengths.sum(), np.uint8)
    for place in range(lengths.max()):
        long = lengths > place
        bits[starts[long] + place] = numbers[long] >> (lengths[long] - 1 - place) & 1
    return np.packbits(bits).tobytes()


def _unpack(packed: bytes, lengths: np.ndarray) -> np.ndarray:
    """What `_pack` packed, int64 [M].

    Raises:
        ValueError: the bytes are too few or too many.
    """
    total = int(lengths.sum())
    if len(packed) != -(-total // 8):
        raise ValueError(f"{len(packed)} bytes for {total} bits")
    starts, bits = np.cumsum(lengths) - lengths, np.unpackbits(np.frombuffer(packed, np.uint8))
    numbers = np.zeros(len(lengths), np.int64)
    for place in range(lengths.max()):
        long = lengths > place
        numbers[long] = numbers[long] << 1 | bits[starts[long] + place]
    return numbers
