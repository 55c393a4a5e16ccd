"""Labelled image sets as splits, and what one does to a split before training."""

from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxcl.continual.streams import Examples
from jaxcl.data import packs
from jaxcl.data.lazy import read_all, take
from jaxcl.typing import RandomAccess, check_between, check_choice, check_labels

Name = Literal["digits", "mnist", "cifar10", "cifar100"]


class Split(NamedTuple):
    """Examples to learn from and examples to be tested on."""

    train: Examples
    test: Examples


def load(name: Name) -> Split:
    """The image set of that name, images [N, H, W] or [N, H, W, 3] in uint8 (digits: 0 to 16) and labels [N] in int32.

    Raises:
        ValueError: no such set; or `JAXCL_DATA` is unset, or the pack or folder in it is missing or malformed.
    """
    check_choice("name", name, get_args(Name))
    if name == "digits":
        return digits()
    return Split(*{"mnist": packs.mnist, "cifar10": packs.cifar10, "cifar100": packs.cifar100}[name]())


def digits() -> Split:
    """The 1,797 handwritten digits of scikit-learn, images [N, 8, 8] in uint8 from 0 to 16; nothing is downloaded.

    They have no official test split: here every fifth example of each class, in the file's order, is a test example.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('digits need scikit-learn: pip install "jaxcl[data]"') from error
    images, labels = load_digits(return_X_y=True)
    everything = Examples(images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.int32))
    return Split(*hold_out(everything, share=0.2))


def hold_out(examples: Examples, *, share: float) -> tuple[Examples, Examples]:
    """Cuts a validation (or test) part from each class evenly, in order, without chance: (rest, part).

    Args:
        examples: inputs [N, ...], which stay lazy if they are, and labels [N].
        share: of each class that is held out, from 0 to 1.
    """
    check_between("share", share, 0, 1)
    labels = np.asarray(examples.labels)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        # The running count of held examples follows the running share: each time it steps up, one is held.
        steps = np.floor((np.arange(len(rows)) + 1) * share + 1e-9)
        held[rows] = np.diff(steps, prepend=0) > 0
    rest, part = np.flatnonzero(~held), np.flatnonzero(held)
    return Examples(take(examples.inputs, rest), labels[rest]), Examples(take(examples.inputs, part), labels[part])


def flat_features(split: Split) -> Split:
    """Raw pixels as features: [N, ...] uint8 to [N, D] float32, scaled so that the largest training value is 1.

    Features are in memory: lazy inputs are read whole.
    """
    train, test = (read_all(examples.inputs) for examples in split)
    top = float(train.max(initial=0)) or 1.0

    def flat(examples: Examples, inputs: np.ndarray) -> Examples:
        return examples._replace(inputs=inputs.reshape(len(inputs), -1).astype(np.float32) / np.float32(top))

    return Split(flat(split.train, train), flat(split.test, test))


def labelled(
    train_inputs: RandomAccess, train_labels: np.ndarray, test_inputs: RandomAccess, test_labels: np.ndarray
) -> Split:
    """Inputs [N, ...] with labels [N] of any integer type, checked and made int32, each part of its own N.

    Raises:
        ValueError: labels that are no integers or below 0, or one in test that is above all in train.
    """
    check_labels("train.labels", train_labels, np.iinfo(np.int32).max)
    check_labels("test.labels", test_labels, int(train_labels.max()) + 1)
    return Split(
        Examples(train_inputs, train_labels.astype(np.int32)), Examples(test_inputs, test_labels.astype(np.int32))
    )
