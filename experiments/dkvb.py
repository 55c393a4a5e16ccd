"""The discrete key-value bottleneck (Träuble et al., ICML 2023) on class-incremental images and texts.

Tasks of two new classes (texts: of one), beside naive sequential training, a linear probe, and joint training as the
ceiling. Digits and MNIST are learned on raw pixels; CIFAR-10 on the features of EfficientNet-Lite0, agnews and dbpedia
on those of MiniLM, both frozen, with closed-form classifiers of the same features besides.

Presets: cpu takes half a minute on digits and three on MNIST (two cores); its settings were chosen on a validation
split cut from train. paper has the published sizes and schedule (256 codebooks, 4,096 pairs, key width 14, learning
rate 0.3, batches of 256, 2,000 epochs a task), published for CIFAR-10 with a frozen encoder, and trains in the dual.
A grid, as of the paper's ablations: --sweep codebooks=64,128,256 pairs=1024,4096
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from experiments import class_incremental
from experiments.card import Card
from experiments.class_incremental import Config, Method
from experiments.common import parse_command, run_command
from experiments.features import TEXTS, DataName
from experiments.sweep import run_grid

CARDS = {
    "--preset smoke": Card("15 s", "that it runs: accuracies after two epochs say nothing"),
    "--preset cpu": Card(
        "19 s",
        "digits, ACC %: DKVB 96.9 ± 0.0, naive 19.9 ± 0.3, linear probe 21.2 ± 3.4, joint training 97.2 ± 0.4",
    ),
    "--preset cpu --data mnist": Card(
        "3 min", "ACC %: DKVB 96.4 ± 0.1, naive 19.8 ± 0.2, linear probe 22.0 ± 3.4, joint training 97.9 ± 0.1"
    ),
    "--preset paper --data mnist": Card("hours, not measured", "published for CIFAR-10 with a frozen encoder only"),
}

DATA = get_args(DataName)
ENCODERS = {"cifar10": "efficientnet_lite0", "agnews": "minilm", "dbpedia": "minilm"}


def preset(name: str, data: str) -> Config:
    """The settings of preset `name` for a data set."""
    shared: dict[str, Any] = {"preset": name, "data": data, "out": Path("runs/dkvb")}
    if data in ENCODERS:
        shared |= {"encoder": ENCODERS[data], "methods": get_args(Method), "value_width": 16}
    if name == "smoke":
        return Config(
            **shared, seeds=2, limit=600, codebooks=8, pairs=32, key_epochs=1, epochs=2, baseline_epochs=2,
            learning_rate=3.0,
        )  # fmt: skip
    if name == "paper":
        return Config(
            **shared, codebooks=256, pairs=4096, key_width=14, key_epochs=10, key_batch_size=256, learning_rate=0.3,
            epochs=2000, dual=True, baseline_epochs=2000, batch_size=256,
        )  # fmt: skip
    if data == "mnist":
        return Config(
            **shared, codebooks=32, pairs=4096, key_width=112, key_epochs=1, key_batch_size=1024, learning_rate=3.0,
            epochs=5, hidden=(256, 256), baseline_epochs=5, batch_size=256,
        )  # fmt: skip
    if data == "cifar10":
        return Config(
            **shared, codebooks=128, pairs=4096, key_width=28, projection="learned", key_epochs=2, key_batch_size=1024,
            learning_rate=3.0, epochs=10, hidden=(256,), baseline_learning_rate=3e-4, baseline_epochs=30,
            batch_size=256,
        )  # fmt: skip
    if data in TEXTS:
        return Config(
            **shared, classes_per_task=1, codebooks=256, pairs=256, key_width=28, projection="learned",
            projection_share=0.8, learning_rate=3.0, epochs=30, baseline_epochs=100,
        )  # fmt: skip
    return Config(**shared, codebooks=64, pairs=256, key_width=8, learning_rate=3.0, epochs=30, baseline_epochs=100)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, or its last point in a sweep; returns what is in metrics.json."""
    config = parse_command(preset, data=DATA, argv=argv, description=__doc__ or "")
    return run_grid(config, partial(class_incremental.run, experiment="dkvb"))[-1]


if __name__ == "__main__":
    run_command(main)
