"""Class-incremental handwritten digits: five tasks of two new classes, four methods, five seeds, about a minute.

Sequential fine-tuning forgets all but the last task. The discrete key-value bottleneck keeps them, with no task
boundaries, no replay and no task identity at test time. Digits ship with scikit-learn: nothing is downloaded.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import class_incremental, dkvb
from experiments.card import Card
from experiments.class_incremental import Config
from experiments.common import parse_command
from experiments.sweep import run_grid

CARDS = {
    "--preset smoke": Card("15 s", "that it runs: accuracies after two epochs say nothing"),
    "--preset cpu": Card(
        "19 s", "ACC %: DKVB 96.9 ± 0.6, naive 19.9 ± 0.3, linear probe 21.2 ± 3.4, joint training 97.2 ± 0.4"
    ),
    "--preset paper": Card("not measured", "nothing is published for digits"),
}


def preset(name: str, data: str) -> Config:
    """The presets of `experiments.dkvb` on digits, with a folder of its own."""
    return dataclasses.replace(dkvb.preset(name, data), out=Path("runs/quickstart"))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns what is in metrics.json."""
    config = parse_command(preset, data=("digits",), argv=argv, description=__doc__ or "")
    return run_grid(config, partial(class_incremental.run, experiment="quickstart"))[-1]


if __name__ == "__main__":
    main()
