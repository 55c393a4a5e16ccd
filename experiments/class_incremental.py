"""Class-incremental learning: the key-value bottleneck, its baselines and ceilings on one set of streams.

This is the body that `experiments.dkvb` and `experiments.forget_class` give presets to.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import Run, RunConfig
from experiments.features import DataName, EncoderName, load_features
from experiments.keys import Indexed, KeyFitting, key_figures, train_bottleneck
from jaxcl import bottleneck, continual, data, nets
from jaxcl.bottleneck import Bottleneck
from jaxcl.continual import Strategy, Stream, streams
from jaxcl.typing import Key, bad_argument, check_at_least, check_between

Method = Literal[
    "naive", "linear_probe", "nearest_class_mean", "streaming_lda", "ridge", "dkvb", "joint", "joint_linear_probe"
]


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a class-incremental experiment; the defaults shown are those of the preset."""

    data: DataName = "digits"
    """digits comes with scikit-learn; mnist, cifar10 and the texts agnews and dbpedia lie in the folder that JAXCL_DATA
    names."""
    encoder: EncoderName = "pixels"
    """What features are made by: pixels are raw, minilm is for texts, the others are for cifar10."""
    weights: Path | None = None
    """Safetensors file of a vit (CLIP, DINO, timm), a resnet50 (CLIP, DINO, torchvision) or a convmixer (timm)."""
    features: Path = Path("runs/features")
    """Folder that keeps the features of a network, which thus are computed once for all runs."""
    methods: tuple[Method, ...] = ("naive", "linear_probe", "dkvb", "joint")
    """Which methods to run."""
    sweep: tuple[str, ...] = ()
    """A grid: settings with values to try, as codebooks=16,64 key_width=8,14. Each point is a run in a folder of its
    own in --out, which then holds compare.html."""
    classes_per_task: int = 2
    """New classes in each task."""
    blurry: float = 0.0
    """Share of each task's training examples that come in the other tasks. With --epochs 1 a stream is online too."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""

    codebooks: int = 64
    """Key-value bottleneck: codebooks (C)."""
    pairs: int = 256
    """Key-value bottleneck: key-value pairs in each codebook (J)."""
    key_width: int = 8
    """Key-value bottleneck: width of a key (W)."""
    top_k: int = 1
    """Key-value bottleneck: pairs fetched from each codebook."""
    projection: Literal["random", "chunk", "learned"] = "random"
    """Key-value bottleneck: what makes heads of a feature. learned is random directions of the space in which the key
    source varies, whitened; chunk needs features as wide as all keys of an example."""
    projection_share: float = 0.65
    """Key-value bottleneck: share of the key source's variance that a learned projection keeps."""
    key_source: Literal["stream", "noise", "digits", "mnist", "cifar10", "agnews", "dbpedia"] = "stream"
    """Key-value bottleneck: unlabelled examples that fit the keys: those of the stream, of another data set (with the
    same encoder), or noise, the data's pixels or tokens mixed up."""
    keys: Literal["averages", "simvq"] = "averages"
    """Key-value bottleneck: keys are moving averages of what chose them, or SimVQ's codes, which move together."""
    key_epochs: int = 10
    """Key-value bottleneck: passes over the key source that fit the keys."""
    key_batch_size: int = 256
    """Key-value bottleneck: examples in a step of key fitting."""
    learning_rate: float = 0.3
    """Key-value bottleneck: of gradient descent on the values; the global norm is clipped to 1."""
    epochs: int = 30
    """Key-value bottleneck: passes over each task."""
    value_width: int | None = None
    """Key-value bottleneck: floats of a value, as many as classes if not given. A table larger than the cache trains
    faster if a value is a cache line, 16."""

    decoder: Literal["voting", "linear", "mlp"] = "voting"
    """Key-value bottleneck: what makes logits of values; mlp has a hidden layer of 128."""
    train_decoder: bool = False
    """Key-value bottleneck: whether a linear or mlp decoder learns; the authors leave it as drawn."""
    dual: bool = False
    """Key-value bottleneck: train votes by how many pairs two examples share, [N, N] for a task of N: the same rule,
    faster from some hundred epochs on."""

    hidden: tuple[int, ...] = (64,)
    """Naive and joint training: widths of the hidden layers of the MLP."""
    baseline_learning_rate: float = 1e-3
    """Naive, joint and linear probe: of Adam."""
    baseline_epochs: int = 10
    """Naive, joint and linear probe: passes over each task (joint: over all of them together)."""
    ridge_strength: float = 1.0
    """Ridge: of the penalty."""
    lda_shrinkage: float = 1e-4
    """Streaming LDA: of the covariance."""
    batch_size: int = 32
    """All methods: examples in a step."""


def run(config: Config, *, experiment: str) -> dict[str, Any]:
    """Runs all methods on all seeds, prints the table, writes the files and returns what is in metrics.json."""
    run = Run(config, experiment)
    if document := run.finished():
        return document
    tasks, init_keys, run_keys = prepare(config)
    closed_forms = {
        "nearest_class_mean": continual.nearest_class_mean(),
        "streaming_lda": continual.streaming_lda(shrinkage=config.lda_shrinkage),
        "ridge": continual.ridge_classifier(strength=config.ridge_strength),
    }
    # Before any training, so that what is wrong about the bottleneck is told at once
    layer = make_layer(config, tasks[0])
    source = key_source(config, tasks[0]) if "dkvb" in config.methods else None
    for name in config.methods:
        of_method = [streams.joint(stream) for stream in tasks] if name.startswith("joint") else tasks
        if name in closed_forms:
            _closed_form(run, config, name, closed_forms[name], of_method, run_keys)
        elif name == "dkvb":
            train_dkvb(run, config, layer, source, of_method, init_keys, run_keys)
        elif name.endswith("linear_probe"):
            _linear_probe(run, config, name, of_method, run_keys)
        else:
            _mlp(run, config, name, of_method, init_keys, run_keys)
    return run.finish()


def make_layer(config: Config, stream: Stream) -> Bottleneck:
    """The bottleneck that `config` describes, for the features of a stream."""
    if config.value_width is not None and config.decoder == "voting":
        check_at_least("value_width", config.value_width, stream.eligible.shape[1])
    return bottleneck.discrete_key_value_bottleneck(
        stream.train.inputs.shape[1],
        config.value_width or stream.eligible.shape[1],
        codebooks=config.codebooks,
        pairs=config.pairs,
        key_width=config.key_width,
        top_k=config.top_k,
        projection="chunk" if config.projection == "chunk" else "random",
    )


def key_source(config: Config, stream: Stream) -> np.ndarray | None:
    """The features [N, D] that keys are fitted to, if they are not the stream's own."""
    if config.key_source == "stream":
        return None
    name = config.data if config.key_source == "noise" else config.key_source
    others = load_features(
        name, encoder=config.encoder, weights=config.weights,
        folder=config.features, limit=config.limit, noise=config.key_source == "noise",
    )  # fmt: skip
    given, wanted = (part.train.inputs.shape[-1] for part in (others, stream))
    if given != wanted:
        raise bad_argument(
            "key_source", f"{config.key_source}, {given} wide", f"choose one {wanted} wide, as {config.data}"
        )
    return np.asarray(others.train.inputs)


def train_dkvb(
    run: Run, config: Config, layer: Bottleneck, source: np.ndarray | None, tasks: Sequence[Stream],
    init_keys: Sequence[Key], keys: Key,
) -> list[Indexed]:  # fmt: skip
    """Trains the bottleneck `layer` as method "dkvb" of `run`; see `train_bottleneck`."""
    classes = tasks[0].eligible.shape[1]
    share = config.projection_share if config.projection == "learned" else None
    hidden = {"voting": None, "linear": (), "mlp": (128,)}[config.decoder]
    indexed = train_bottleneck(
        run, layer, config.learning_rate, tasks, init_keys, keys, classes=classes,
        fitting=KeyFitting(config.key_epochs, config.key_batch_size, share, config.keys == "simvq"), source=source,
        decoder=None if hidden is None else nets.MLP(hidden, classes), train_decoder=config.train_decoder,
        dual=config.dual, epochs=config.epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip
    run.figures |= key_figures(layer, indexed[0], tasks[0])
    return indexed


def prepare(config: Config) -> tuple[list[Stream], list[Key], Key]:
    """For each seed a stream, a key for initial parameters, and [S] a key for training.

    Raises:
        ValueError: options of the bottleneck that do not go together, or are out of range.
    """
    if "dkvb" in config.methods:
        check_at_least("key_epochs", config.key_epochs, 1 if config.keys == "simvq" else 0)
        check_between("projection_share", config.projection_share, 1e-12, 1)
        if config.dual and config.decoder != "voting":
            raise bad_argument("dual", True, "a decoder is trained without it: leave one of the two out")
    if "dkvb" in config.methods and config.dual and (config.mesh or config.tensorboard):
        raise bad_argument(
            "dual",
            True,
            "it trains on one device and writes no event files: leave --mesh and --tensorboard out, or --dual",
        )
    split = load_features(
        config.data,
        encoder=config.encoder,
        weights=config.weights,
        folder=config.features,
        validation=config.validation,
        limit=config.limit,
    )
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    tasks = [_stream(config, key[0], split) for key in keys]
    return tasks, [key[1] for key in keys], jnp.stack([key[2] for key in keys])


def _stream(config: Config, key: Key, split: data.Split) -> Stream:
    if config.blurry:
        return streams.blurry(key, *split, classes_per_task=config.classes_per_task, share=config.blurry)
    return streams.class_incremental(key, *split, classes_per_task=config.classes_per_task)


def _mlp(run: Run, config: Config, name: str, tasks: Sequence[Stream], init_keys: Sequence[Key], keys: Key) -> None:
    net = nets.MLP(config.hidden, classes=tasks[0].eligible.shape[1])
    width = tasks[0].train.inputs.shape[1]
    params = [net.init(key, jnp.zeros((1, width))) for key in init_keys]
    run.train(
        name, continual.naive(net.apply), optax.adam(config.baseline_learning_rate), params, tasks, keys,
        epochs=config.baseline_epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip


def _linear_probe(run: Run, config: Config, name: str, tasks: Sequence[Stream], keys: Key) -> None:
    classes, width = tasks[0].eligible.shape[1], tasks[0].train.inputs.shape[1]
    params = [{"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}] * len(tasks)
    run.train(
        name, continual.linear_probe(), optax.adam(config.baseline_learning_rate), params, tasks, keys,
        epochs=config.baseline_epochs, batch_size=config.batch_size, steps_per_call=64,
    )  # fmt: skip


def _closed_form(run: Run, config: Config, name: str, strategy: Strategy, tasks: Sequence[Stream], keys: Key) -> None:
    run.train(name, strategy, optax.identity(), [()] * len(tasks), tasks, keys, epochs=1, batch_size=config.batch_size)
