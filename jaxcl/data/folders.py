"""Folders of image files, decoded when they are asked for: a folder a class, or Tiny ImageNet as it is distributed."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcl.continual.streams import Examples
from jaxcl.data.lazy import Lazy
from jaxcl.data.sources import Split
from jaxcl.typing import bad_argument, check_choice, check_count

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def image_folder(path: str | Path, *, size: tuple[int, int]) -> Split:
    """The images of ``path/train/<class>/`` and ``path/test/<class>/``, lazily: [N, H, W, 3] uint8, labels [N] int32.

    Classes are numbered in the order of the names of their folders in train, images stand in the order of class and
    file name. An image is decoded each time it is asked for, made RGB, scaled until it just covers (H, W), and what
    juts out is cut off evenly at both sides. Transparency is dropped, and a camera's note on how it was held ignored.

    Names that start with a dot are left out. Nothing else is: whatever is not a class folder or, by the ending of its
    name, a bmp, jpeg, jpg, png or webp file, is refused.

    Args:
        path: the folder that holds train and test.
        size: (H, W).

    Raises:
        ValueError: a folder is missing, empty, or holds what does not belong there; a class of test is not in train;
            or, when it is asked for, a file cannot be decoded or has more than 8 bits a channel.
        ImportError: Pillow is missing.
    """
    _check_pillow()
    if np.shape(size) != (2,):
        raise bad_argument("size", size, "pass (height, width)")
    for side in size:
        check_count("size", side, 1)
    classes = _names(Path(path) / "train")
    parts = [_part(Path(path) / part, classes, size) for part in ("train", "test")]
    return Split(*parts)


def tiny_imagenet(path: str | Path) -> Split:
    """Tiny ImageNet as it is distributed, lazily: [N, 64, 64, 3] uint8, labels [N] int32 below 200.

    Read are ``train/WNID/images/*.JPEG`` and, as test examples, ``val/images`` with ``val/val_annotations.txt``; those
    in ``test`` have no labels. Classes are numbered in the order of ``wnids.txt``.

    Args:
        path: the unpacked folder.

    Raises:
        ValueError: a file or folder is missing, a line of text malformed, or, when it is asked for, an image damaged.
        ImportError: Pillow is missing.
    """
    _check_pillow()
    root = Path(path)
    classes = _lines(root / "wnids.txt")
    train = [
        (str(root / "train" / name / "images" / image), number)
        for number, name in enumerate(classes)
        for image in _names(root / "train" / name / "images")
    ]
    test = []
    for number, line in enumerate(_lines(root / "val" / "val_annotations.txt")):
        image, name = (*line.split("\t"), "", "")[:2]
        if Path(image).name != image or name not in classes:
            raise bad_argument("path", f"val_annotations.txt, line {number + 1}: {line!r}", "copy the file again")
        test.append((str(root / "val" / "images" / image), classes.index(name)))
    return Split(*(_examples([file for file, _ in part], [n for _, n in part], (64, 64)) for part in (train, test)))


def rgb(image: "PillowImage") -> "PillowImage":
    """A Pillow image in RGB; ValueError if that would cut it to 8 bits."""
    if image.mode.startswith(("I", "F")):
        raise bad_argument("image", f"mode {image.mode}", "reduce it to 8 bits a channel, scaled as it should be")
    return image.convert("RGB")


def _part(folder: Path, classes: list[str], size: tuple[int, int]) -> Examples:
    files, labels = [], []
    for name in _names(folder):
        check_choice(f"class folder in {folder}", name, classes)
        images = _names(folder / name)
        for image in images:
            if not image.lower().endswith(ENDINGS):
                raise bad_argument("path", folder / name / image, f"only {', '.join(ENDINGS)} may lie there: move it")
        files += [str(folder / name / image) for image in images]
        labels += [classes.index(name)] * len(images)
    return _examples(files, labels, size)


def _examples(files: list[str], labels: list[int], size: tuple[int, int]) -> Examples:
    shape = (len(files), *size, 3)
    return Examples(Lazy(partial(_read, files, size), shape, np.dtype(np.uint8)), np.array(labels, np.int32))


def _check_pillow() -> None:
    try:
        import PIL  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError('image folders need Pillow: pip install "jaxcl[data]"') from error


def _lines(file: Path) -> list[str]:
    """The lines of a text file, without those that are empty."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise bad_argument("path", file, "it must be a text file of Tiny ImageNet: copy it again") from error
    if not lines:
        raise bad_argument("path", file, "the file is empty: copy it again")
    return lines


def _names(folder: Path) -> list[str]:
    """What lies in a folder, sorted."""
    if not folder.is_dir():
        raise bad_argument("path", folder, "it must be a folder: <path>/<train or test>/<class>/<image>")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names:
        raise bad_argument("path", folder, "the folder is empty: fill or remove it")
    return names


def _read(files: Sequence[str], size: tuple[int, int], row: int) -> np.ndarray:
    from PIL import Image, ImageOps  # noqa: PLC0415

    file, (height, width) = files[row], size
    try:
        with Image.open(file) as image:
            colours = rgb(image)
    except Exception as error:  # decoders of damaged files raise many kinds
        raise bad_argument("image file", file, f"repair or remove it ({error})") from error
    return np.asarray(ImageOps.fit(colours, (width, height), Image.Resampling.BILINEAR))
