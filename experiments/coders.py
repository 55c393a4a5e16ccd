"""What coded samples are worth: how they follow the posterior, and what their indices cost beyond the KL.

A row is a coder on Gaussians of some width whose KL from N(0, 1) is so many bits, "orc:8:4:2" being ordered random
coding of eight weights with 4 bits and 2^(4 + 2) candidates; A* has as many candidates as it takes. Samples of many
blocks are compared with the posterior: the p-value of a Kolmogorov-Smirnov test of the first weight, and of the squared
distance from the mean, and how far mean and standard deviation are off, in units of the posterior. Bits are those of a
file of all blocks. ``python -m experiments.coders``
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from tqdm import tqdm

from experiments.card import Card
from experiments.common import BaseConfig, claim_folder, finished_before, parse_command, run_command
from experiments.keys import load_tree, save_tree
from experiments.rows import Outcome, file_name, finish, kept
from jaxcl import coding, gaussian, report
from jaxcl.gaussian import Gaussian
from jaxcl.typing import bad_argument, check_at_least, check_between

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("20 s", "that it runs"),
    "--preset cpu": Card(
        "4 min on one core",
        "A* spends 1.5 to 2.4 bits beyond the KL, and no test tells it from the posterior at 1 %; how the bias of mrc "
        "and orc falls with their bits",
    ),
    "--preset paper": Card(
        "more than 70 min, which --spare-bits 0 2 took on one core",
        "as cpu, with 100,000 blocks and up to 12 bits: no p-value of A* below 0.01",
    ),
}
CODERS = {"mrc": coding.mrc, "orc": coding.orc, "astar": coding.astar}
AT_ONCE = 4096  # blocks


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings of the comparison of coders; the defaults shown are those of the preset."""

    widths: tuple[int, ...] = (1, 8)
    """Weights of a block."""
    kl: tuple[float, ...] = (1, 2, 4, 8)
    """Bits of KL of a block."""
    spare_bits: tuple[int, ...] = (0, 1, 2, 4, 6)
    """By how many bits mrc and orc have more candidates."""
    samples: int = 10_000
    """Blocks that are coded."""


def preset(name: str, _: str) -> Config:
    """The settings of preset `name`."""
    shared: dict[str, Any] = {"preset": name, "out": Path("runs/coders"), "seeds": 1}
    if name == "smoke":
        return Config(**shared, widths=(2,), kl=(1, 2), spare_bits=(0, 3), samples=500)
    return Config(**shared, kl=(1, 2, 4, 8, 12), samples=100_000) if name == "paper" else Config(**shared)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; returns what is in metrics.json."""
    config = parse_command(preset, data=("gaussians",), argv=argv, description=__doc__ or "")
    check_at_least("samples", config.samples, 100)
    check_at_least("seeds", config.seeds, 1)
    for name in ("widths", "kl", "spare_bits"):
        if not getattr(config, name):
            raise bad_argument(name, "none", "pass one number or more")
    for width in config.widths:
        check_at_least("widths", width, 1)
    for spare in config.spare_bits:
        check_at_least("spare_bits", spare, 0)
    for bits in config.kl:
        check_between("kl", bits, 0.1, coding.MOST_BITS - max(config.spare_bits))
    rows = [f"astar:{width}:{bits:g}" for width in config.widths for bits in config.kl] + [
        f"{coder}:{width}:{bits:g}:{spare}"
        for coder in ("mrc", "orc") for width in config.widths for bits in config.kl for spare in config.spare_bits
    ]  # fmt: skip
    began = time.perf_counter()
    settings = claim_folder(config)
    if (document := finished_before(config.out)) is not None:
        return document
    found = {
        row: [
            kept(config.out / "rows" / f"{file_name(row)}-{seed}.json", partial(_outcome, config, row, seed))
            for seed in range(config.seeds)
        ]
        for row in rows
    }
    results = {row: of_seeds[0]["results"] for row, of_seeds in found.items()}
    return finish(config, "coders", settings, found, began, lambda: _figures(config, results))


def _outcome(config: Config, row: str, seed: int) -> Outcome:
    """Results and costs of a row with one seed."""
    coder, width, bits, *spare = row.split(":")
    q, p = _posterior(int(width), float(bits))
    most = coding.MOST_BITS if coder == "astar" else math.ceil(float(bits)) + int(spare[0])
    path = config.out / "checkpoints" / f"{file_name(row)}-{seed}.npz"
    indices, effective, done = np.zeros(config.samples, np.uint32), np.zeros(config.samples), np.zeros(2)
    if saved := load_tree(path, (indices, effective, done)):
        indices, effective, done = saved
    first, before = int(done[0]), float(done[1])  # blocks that are coded, and seconds that it took
    began = written = time.perf_counter()
    with tqdm(desc=row, initial=first, total=config.samples, unit="block", dynamic_ncols=True) as bar:
        for start in range(first, config.samples, AT_ONCE):
            blocks = np.arange(start, min(start + AT_ONCE, config.samples))
            indices[blocks], effective[blocks] = _coded(coder, most, seed, blocks, q, p)
            bar.update(len(blocks))
            if (now := time.perf_counter()) - written >= config.checkpoint_seconds:
                written = now
                save_tree(path, (indices, effective, np.array([start + len(blocks), before + now - began])))
    drawn = coding.chosen_candidates(seed, np.arange(config.samples), indices, int(width)).astype(np.float64)
    errors = (drawn - np.asarray(q.mean)) / np.asarray(q.scale)
    layout = coding.layout_of({"w": jnp.zeros((config.samples, int(width)))}, width=int(width), seed=seed)
    message = coding.Message(layout, np.ones(1, np.float32), most, indices, float(bits))
    file = config.out / "files" / f"{file_name(row)}-{seed}.jcl"
    spent = 8 * coding.save(file, message) / config.samples
    return {
        "results": {
            "p_of_first": float(stats.kstest(errors[:, 0], "norm").pvalue),
            "p_of_distance": float(stats.kstest((errors**2).sum(axis=1), stats.chi2(int(width)).cdf).pvalue),
            "mean_off": float(np.abs(errors.mean(axis=0)).mean()),
            "deviation_off": float(errors.std(axis=0).mean() - 1),
            "spent_bits": spent,
            "overhead_bits": spent - float(bits),
            "effective_sample_size": float(effective.mean()),
        },
        "costs": {"seconds": before + time.perf_counter() - began},
    }


def _posterior(width: int, bits: float) -> tuple[Gaussian, Gaussian]:
    """A posterior [1, W] with a KL of so many bits from N(0, 1), of which later weights get more, and that prior."""
    prior = Gaussian(jnp.zeros((1, width)), jnp.ones((1, width)))
    share = jnp.linspace(0, 1, width)[None]
    return gaussian.mean_kl(jnp.full((1, width), 0.6), share, jnp.full(1, bits * math.log(2)), prior), prior


def _coded(
    name: str, most: int, seed: int, blocks: np.ndarray, q: Gaussian, p: Gaussian
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and effective sample sizes of blocks that all have the same posterior.

    A* goes over undecided ones again, with four times as many candidates: a race depends on its block alone.
    """
    indices, effective = np.zeros(len(blocks), np.uint32), np.zeros(len(blocks))
    open_ones, bits = np.arange(len(blocks)), min(most, 10) if name == "astar" else most
    while len(open_ones):
        padded = np.resize(open_ones, 1 << (len(open_ones) - 1).bit_length())  # few shapes, few compilations
        many = Gaussian(*(jnp.broadcast_to(leaf, (len(padded), leaf.shape[1])) for leaf in q))
        encoded = CODERS[name](bits).encode(jax.random.key(seed), seed, blocks[padded], many, p)
        indices[padded], effective[padded] = encoded.indices, encoded.effective_sample_size
        if bits == most:
            break
        open_ones, bits = padded[: len(open_ones)][~np.asarray(encoded.decided)[: len(open_ones)]], min(bits + 2, most)
    return indices, effective


def _figures(config: Config, results: Mapping[str, Mapping[str, float]]) -> "dict[str, Figure]":
    def over_kl(metric: str, width: int) -> dict[str, np.ndarray]:
        names = {"astar": ""} | {
            f"{coder}, {spare} spare": f":{spare}" for coder in ("mrc", "orc") for spare in config.spare_bits
        }
        return {
            name: np.array([config.kl, [
                results[f"{name.partition(',')[0]}:{width}:{bits:g}{spare}"][metric] for bits in config.kl
            ]])
            for name, spare in names.items()
        }  # fmt: skip

    def over_spare(coder: str, width: int) -> dict[str, np.ndarray]:
        return {
            f"KL of {bits:g} bits": np.array([config.spare_bits, [
                100 * abs(results[f"{coder}:{width}:{bits:g}:{spare}"]["deviation_off"]) for spare in config.spare_bits
            ]])
            for bits in config.kl
        }  # fmt: skip

    return {
        f"Bits spent beyond the KL, {width} weights a block": report.line_plot(
            over_kl("overhead_bits", width), "bits of KL", "bits"
        )
        for width in config.widths
    } | {
        f"How far the samples' standard deviation is off, {coder}, {width} weights a block": report.line_plot(
            over_spare(coder, width), "bits beyond the KL", "%"
        )
        for coder in ("mrc", "orc") for width in config.widths
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
