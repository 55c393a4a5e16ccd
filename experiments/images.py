"""Sets of images by name, as experiments on images take them."""

import jax
import numpy as np
from tqdm import tqdm

from jaxcl import data
from jaxcl.continual import Examples
from jaxcl.data.lazy import take
from jaxcl.typing import Array, Key, check_at_least, is_resident

NAMES = ("digits", "mnist", "cifar10", "cifar100", "tinyimagenet:PATH", "folder:PATH", "tfds:NAME")
_PIECE = 1024  # images decoded between two strokes of the bar


def load_images(name: str, *, size: int = 32, validation: bool = False, limit: int | None = None) -> data.Split:
    """Images [N, H, W] or [N, H, W, channels] in uint8 (digits: 0 to 16) and labels [N] int32; lazy if files are.

    Args:
        name: digits, mnist, cifar10, cifar100, tinyimagenet:PATH, folder:PATH or tfds:NAME.
        size: H and W to which the images of a folder are brought.
        validation: test on a fifth of train, held out, instead of test.
        limit: use the first so many training examples and a fifth as many test examples.

    Raises:
        ValueError: as the readers of `jaxcl.data`, or a limit below 1.
    """
    kind, _, rest = name.partition(":")
    if kind == "tinyimagenet":
        split = data.tiny_imagenet(rest)
    elif kind == "folder":
        split = data.image_folder(rest, size=(size, size))
    elif kind == "tfds":
        split = data.from_tfds(rest)
    else:
        split = data.load(kind)  # type: ignore[arg-type]  # it says which there are
    if validation:
        split = data.Split(*data.hold_out(split.train, share=0.2))
    if limit is not None:
        check_at_least("limit", limit, 1)
        split = data.Split(*(_first(part, count) for part, count in zip(split, (limit, -(-limit // 5)), strict=True)))
    return split


def read_images(examples: Examples, name: str) -> Examples:
    """The examples with all images in memory, since each will be asked for many times; with a bar called `name`."""
    inputs = examples.inputs
    if is_resident(inputs):
        return examples
    images = np.empty(inputs.shape, inputs.dtype)
    with tqdm(desc=name, total=len(images), unit="image", dynamic_ncols=True) as bar:
        for start in range(0, len(images), _PIECE):
            rows = np.arange(start, min(start + _PIECE, len(images)))
            images[rows] = inputs[rows]
            bar.update(len(rows))
    return examples._replace(inputs=images)


def normalised(statistics: data.Statistics, images: Array) -> Array:
    """Images [B, H, W] or [B, H, W, channels] as networks take them, [B, H, W, channels]."""
    made = data.normalise(statistics, images)
    return made if made.ndim == 4 else made[..., None]


def crop_and_flip(key: Key, images: Array) -> Array:
    """Images [B, H, W, channels] cropped at random, after padding by 4 pixels, and half of them mirrored."""
    crop_key, flip_key = jax.random.split(key)
    return data.random_flip(flip_key, data.random_crop(crop_key, images, padding=4))


def _first(examples: Examples, count: int) -> Examples:
    rows = np.arange(min(count, len(examples.inputs)))
    return Examples(take(examples.inputs, rows), np.asarray(examples.labels)[rows])
