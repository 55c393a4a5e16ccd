"""Readers of the folder that ``JAXCL_DATA`` names: npz packs, and CIFAR-100 in the binary version of its authors.

Nothing is unpickled, and a bad file gives one clear error.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.continual.streams import Examples
from jaxcl.typing import bad_argument, check_choice

_CIFAR100_ROW = 2 + 3 * 32 * 32  # bytes: coarse label, fine label, then red, green and blue, each row by row


class Clips(NamedTuple):
    """Recordings of spoken digits."""

    audio: list[np.ndarray]  # N arrays [samples] int16
    labels: np.ndarray  # [N] int32, the digit
    speakers: np.ndarray  # [N] int32, index into `speaker_names`
    speaker_names: list[str]
    sample_rate: int  # Hz


class Texts(NamedTuple):
    """Labelled texts."""

    texts: list[str]  # N
    labels: np.ndarray  # [N] int32, index into `label_names`
    label_names: list[str]


def mnist() -> tuple[Examples, Examples]:
    """MNIST, (train, test): 60,000 and 10,000 images [N, 28, 28] uint8, labels [N] int32."""
    pack = _read("mnist.npz")

    def part(name: str) -> Examples:
        images = _array(pack, f"{name}_images", 3)
        if images.shape[1:] != (28, 28) or images.dtype != np.uint8:
            raise _malformed(f"{name}_images", f"{images.dtype} of shape {images.shape}")
        return Examples(images, _labels(pack, f"{name}_labels", len(images)))

    return part("train"), part("test")


def cifar10() -> tuple[Examples, Examples]:
    """CIFAR-10 from JPEG (lossy), (train, test): 50,000 and 10,000 images [N, 32, 32, 3] uint8, labels [N] int32."""
    try:
        from PIL import Image  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('the cifar10 pack needs Pillow: pip install "jaxcl[data]"') from error
    pack = _read("cifar10.npz")

    def decode(part: str) -> Examples:
        files = _pieces(pack, f"{part}_jpeg_bytes", f"{part}_offsets")
        images = np.empty((len(files), 32, 32, 3), np.uint8)
        for number, file in enumerate(files):
            try:
                image = np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))
            except Exception as error:  # as Pillow's decoders raise all kinds
                raise _malformed(f"{part}_jpeg_bytes", f"image {number}: {error}") from error
            if image.shape != (32, 32, 3):
                raise _malformed(f"{part}_jpeg_bytes", f"image {number} of shape {image.shape}")
            images[number] = image
        return Examples(images, _labels(pack, f"{part}_labels", len(files)))

    return decode("train"), decode("test")


def cifar100() -> tuple[Examples, Examples]:
    """CIFAR-100, (train, test): 50,000 and 10,000 images [N, 32, 32, 3] uint8, fine labels [N] int32 below 100.

    Its binary version, unpacked: the folder ``cifar-100-binary``.
    """

    def read(name: str) -> Examples:
        content = np.fromfile(_path(f"cifar-100-binary/{name}"), np.uint8)
        if not len(content) or len(content) % _CIFAR100_ROW:
            raise _malformed(name, f"{len(content)} bytes, which are no rows of labels and images")
        rows = content.reshape(-1, _CIFAR100_ROW)
        if (rows[:, :2] >= (20, 100)).any():
            raise _malformed(name, "labels that are no classes")
        images = rows[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Examples(np.ascontiguousarray(images), rows[:, 1].astype(np.int32))

    return read("train.bin"), read("test.bin")


def fsdd() -> tuple[Clips, Clips]:
    """The Free Spoken Digit Dataset, (train, test) as officially split: 2,700 and 300 clips at 8 kHz."""
    pack = _read("fsdd.npz")
    clips = _pieces(pack, "audio", "offsets")
    is_test = _array(pack, "is_test", 1)
    if is_test.dtype != bool or len(is_test) != len(clips):
        raise _malformed("is_test", f"{len(is_test)} {is_test.dtype} for {len(clips)} clips")
    names = [str(name) for name in _array(pack, "speaker_names", 1)]
    rate = _array(pack, "sample_rate", 0)
    if not np.issubdtype(rate.dtype, np.integer) or rate < 1:
        raise _malformed("sample_rate", str(rate))
    digit, speaker = _labels(pack, "digit", len(clips)), _labels(pack, "speaker", len(clips), len(names))

    def part(keep: np.ndarray) -> Clips:
        audio = [clip for clip, kept in zip(clips, keep, strict=True) if kept]
        return Clips(audio, digit[keep], speaker[keep], names, int(rate))

    return part(~is_test), part(is_test)


def cl_text(task: str) -> tuple[Texts, Texts]:
    """One task of the text benchmark, (train, test).

    Raises:
        ValueError: no such task in the pack; or as for every pack.
    """
    pack = _read("cl_text.npz")
    check_choice("task", task, [str(name) for name in _array(pack, "task_names", 1)])
    names = [str(name) for name in _array(pack, f"{task}_label_names", 1)]

    def part(split: str) -> Texts:
        flat = f"{task}_{split}_bytes"
        try:
            texts = [piece.tobytes().decode() for piece in _pieces(pack, flat, f"{task}_{split}_offsets")]
        except UnicodeDecodeError as error:
            raise _malformed(flat, str(error)) from error
        return Texts(texts, _labels(pack, f"{task}_{split}_labels", len(texts), len(names)), names)

    return part("train"), part("test")


def _path(name: str) -> Path:
    folder = os.environ.get("JAXCL_DATA")
    if not folder:
        raise bad_argument("JAXCL_DATA", "no such environment variable", f"set it to the folder that holds {name}")
    path = Path(folder) / name
    if not path.is_file():
        raise bad_argument("JAXCL_DATA", folder, f"set it to a folder that holds {name}")
    return path


def _read(name: str) -> dict[str, np.ndarray]:
    path = _path(name)
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as pack:
            return {key: pack[key] for key in pack.files}
    except Exception as error:  # NumPy and zipfile raise all kinds, MemoryError among them
        raise _malformed(path.name, str(error)) from error


def _array(pack: dict[str, np.ndarray], name: str, rank: int) -> np.ndarray:
    array = pack.get(name)
    if not isinstance(array, np.ndarray) or array.ndim != rank:  # NpzFile gives other members as bytes
        raise _malformed(name, f"{array.ndim} axes instead of {rank}" if isinstance(array, np.ndarray) else "no array")
    return array


def _labels(pack: dict[str, np.ndarray], name: str, count: int, classes: int = 2**31) -> np.ndarray:
    """Labels [N] int32, one for each of `count` examples."""
    labels = _array(pack, name, 1)
    if len(labels) != count or not np.issubdtype(labels.dtype, np.integer):
        raise _malformed(name, f"{len(labels)} {labels.dtype} for {count} examples")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise _malformed(name, "labels that are no classes")
    return labels.astype(np.int32)


def _pieces(pack: dict[str, np.ndarray], flat: str, offsets: str) -> list[np.ndarray]:
    """The arrays that were laid end to end in `flat`, cut at `offsets` [N + 1]."""
    ends = _array(pack, offsets, 1)
    whole = _array(pack, flat, 1)
    sound = np.issubdtype(ends.dtype, np.integer) and len(ends) and ends[0] == 0 and ends[-1] == len(whole)
    if not sound or (ends[1:] < ends[:-1]).any():
        raise _malformed(offsets, f"offsets that do not cut {len(whole)} values in order")
    return np.split(whole, ends[1:-1])


def _malformed(name: str, what: str) -> ValueError:
    return bad_argument("data pack", f"{name}: {what}", "the file is damaged or not a jaxcl pack: copy it again")
