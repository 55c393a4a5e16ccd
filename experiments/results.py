"""The README's table of results beside the papers' figures, from runs that are kept in `experiments/published`.

A run is kept as its metrics.json, under a name that CLAIMS below goes by; the table is then written anew between the
README's two marks. A test says that both agree, and that each run's settings are those of the command beside it.

python -m experiments.results --keep mean_kl=runs/miracle_mnist
"""

import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from experiments.card import Card
from experiments.common import different_settings, parse_command, plain_settings, run_command
from jaxcl import files, report
from jaxcl.typing import bad_argument

CARDS = {"": Card("seconds", "the README's table of results, written anew")}
PUBLISHED = Path(__file__).parent / "published"
MARKS = ("<!-- results: begin -->\n", "<!-- results: end -->\n")


class Claim(NamedTuple):
    """A figure of a paper, and where ours is."""

    system: str
    what: str  # is measured, and in which setting
    paper: str  # its figure, and its setting where that differs
    run: str  # in `PUBLISHED`
    command: str  # that makes the run
    method: str
    metric: str
    note: str = ""  # where ours falls short: why
    part: str = "results"  # of metrics.json

    def shown(self) -> list[str]:
        """The row's cells."""
        document = read_run(self.run)
        of_method = document[self.part][self.method]
        device, of_jax = document["environment"]["devices"][0], document["environment"]["jax"]
        # Of all methods and seeds: the document's own are of the last command alone, if others broke off before.
        minutes = sum(sum(costs["seconds"]["values"]) for costs in document["costs"].values()) / 60
        return [
            self.system, self.what, self.paper, _percent(of_method[self.metric]) + self.note,
            str(len(of_method[self.metric]["values"])),
            f"{device}, JAX {of_jax}", f"{minutes:.0f}", f"`python -m {self.command}`",
        ]  # fmt: skip


_DKVB = "experiments.dkvb --data cifar10"
_IBM = "experiments.ibm --data mnist"
_SIMVQ = "experiments.simvq_image --data cifar10 --rows vq:65536 simvq:65536"
_MEAN_KL = "experiments.miracle --data mnist"
_OA_INPUTS = "experiments.oa_adapter --data short --methods oa_inputs"
_OA_RIVALS = "experiments.oa_adapter --data short --oa-drift-strength 0 --no-oa-at-queries --oa-inputs-rank 16"
CLAIMS = (
    Claim(
        "DKVB", "accuracy % on CIFAR-10, two new classes a task, features of EfficientNet-Lite0",
        "far above a linear probe's, no task told (other encoders)", "dkvb_cifar10", _DKVB, "dkvb", "acc",
    ),
    Claim("linear probe", "the same", "", "dkvb_cifar10", _DKVB, "linear_probe", "acc"),
    Claim("linear probe", "the same, all classes at once", "", "dkvb_cifar10", _DKVB, "joint_linear_probe", "acc"),
    Claim(
        "IBM", "accuracy % on 20 permuted MNIST tasks, an MLP", "not below WSN at its best (other data)", "ibm_mnist",
        _IBM, "ibm", "acc",
    ),
    Claim(
        "IBM", "weights that one of these tasks keeps, %", "30 % of WSN's at most", "ibm_mnist", _IBM, "ibm",
        "kept_by_a_task", part="masks",
    ),
    Claim("WSN", "its accuracy % in that run", "below IBM's", "ibm_mnist", _IBM, "wsn", "acc"),
    Claim(
        "WSN", "weights that a task keeps, %, the best on validation", "", "ibm_mnist", _IBM, "wsn", "kept_by_a_task",
        part="masks",
    ),
    Claim(
        "SimVQ", "codes in use, %, of 65,536, a tokenizer of CIFAR-10", "100.0 (ImageNet, far longer)", "simvq_65536",
        _SIMVQ, "simvq:65536", "utilisation",
    ),
    Claim("VQ", "the same", "1.4 (VQGAN)", "simvq_65536", _SIMVQ, "vq:65536", "utilisation"),
    Claim(
        "MIRACLE with Mean-KL", "test error % of LeNet-5 on MNIST in 1.6 kB at most", "0.96 at 1.5 kB (MIRACLE)",
        "mean_kl", _MEAN_KL, "mean_kl:1600", "error", " (24 epochs; after 96, one seed, 0.91 in 1.48 kB)",
    ),
    Claim("Mean-Var", "the same", "", "mean_kl", _MEAN_KL, "mean_var:1600", "error"),
    Claim(
        "MIRACLE with Mean-KL", "the same in 3.1 kB at most", "0.69 at 3.0 kB (MIRACLE)", "mean_kl", _MEAN_KL,
        "mean_kl:3100", "error", " (as above; 0.81 in 2.80 kB)",
    ),
    Claim(
        "OA-Adapter", "accuracy % over four tasks of texts in turn, MiniLM, no task told, by class means",
        "above O-LoRA's (other network and data)", "oa_short_inputs", _OA_INPUTS, "oa_inputs", "means_task_free",
        " (kept off inputs and trained against earlier means; as published it is not: [why](docs/results.md#adapters))",
        "adapters",
    ),
    Claim(
        "OA-Adapter", "the same, by a discriminant analysis of the features", "", "oa_short_inputs", _OA_INPUTS,
        "oa_inputs", "discriminant_task_free", part="adapters",
    ),
    *(
        Claim(system, f"the same, by {by}", paper, "oa_short", _OA_RIVALS, method, metric, part="adapters")
        for system, paper, method in (
            ("OA-Adapter, off outputs", "above O-LoRA's", "oa_outputs"), ("O-LoRA", "", "o_lora"),
            ("frozen features", "", "frozen"),
        )
        for by, metric in (("class means", "means_task_free"), ("a discriminant", "discriminant_task_free"))
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do."""

    keep: tuple[str, ...] = ()
    """NAME=FOLDER of finished runs, to be kept as published/NAME.json."""
    readme: Path = Path("README.md")
    """The file with the marks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Keeps runs, and writes the table."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    for pair in config.keep:
        name, equals, folder = pair.partition("=")
        if not equals or name not in {claim.run for claim in CLAIMS}:
            known = sorted({claim.run for claim in CLAIMS})
            raise bad_argument("keep", pair, f"write it as NAME=FOLDER, with a NAME of {known}")
        keep_run(name, Path(folder))
    files.write_atomic(config.readme, with_table(config.readme.read_text()))
    print(f"Wrote the table of {len(CLAIMS)} rows into {config.readme}.")


def keep_run(name: str, folder: Path) -> None:
    """Keeps what a finished run in `folder` came to.

    Raises:
        ValueError: it is not finished, or another command's.
    """
    path = folder / "metrics.json"
    if not path.exists():
        raise bad_argument("keep", f"{name}={folder} without metrics.json", "let the run finish, which writes it")
    document = report.read_json(path)
    (command,) = {claim.command for claim in CLAIMS if claim.run == name}
    if "config" not in document or (other := different_settings(document["config"], settings_of(command))):
        differences = ", ".join(other) if "config" in document else "no config"
        raise bad_argument(
            "keep", f"{name}={folder}, with other {differences}", f"keep what python -m {command} leaves"
        )
    document["config"]["out"] = f"runs/{name}"  # wherever it was
    report.write_json(PUBLISHED / f"{name}.json", document)


def read_run(name: str) -> dict[str, Any]:
    """What the run came to that is kept under a name."""
    document: dict[str, Any] = report.read_json(PUBLISHED / f"{name}.json")
    return document


def with_table(text: str) -> str:
    """The text with the table between its marks.

    Raises:
        ValueError: it has not both marks, once each.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise bad_argument("readme", "one without the marks", f"put {begin.strip()} and {end.strip()} into it")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    headings = ["system", "what", "paper", "ours", "seeds", "device", "minutes", "command"]
    rows = [headings, ["---"] * len(headings), *(claim.shown() for claim in CLAIMS)]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"{before}{begin}\n{lines}\n{end}{after}"


def settings_of(command: str) -> dict[str, Any]:
    """The settings that a command of an experiment asks for, as plain data."""
    name, *arguments = shlex.split(command)
    module = importlib.import_module(name)
    data = arguments[arguments.index("--data") + 1] if "--data" in arguments else module.preset("cpu", "digits").data
    return plain_settings(parse_command(module.preset, data=(data,), argv=arguments, description=""))


def _percent(metric: dict[str, Any]) -> str:
    mean, half = metric["mean"], metric["ci95"]
    return f"{100 * mean:.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")


if __name__ == "__main__":
    run_command(main)
