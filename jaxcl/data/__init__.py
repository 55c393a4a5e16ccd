"""Data sources: the digits that scikit-learn ships, npz packs, image folders, data set libraries, and your own arrays.

A source is a `Split` of `continual.Examples`; arrays from memory need nothing but
``Split(Examples(train_inputs, train_labels), Examples(test_inputs, test_labels))``. Inputs may stay on disk: anything
with rows to ask for will do (`typing.RandomAccess`), and image folders and data set libraries give such inputs.
"""

from jaxcl.data.augment import random_crop, random_flip
from jaxcl.data.features import compute_features
from jaxcl.data.folders import image_folder, tiny_imagenet
from jaxcl.data.hugging_face import from_hugging_face
from jaxcl.data.normalisation import Statistics, channel_statistics, normalise
from jaxcl.data.packs import cifar10, cifar100, cl_text, fsdd, mnist
from jaxcl.data.sources import Split, digits, flat_features, hold_out, load
from jaxcl.data.text import text_task, tokenize
from jaxcl.data.tfds import from_tfds, text_task_from_tfds

__all__ = [
    "Split",
    "Statistics",
    "channel_statistics",
    "cifar10",
    "cifar100",
    "cl_text",
    "compute_features",
    "digits",
    "flat_features",
    "from_hugging_face",
    "from_tfds",
    "fsdd",
    "hold_out",
    "image_folder",
    "load",
    "mnist",
    "normalise",
    "random_crop",
    "random_flip",
    "text_task",
    "text_task_from_tfds",
    "tiny_imagenet",
    "tokenize",
]
