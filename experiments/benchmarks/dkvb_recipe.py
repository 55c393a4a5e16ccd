"""The published recipe of the key-value bottleneck whole, beside steps of the authors' rule in PyTorch.

Runs ``experiments.dkvb --preset paper --data cifar10``, the bottleneck alone, with one seed: 2,000 epochs on each of
five tasks. Then it times some steps of the dense rule at the same size (see experiments.benchmarks.dkvb_step), and says
how long that would need for as many. ``python -m experiments.benchmarks.dkvb_recipe``
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import dkvb
from experiments.benchmarks.dkvb_step import dense_rule
from experiments.card import Card
from jaxcl import report

CARDS = {"": Card("16 min after features", "923 times as fast as the authors' rule in PyTorch: 15 minutes for 10 days")}
TASKS, EXAMPLES_A_TASK = 5, 10_000  # of CIFAR-10
TIMED = 11  # steps of the dense rule


def main(argv: Sequence[str] | None = None) -> float:
    """Prints a table; returns the ratio of the seconds."""
    usual = dkvb.preset("paper", "cifar10")
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.dkvb_recipe", description=__doc__)
    parser.add_argument("--out", default="runs/dkvb_recipe", help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--features", type=Path, default=usual.features, help="folder of features (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    run = ["--preset", "paper", "--data", "cifar10", "--methods", "dkvb", "--seeds", "1"]
    document = dkvb.main([*run, "--out", options.out, "--features", str(options.features)])
    ours = document["costs"]["dkvb"]["seconds"]["mean"]
    steps = TASKS * usual.epochs * -(-EXAMPLES_A_TASK // usual.batch_size)
    step, seconds = dense_rule("full"), []
    step()
    for _ in range(TIMED):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    theirs = steps * statistics.median(seconds)
    print(report.text_table([
        ["", "a step", f"{steps:,} steps"],
        ["jaxcl, key fitting and look-up included", f"{1e3 * ours / steps:.2f} ms", f"{ours / 60:.1f} min"],
        ["the authors' rule in PyTorch", f"{1e3 * theirs / steps:,.0f} ms", f"{theirs / 86400:.1f} days"],
    ]))  # fmt: skip
    print(f"ratio {theirs / ours:,.0f}")
    return theirs / ours


if __name__ == "__main__":
    main()
