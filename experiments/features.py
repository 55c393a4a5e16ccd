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
EncoderName = Literal["pixels", "efficientnet_lite0", "vit", "resnet50", "convmixer", "minilm"]
TEXTS = ("agnews", "dbpedia")
TOKENS = 128  # of a text at most


def load_features(
    name: DataName,
    *,
    encoder: EncoderName = "pixels",
    weights: Path | None = None,
    folder: Path = Path("runs/features"),
    validation: bool = False,
    limit: int | None = None,
    noise: bool = False,
) -> data.Split:
    """Features [N, D] float32 and labels of a data set.

    Args:
        name: images, or one task of the text benchmark.
        encoder: pixels scales raw ones so that the largest is 1; the others are networks, frozen.
        weights: safetensors file of a vit, resnet50 or convmixer; the others have theirs.
        folder: where a network's features are kept, so that they are computed once.
        validation: test on a fifth of the training examples, held out, instead of test.
        limit: use the first so many training examples, before any are held out, and a fifth as many test examples.
        noise: put in place of each value of an example, a pixel or a token, the one that another example, drawn for
            each value anew, has there.

    Raises:
        ValueError: an encoder that does not fit the data; or as `data.load`, `data.cl_text` and the encoders.
    """
    if (name in TEXTS) != (encoder == "minilm") or (name in ("digits", "mnist") and encoder != "pixels"):
        raise bad_argument("encoder", encoder, "pixels goes with images, minilm with texts, the others with cifar10")
    if (weights is not None) != (encoder in ("vit", "resnet50", "convmixer")):
        raise bad_argument(
            "weights", weights, "name a safetensors file for vit, resnet50 or convmixer, and for no other"
        )
    split = _texts(name) if name == "agnews" or name == "dbpedia" else data.load(name)  # noqa: PLR1714, for mypy
    if limit is not None:
        check_at_least("limit", limit, 1)
        parts = zip(split, (limit, -(-limit // 5)), strict=True)
        split = data.Split(*(jax.tree.map(lambda leaf: leaf[:count], part) for part, count in parts))  # noqa: B023
    if noise:
        rng = np.random.default_rng(0)
        split = data.Split(*(part._replace(inputs=rng.permuted(np.asarray(part.inputs), axis=0)) for part in split))
    if encoder == "pixels":
        split = data.flat_features(split)
    elif encoder == "minilm":
        network = nets.minilm_encoder()
        split = data.Split(*(_encoded(network, _by_length(part), folder) for part in split))
    else:
        network = nets.efficientnet_lite0_encoder() if weights is None else nets.pretrained_encoder(encoder, weights)
        split = data.Split(*(_encoded(network, part, folder) for part in split))
    return data.Split(*data.hold_out(split.train, share=0.2)) if validation else split


def _texts(name: str) -> data.Split:
    """Tokens [N, 128] of texts."""
    tokenizer = nets.minilm_folder() / "tokenizer.json"
    return data.Split(
        *(Examples(data.tokenize(part.texts, tokenizer, length=TOKENS), part.labels) for part in data.cl_text(name))
    )


def _by_length(examples: Examples) -> Examples:
    """The examples in the order of their lengths in tokens, in which batches waste the least."""
    tokens, labels = (np.asarray(part) for part in examples)
    order = np.argsort((tokens != 0).sum(axis=1), kind="stable")
    return Examples(tokens[order], labels[order])


def _encoded(encoder: FrozenEncoder, examples: Examples, folder: Path) -> Examples:
    with tqdm(desc=f"features, {encoder.name}", total=len(examples.labels), unit="example", dynamic_ncols=True) as bar:
        features = data.compute_features(
            encoder, examples.inputs, folder=folder, callback=lambda done: bar.update(done - bar.n)
        )
    return examples._replace(inputs=np.asarray(features))
