"""The standard continual-learning methods beside the key-value bottleneck, on split and permuted MNIST.

Naive training, EWC, online EWC, SI, LwF, ER, DER++, A-GEM, DKVB, and joint training as the ceiling, on three streams:
class_incremental (five tasks of two new digits, any digit may be the answer), task_incremental (the same, but the task
is told) and permuted (ten tasks, the pixels of each in an order of its own). An MLP on raw pixels, Adam.

Each stream leaves a folder of its own in --out, as other experiments do, and all of them together compare.html. Options
that are given hold for every stream. Strengths were chosen with --validation, which tests on a fifth of train (one
seed): on split MNIST where the task is told, and DER++'s where it is not; on permuted MNIST.

Presets: cpu takes 40 minutes for all on two cores. paper has the networks and schedules of van de Ven et
al. (2022): two layers of 400 or 1,000 units, 2,000 or 5,000 steps a task.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from experiments import compare
from experiments.card import Card
from experiments.common import Run, RunConfig, parse_command, run_command
from experiments.features import load_features
from experiments.keys import KeyFitting, train_bottleneck
from jaxcl import bottleneck, continual, nets
from jaxcl.continual import Strategy, Stream, streams

CARDS = {
    "--preset smoke": Card("2 min", "that it runs: accuracies after an epoch on 600 images say nothing"),
    "--preset cpu": Card(
        "40 min", "ACC %: DKVB 96.4, DER++ 94.2, ER 90.5, penalties 20; told the task, all 99 or more but naive, 90.5"
    ),
    "--preset paper": Card("hours, not measured", "van de Ven et al. 2022, tables 1 and 2"),
}
Method = Literal[
    "naive", "ewc", "online_ewc", "si", "lwf", "er", "der_plus_plus", "a_gem", "dkvb", "joint"
]  # fmt: skip
Kind = Literal["class_incremental", "task_incremental", "permuted"]


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the comparison on one stream; the defaults shown are those of the preset."""

    stream: Kind | Literal["all"] = "all"
    """Which stream to run; all runs one after another."""
    data: Literal["mnist", "digits"] = "mnist"
    """Image set: mnist is read from the folder that JAXCL_DATA names, digits comes with scikit-learn."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which methods to run."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the MLP."""
    learning_rate: float = 1e-3
    """Of Adam."""
    epochs: int = 4
    """Passes over each task."""
    batch_size: int = 128
    """Examples in a step."""
    permutations: int = 10
    """Tasks of the permuted stream."""

    ewc_strength: float = 1e4
    """EWC: lambda."""
    online_ewc_strength: float = 1e3
    """Online EWC: lambda."""
    online_ewc_decay: float = 1.0
    """Online EWC: gamma."""
    si_strength: float = 1.0
    """SI: c."""
    lwf_strength: float = 1.0
    """LwF: lambda_o."""
    memory_size: int = 1000
    """ER, DER++ and A-GEM: examples remembered."""
    memory_batch_size: int = 128
    """ER, DER++ and A-GEM: examples replayed in a step."""
    der_logits_strength: float = 1.0
    """DER++: alpha."""
    der_labels_strength: float = 1.0
    """DER++: beta."""

    codebooks: int = 32
    """DKVB: codebooks (C)."""
    pairs: int = 4096
    """DKVB: key-value pairs in each codebook (J)."""
    key_width: int = 112
    """DKVB: width of a key (W)."""
    key_epochs: int = 1
    """DKVB: passes over the unlabelled images, as the first task shows them, that fit the keys."""
    key_batch_size: int = 1024
    """DKVB: examples in a step of key fitting."""
    dkvb_learning_rate: float = 3.0
    """DKVB: of gradient descent on the values; the global norm is clipped to 1."""


def preset(name: str, data: str, *, stream: str) -> Config:
    """The settings of preset `name` for a data set and a stream."""
    chosen: dict[str, Any] = {"preset": name, "data": data, "stream": stream, "out": Path("runs/baselines"), "seeds": 3}
    if stream == "permuted":
        chosen |= {
            "epochs": 2, "batch_size": 256, "memory_batch_size": 256, "ewc_strength": 10.0, "online_ewc_strength": 10.0,
            "si_strength": 0.1, "der_logits_strength": 0.2, "der_labels_strength": 0.5, "dkvb_learning_rate": 300.0,
        }  # fmt: skip
    if name == "smoke":
        chosen |= {
            "seeds": 2, "limit": 600, "hidden": (32,), "epochs": 1, "batch_size": 32, "permutations": 3,
            "memory_size": 50, "memory_batch_size": 32, "codebooks": 8, "pairs": 32, "key_width": 8,
            "key_batch_size": 256,
        }  # fmt: skip
    if name == "paper":
        # 2,000 steps of 128 are 21 epochs of two digits; 5,000 steps of 256 are 21 of all ten.
        chosen |= {"hidden": (1000, 1000) if stream == "permuted" else (400, 400), "epochs": 21, "seeds": 20}
        if stream == "permuted":
            chosen["learning_rate"] = 1e-4
    return Config(**chosen)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the experiment; returns what is in the metrics.json of each stream."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stream", choices=(*get_args(Kind), "all"), default="all")
    asked = first.parse_known_args(argv)[0].stream
    documents, folders = [], []
    for stream in get_args(Kind) if asked == "all" else (asked,):
        config = parse_command(
            partial(preset, stream=stream), data=("mnist", "digits"), argv=argv, description=__doc__ or ""
        )
        folders.append(config.out / stream)
        documents.append(run(dataclasses.replace(config, stream=stream, out=folders[-1])))
    if len(folders) > 1 and jax.process_index() == 0:
        compare.main([*map(str, folders), "--out", str(config.out)])
    return documents


def run(config: Config) -> dict[str, Any]:
    """Runs all methods on one stream; returns what is in metrics.json."""
    run = Run(config, f"baselines_{config.stream}")
    if document := run.finished():
        return document
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    run_keys = jnp.stack([key[2] for key in keys])
    tasks = _streams(config, [key[0] for key in keys])
    net = nets.MLP(config.hidden, classes=10)
    params = [net.init(key[1], jnp.zeros((1, tasks[0].train.inputs.shape[1]))) for key in keys]
    steps: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size, "steps_per_call": 16}
    strategies = _strategies(config, net)
    layer = bottleneck.discrete_key_value_bottleneck(
        tasks[0].train.inputs.shape[1], 10, codebooks=config.codebooks, pairs=config.pairs, key_width=config.key_width
    )
    for name in config.methods:
        if name == "dkvb":
            train_bottleneck(
                run, layer, config.dkvb_learning_rate, tasks, [key[1] for key in keys], run_keys, classes=10,
                fitting=KeyFitting(config.key_epochs, config.key_batch_size), **steps,
            )  # fmt: skip
            continue
        of_method = [streams.joint(stream) for stream in tasks] if name == "joint" else tasks
        run.train(name, strategies[name], optax.adam(config.learning_rate), params, of_method, run_keys, **steps)
    return run.finish()


def _streams(config: Config, keys: Sequence[jax.Array]) -> list[Stream]:
    split = load_features(config.data, validation=config.validation, limit=config.limit)
    if config.stream == "permuted":
        return [streams.permuted(key, *split, tasks=config.permutations) for key in keys]
    make = streams.class_incremental if config.stream == "class_incremental" else streams.task_incremental
    return [make(key, *split, classes_per_task=2) for key in keys]


def _strategies(config: Config, net: nets.MLP) -> dict[Method, Strategy]:
    """Those that train the network."""
    memory: dict[str, Any] = {"memory_size": config.memory_size, "memory_batch_size": config.memory_batch_size}
    online: dict[str, Any] = {"strength": config.online_ewc_strength, "decay": config.online_ewc_decay}
    der: dict[str, Any] = {"logits_strength": config.der_logits_strength, "labels_strength": config.der_labels_strength}
    return {
        "naive": continual.naive(net.apply),
        "ewc": continual.ewc(net.apply, strength=config.ewc_strength),
        "online_ewc": continual.online_ewc(net.apply, **online),
        "si": continual.si(net.apply, strength=config.si_strength),
        "lwf": continual.lwf(net.apply, strength=config.lwf_strength),
        "er": continual.er(net.apply, **memory),
        "der_plus_plus": continual.der_plus_plus(net.apply, **memory, **der),
        "a_gem": continual.a_gem(net.apply, **memory),
        "joint": continual.naive(net.apply),
    }


if __name__ == "__main__":
    run_command(main)
