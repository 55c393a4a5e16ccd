"""Data sets as features: raw pixels, or what a frozen encoder makes of images and texts, kept on disk."""

from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from jaxcl import data, nets
from jaxcl.continual import Examples
from jaxcl.nets import FrozenEncoder
from jaxcl.typing import bad_argument, check_at_least

DataName = Literal["digits", "mnist", "cifar10", "agnews", "dbpedia"]
EncoderName = Literal["pixels", "efficientnet_lite0", "minilm"]
TEXTS = ("agnews", "dbpedia")
TOKENS = 128  # of a text at most


def load_features(
    name: DataName,
    *,
    encoder: EncoderName = "pixels",
    folder: Path = Path("runs/features"),
    validation: bool = False,
    limit: int | None = None,
) -> data.Split:
    """Features [N, D] float32 and labels of a data set.

    Args:
        name: images, or one task of the text benchmark.
        encoder: pixels scales raw ones so that the largest is 1; the others are networks, frozen.
        folder: where a network's features are kept, so that they are computed once.
        validation: test on a fifth of train, held out, instead of test.
        limit: use the first so many training examples and a fifth as many test examples.

    Raises:
        ValueError: an encoder that does not fit the data; or as `data.load`, `data.cl_text` and the encoders.
    """
    if (name in TEXTS) != (encoder == "minilm") or (name in ("digits", "mnist") and encoder != "pixels"):
        raise bad_argument(
            "encoder", encoder, "pixels goes with images, efficientnet_lite0 with cifar10, minilm with texts"
        )
    split = _texts(name) if name == "agnews" or name == "dbpedia" else data.load(name)  # noqa: PLR1714, for mypy
    if limit is not None:
        check_at_least("limit", limit, 1)
        parts = zip(split, (limit, -(-limit // 5)), strict=True)
        split = data.Split(*(jax.tree.map(lambda leaf: leaf[:count], part) for part, count in parts))  # noqa: B023
    if encoder == "pixels":
        split = data.flat_features(split)
    else:
        network = nets.minilm_encoder() if encoder == "minilm" else nets.efficientnet_lite0_encoder()
        split = data.Split(*(_encoded(network, part, folder) for part in split))
    return data.Split(*data.hold_out(split.train, share=0.2)) if validation else split


def _texts(name: str) -> data.Split:
    """Tokens [N, T] of texts, T being that of the longest, 128 at most."""
    tokenizer = nets.minilm_folder() / "tokenizer.json"
    parts = [(data.tokenize(part.texts, tokenizer, length=TOKENS), part.labels) for part in data.cl_text(name)]
    return data.Split(*(Examples(tokens[:, : tokens.any(axis=0).sum()], labels) for tokens, labels in parts))


def _encoded(encoder: FrozenEncoder, examples: Examples, folder: Path) -> Examples:
    """Features of the examples; texts are encoded in the order of their lengths, which wastes the least."""
    inputs, order = examples.inputs, np.arange(len(examples.labels))
    if np.issubdtype(inputs.dtype, np.int32):
        order = np.argsort((np.asarray(inputs) != 0).sum(axis=1), kind="stable")
        inputs = np.asarray(inputs)[order]
    with tqdm(desc=f"features, {encoder.name}", total=len(examples.labels), unit="example", dynamic_ncols=True) as bar:
        features = data.compute_features(encoder, inputs, folder=folder, callback=lambda done: bar.update(done - bar.n))
    return examples._replace(inputs=np.asarray(features)[np.argsort(order)])
