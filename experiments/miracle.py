"""A network in a kilobyte or two: MIRACLE with Mean-KL, beside Mean-Var at the same budgets.

A row of the table is a parameterization of the posterior and its budget, "mean_kl:1500" with a file of 1,500 bytes at
most. All blocks have the same bits, so that the budget decides how many values share one. Each row is trained for some
epochs, then coded block by block while what is left goes on training, written to a file, and read again: error and
bytes are those of the file, header included. The error of the posterior's mean, and of a draw from it, are those before
anything was coded.

python -m experiments.miracle --data mnist
python -m jaxcl.coding inspect runs/miracle_mnist/files/mean_kl-1600-0.jcl
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.card import Card
from experiments.coders import CODERS
from experiments.common import BaseConfig, claim_folder, finished_before, parse_command, run_command
from experiments.images import crop_and_flip, load_images, normalised, read_images
from experiments.rows import Outcome, file_name, finish, kept
from jaxcl import coding, data, gaussian, nets, report
from jaxcl.coding import Layout, Posterior, Progress, Told, TrainState
from jaxcl.continual import Examples, sharding
from jaxcl.continual.checkpoints import Checkpoint, Checkpoints
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least, check_between, check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("30 s", "that it runs"),
    "--preset cpu": Card(
        "24 min on one core", "digits, test error: 17.7 % with 200 bytes, 8.4 with 300, 4.4 with 400, 3.2 with 600"
    ),
    "--preset cpu --data mnist": Card(
        "35 to 55 min a row on one core",
        "test error: 3.2 % with 700 bytes, 2.1 with 1,000, 1.2 with 1,600, 1.1 with 2,200, 0.9 with 3,100",
    ),
    "--preset cpu --data mnist --rows mean_kl:1600 mean_kl:3100 --epochs 32 --coding-epochs 64 --seeds 1": Card(
        "about 2 h on one core",
        "test error: 0.91 % in 1,484 bytes, 0.81 in 2,798, where MIRACLE has 0.96 at 1.5 kB and 0.69 at 3.0",
    ),
    "--preset cpu --data cifar10": Card("51 min on one core", "test error of a narrow VGG-16 in 53 kB: 33.7 %"),
    "--preset paper --data mnist": Card(
        "not measured; it takes an accelerator", "MIRACLE's curve: 0.96 % at 1.5 kB, 0.69 % at 3.0 kB"
    ),
}
POSTERIORS = {"mean_kl": coding.mean_kl_posterior, "mean_var": coding.mean_var_posterior}
NEAR = 1.1  # times its last value: where a loss counts as come down
PRUNED = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90)  # percent
TESTED_AT_ONCE = 2000


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings of the compression experiment; the defaults shown are those of the preset."""

    data: str = "digits"
    """digits (of scikit-learn), or mnist or cifar10 (in the folder that JAXCL_DATA names)."""
    network: Literal["mlp", "lenet5", "vgg16"] = "mlp"
    """What is compressed: lenet5 goes with mnist, vgg16 with cifar10, an mlp with all."""
    hidden: tuple[int, ...] = (100, 50)
    """Widths of the hidden layers of an mlp."""
    vgg_width: int = 64
    """vgg16: channels of its first stage; the published network has 64."""
    augment: bool = False
    """Crop training images at random, after padding by 4 pixels, and mirror half of them."""
    rows: tuple[str, ...] = ("mean_kl:200", "mean_kl:300", "mean_kl:400", "mean_kl:600", "mean_var:300", "mean_var:400")
    """The table: parameterization:bytes of the file at most, give or take a few, the former mean_kl or mean_var."""
    bits: float = 16
    """KL of a block."""
    values: tuple[str, ...] = ("params/Dense_0/kernel=3000", "params/Dense_1/kernel=2500")
    """PATH=NUMBER, as params/Dense_0/kernel=8000: how many values a leaf keeps that its weights share by hashing."""
    coder: Literal["mrc", "orc", "astar"] = "orc"
    """Minimal random coding (MIRACLE's), ordered random coding, or A* coding."""
    spare_bits: int = 1
    """Candidates are 2 to the power of the KL and so many bits."""
    epochs: int = 100
    """Passes over the training set before anything is coded."""
    coding_epochs: int = 100
    """Passes while blocks are coded."""
    rounds: int = 200
    """In how many parts the blocks are coded, at most."""
    batch_size: int = 64
    """Examples in a step."""
    learning_rate: float = 3e-2
    """Of Adam, at most: it rises over the first steps and falls to a hundredth along a cosine."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    first_budget: float = 1.0
    """Mean-KL: how many times its KL a block has at first; over the epochs before coding that falls to once."""
    penalty: float = 1e-5
    """Mean-Var: what a nat of each block counts in the loss at first."""
    penalty_rate: float = 2e-3
    """Mean-Var: by what share of itself that changes in a step."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""


def preset(name: str, data: str) -> Config:
    """The settings of preset `name` for a data set."""
    shared: dict[str, Any] = {"preset": name, "data": data, "out": Path("runs/miracle"), "seeds": 3}
    if name == "smoke":
        return Config(
            **shared | {"seeds": 1}, limit=300, hidden=(16,), values=("params/Dense_0/kernel=300",),
            rows=("mean_kl:150", "mean_var:150"), bits=6, epochs=3, coding_epochs=2, rounds=3,
        )  # fmt: skip
    long = {"epochs": 500, "coding_epochs": 500, "rounds": 1000} if name == "paper" else {}
    if data == "digits":
        return Config(**shared | long)
    if data == "cifar10":
        return _of_cifar(name, shared)
    of_cpu = {"epochs": 8, "coding_epochs": 16, "rounds": 100}
    rows = ("mean_kl:700", "mean_kl:1000", "mean_kl:1600", "mean_kl:2200", "mean_kl:3100", "mean_var:1600")
    return Config(
        **shared | of_cpu | long, network="lenet5", rows=rows,
        values=("params/Conv_1/kernel=8000", "params/Dense_0/kernel=8000"), batch_size=128,
    )  # fmt: skip


def _of_cifar(name: str, shared: Mapping[str, Any]) -> Config:
    """VGG-16, in full or with a quarter of the channels; late layers' weights share a fifth as many values."""
    small: dict[str, Any] = {
        "vgg_width": 16, "rows": ("mean_kl:60000",), "epochs": 6, "coding_epochs": 8, "seeds": 1, "bits": 12,
        "first_budget": 8.0,
    }  # fmt: skip
    full: dict[str, Any] = {  # it begins with about as many bits a value as the narrow one; not measured
        "rows": ("mean_kl:200000", "mean_kl:420000"), "epochs": 150, "coding_epochs": 150, "first_budget": 32.0,
    }  # fmt: skip
    sizes = small if name == "cpu" else full
    channels = sizes.get("vgg_width", 64) * 8
    first, other = (9 * inputs * channels // 5 for inputs in (channels // 2, channels))
    values = (f"params/Conv_7/kernel={first}", *(f"params/Conv_{layer}/kernel={other}" for layer in range(8, 13)))
    return Config(
        **{**shared, **sizes}, network="vgg16", augment=True, values=values, batch_size=128, learning_rate=1e-2,
        rounds=100,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns what is in metrics.json."""
    config = parse_command(preset, data=("digits", "mnist", "cifar10"), argv=argv, description=__doc__ or "")
    check_at_least("seeds", config.seeds, 1)
    check_at_least("rounds", config.rounds, 1)
    check_at_least("epochs", config.epochs, 1)
    check_at_least("coding_epochs", config.coding_epochs, 0)
    check_at_least("batch_size", config.batch_size, 1)
    check_at_least("spare_bits", config.spare_bits, 0)
    check_at_least("first_budget", config.first_budget, 1)
    check_at_least("penalty", config.penalty, 1e-30)
    check_between("bits", config.bits, 0.1, coding.MOST_BITS - config.spare_bits)
    if (data_of := {"lenet5": "mnist", "vgg16": "cifar10"}.get(config.network, config.data)) != config.data:
        raise bad_argument(
            "network", f"{config.network} with {config.data}", f"pass --data {data_of}, or --network mlp"
        )
    if not config.rows:
        raise bad_argument("rows", "none", "write one or more, as mean_kl:1500")
    for row in config.rows:
        _parsed(row)  # so that a misspelt one is told before any work
    began = time.perf_counter()
    task = _task(config)
    check_between("batch_size", config.batch_size, 1, len(task.train.labels))
    shapes = jax.eval_shape(task.network.init, jax.random.key(0), task.prepare(jnp.asarray(task.train.inputs[:1])))
    for row in config.rows:
        _layout(config, shapes, row, 0)  # so that too small a budget is told before the folder is taken
    settings = claim_folder(config)
    if (document := finished_before(config.out)) is not None:
        return document
    seeds = range(config.seeds)
    found = {row: [_Compression(config, task, row, seed).outcome() for seed in seeds] for row in config.rows}
    histories = {row: of_seeds[0]["history"] for row, of_seeds in found.items()}
    return finish(config, "miracle", settings, found, began, lambda: _figures(found), histories)


class Images(NamedTuple):
    """Images and their classes, in memory."""

    inputs: np.ndarray  # [N, H, W] or [N, H, W, channels]
    labels: np.ndarray  # [N]


class Task(NamedTuple):
    """A network and what it learns."""

    network: Any  # a Linen module
    prepare: Callable[[Array], Array]  # images to what the network takes, [B, H, W, channels]
    train: Images
    test: Images


def _task(config: Config) -> Task:
    split = load_images(config.data, validation=config.validation, limit=config.limit)
    train, test = (
        Images(np.asarray(read_images(part, f"{name} images").inputs), np.asarray(part.labels))
        for part, name in zip(split, ("training", "test"), strict=True)
    )
    prepare = partial(normalised, data.channel_statistics(Examples(*train)))
    classes = int(train.labels.max()) + 1
    networks: dict[str, Callable[[], Any]] = {
        "mlp": lambda: nets.MLP(config.hidden, classes),
        "lenet5": lambda: nets.LeNet5(classes),
        "vgg16": lambda: nets.VGG16(classes, config.vgg_width),
    }
    return Task(networks[config.network](), prepare, train, test)


def _parsed(row: str) -> tuple[str, int]:
    """Parameterization and bytes of a row."""
    name, _, size = row.partition(":")
    check_choice("rows", name, POSTERIORS)
    if not size.isdecimal():
        raise bad_argument("rows", row, "write it as mean_kl:1500")
    return name, int(size)


def _values(config: Config) -> dict[str, int]:
    found = dict(part.rpartition("=")[::2] for part in config.values)
    for path, number in found.items():
        if not path or not number.isdecimal():
            raise bad_argument("values", f"{path}={number}", "write it as params/Dense_0/kernel=8000")
    return {path: int(number) for path, number in found.items()}


def _index_bits(config: Config) -> int:
    """Of a block's index."""
    return math.ceil(config.bits + config.spare_bits)


def _layout(config: Config, params: PyTree, row: str, seed: int) -> Layout:
    """As many blocks as go into the bytes of a row; its width, not known yet, may make the header a few longer."""
    single = coding.layout_of(params, width=1, seed=seed, values=_values(config))
    size, header = _parsed(row)[1], coding.header_bytes(single, _index_bits(config))
    blocks = 8 * (size - header) // _index_bits(config)
    if blocks < 1:
        raise bad_argument("rows", row, f"this network's file has {header} bytes beside its indices: allow more")
    return single._replace(width=-(-single.blocks // blocks))


class _Compression:
    """One row with one seed."""

    def __init__(self, config: Config, task: Task, row: str, seed: int) -> None:
        self._config, self._task, self._row, self._seed = config, task, row, seed
        self._name = f"{file_name(row)}-{seed}"  # of its files
        self._init_key, self._step_key, self._coder_key, self._draw_key = jax.random.split(jax.random.key(seed), 4)
        self._params = task.network.init(self._init_key, task.prepare(jnp.asarray(task.train.inputs[:1])))
        self._coder = CODERS[config.coder](_index_bits(config))
        self._layout: Layout = _layout(config, self._params, row, seed)
        self._posterior: Posterior = POSTERIORS[_parsed(row)[0]](self._layout, config.bits)
        self._an_epoch = len(task.train.labels) // config.batch_size
        first, self._steps = config.epochs * self._an_epoch, (config.epochs + config.coding_epochs) * self._an_epoch
        rate = optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            min(config.warmup_steps, self._steps - 1),
            self._steps,
            config.learning_rate / 100,
        )
        self._trainer = coding.trainer(
            self._layout, self._posterior, optax.adam(rate, b2=0.99), self._loss, penalty=config.penalty,
            penalty_rate=config.penalty_rate,
            budget_schedule=optax.exponential_decay(config.first_budget, first, 1 / config.first_budget, end_value=1.0),
        )  # fmt: skip
        self._step = jax.jit(self._trained, donate_argnums=1)
        self._logits = jax.jit(lambda params, images: task.network.apply(params, task.prepare(images)))
        self._of_part = -(-self._layout.blocks // config.rounds)
        parts, left = -(-self._layout.blocks // self._of_part), self._steps - first
        # Part i is coded before step `due[i]`: the first after the epochs of training, the last in the end.
        self._due = [first + left * part // max(parts - 1, 1) for part in range(parts)]

    def outcome(self) -> Outcome:
        """Results, costs, history and what the report draws, as kept in the folder; worked out if not there yet."""
        return kept(self._config.out / "rows" / f"{self._name}.json", self._work)

    def _work(self) -> Outcome:
        written = self._config.out / "files" / f"{self._name}.jcl"
        state, progress, record = self._train()
        size = coding.save(written, coding.message(self._coder, self._layout, state.variables, progress))
        decoded = coding.decode(coding.load(written))
        trained = coding.tree_of_values(coding.places(self._layout).of_weights, progress.values)
        answers = self._answers(decoded)
        if not np.array_equal(answers, self._answers(trained)):
            raise RuntimeError(f"{written} does not answer as the network that was coded")
        losses = [entry["loss"] for entry in record["history"]]
        return {
            "results": {
                "error": self._error(answers), "bytes": size, **record["before"],
                "kl_bits": float(progress.kl.mean()), "spent_bits": 8 * size / self._layout.blocks,
                "effective_sample_size": record["effective"] / self._layout.blocks,
                "epochs_to_loss": next(
                    epoch for epoch, loss in enumerate(losses, 1) if loss <= NEAR * record["settled"]
                ),
            },
            "costs": {"seconds": record["seconds"]},
            "history": record["history"],
            "pruned": [self._error(self._answers(_pruned(decoded, share / 100))) for share in PRUNED],
            "information": record["information"],
            "spread": record["spread"],
        }  # fmt: skip

    def _train(self) -> tuple[TrainState, Progress, dict[str, Any]]:
        """What training came to: the state, all blocks coded, and what was recorded on the way."""
        config, train = self._config, self._task.train
        title = f"{self._row}, seed {self._seed}"
        keeper = Checkpoints(
            Checkpoint(config.out / "checkpoints", config.checkpoint_seconds), self._name,
            {"row": self._row, "seed": self._seed}, alone=True,
        )  # fmt: skip
        with closing(keeper), tqdm(desc=title, total=self._steps, unit="step", dynamic_ncols=True) as bar:
            state, progress, record = self._start(keeper)
            bar.update(record["step"])
            began, order_of = time.perf_counter() - record["seconds"], -1
            for now in range(record["step"], self._steps + 1):
                while (part := -(-int(progress.coded) // self._of_part)) < len(self._due) and self._due[part] <= now:
                    state, progress = self._code(part, state, progress, record)
                if now == self._steps:
                    break
                epoch, place = divmod(now, self._an_epoch)
                if epoch != order_of:  # which the seed and the epoch alone decide
                    order = np.random.default_rng((self._seed, epoch)).permutation(len(train.labels))
                    order_of = epoch
                rows = order[place * config.batch_size : (place + 1) * config.batch_size]
                batch = train.inputs[rows], train.labels[rows]
                state, told = self._step(jax.random.fold_in(self._step_key, now), state, progress, batch)
                self._record(now, told, record, bar, progress)
                if keeper.due() or now + 1 == self._steps:
                    jax.block_until_ready(state)
                    record["seconds"] = time.perf_counter() - began
                    keeper.save((state, progress), record)
        record["seconds"] = time.perf_counter() - began
        return state, progress, record

    def _start(self, keeper: Checkpoints) -> tuple[TrainState, Progress, dict[str, Any]]:
        key = jax.random.fold_in(self._init_key, 1)
        abstract = jax.eval_shape(
            lambda key, params: (self._trainer.init(key, params), coding.nothing_coded(self._layout)), key, self._params
        )
        if (restored := keeper.restore(abstract, sharding.Layout(None))) is not None:
            (state, progress), record = restored
            return state, progress, record
        record = {"step": 0, "seconds": 0.0, "history": [], "losses": 0.0, "effective": 0.0}
        return self._trainer.init(key, self._params), coding.nothing_coded(self._layout), record

    def _record(self, now: int, told: Told, record: dict[str, Any], bar: "tqdm[Any]", progress: Progress) -> None:
        record["step"] = now + 1
        record["losses"] += float(told.loss)
        if not math.isfinite(record["losses"]):
            raise FloatingPointError(f"loss: got {float(told.loss)} in step {now + 1}; lower --learning-rate")
        bar.update()
        if (now + 1) % self._an_epoch == 0:
            loss, record["losses"] = record["losses"] / self._an_epoch, 0.0
            record["history"].append({"step": now + 1, "loss": loss, "kl_bits": float(told.kl)})
            shown = {"loss": f"{loss:.4f}", "KL": f"{float(told.kl):.2f} bits", "coded": int(progress.coded)}
            bar.set_postfix(shown, refresh=False)

    def _code(
        self, part: int, state: TrainState, progress: Progress, record: dict[str, Any]
    ) -> tuple[TrainState, Progress]:  # fmt: skip
        """Codes the next part; before the first, what the posterior is like is recorded."""
        if part == 0:
            state = state._replace(variables=coding.with_storable_priors(state.variables))
            record |= self._look(state)
            record["settled"] = record["history"][-1]["loss"]
        progress, encoded = coding.encode_next(
            jax.random.fold_in(self._coder_key, part), self._coder, self._layout, self._posterior, state.variables,
            progress, self._of_part,
        )  # fmt: skip
        left = min(self._of_part, self._layout.blocks - part * self._of_part)
        record["effective"] += float(encoded.effective_sample_size[:left].sum())
        return state, progress

    def _look(self, state: TrainState) -> dict[str, Any]:
        q, p = self._posterior.gaussians(state.variables)
        of_weights, leaf = coding.places(self._layout).of_weights, coding.places(self._layout).leaf
        draw = gaussian.sample(self._draw_key, q)
        errors = {
            name: self._error(self._answers(coding.tree_of_values(of_weights, values)))
            for name, values in (("error_of_mean", q.mean), ("error_of_draw", draw))
        }
        nats = np.asarray(gaussian.kl(q, p))
        return {
            "before": errors,
            "information": {
                own.path: float(nats[leaf == number].sum() / math.log(2) / 8)
                for number, own in enumerate(self._layout.leaves)
            },
            "spread": {
                "mean over the prior's scale": _histogram(np.asarray(q.mean / p.scale), -2.5, 2.5),
                "scale over the prior's": _histogram(np.asarray(q.scale / p.scale), 0, 1.25),
            },
        }

    def _trained(
        self, key: Key, state: TrainState, progress: Progress, batch: tuple[Array, Array]
    ) -> tuple[TrainState, Told]:  # fmt: skip
        images, labels = batch
        if self._config.augment:
            key, augment_key = jax.random.split(key)
            images = crop_and_flip(augment_key, images)
        return self._trainer.step(key, state, progress, (self._task.prepare(images), labels))

    def _loss(self, params: PyTree, batch: tuple[Array, Array]) -> Array:
        inputs, labels = batch
        logits = self._task.network.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _answers(self, params: PyTree) -> np.ndarray:
        """Classes of all test images."""
        inputs = self._task.test.inputs
        return np.concatenate([
            np.asarray(self._logits(params, inputs[start : start + TESTED_AT_ONCE]).argmax(axis=1))
            for start in range(0, len(inputs), TESTED_AT_ONCE)
        ])  # fmt: skip

    def _error(self, answers: np.ndarray) -> float:
        return float(np.mean(answers != self._task.test.labels))


def _pruned(params: PyTree, share: float) -> PyTree:
    """Parameters whose smallest weights, so large a share of all, are 0."""
    sizes = np.sort(np.abs(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])))
    threshold = sizes[int(share * (len(sizes) - 1))]
    return jax.tree.map(lambda leaf: np.where(np.abs(leaf) < threshold, 0, leaf), params)


def _histogram(values: np.ndarray, low: float, high: float) -> list[list[float]]:
    counts, edges = np.histogram(np.clip(values, low, high), 50, (low, high))
    return [((edges[1:] + edges[:-1]) / 2).tolist(), (100 * counts / values.size).tolist()]


def _figures(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> "dict[str, Figure]":
    """Plots for the report, of what rows came to."""
    first = {row: of_seeds[0] for row, of_seeds in found.items()}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row, of_seeds in found.items():
        point = [float(np.mean([one["results"][name] for one in of_seeds])) for name in ("bytes", "error")]
        curves.setdefault(_parsed(row)[0], []).append((point[0], 100 * point[1]))
    places = np.arange(1, len(next(iter(first.values()))["information"]) + 1)
    return {
        "Test error against bytes of the whole file, means over seeds": report.line_plot(
            {name: np.array(sorted(points)).T for name, points in curves.items()}, "bytes", "test error, %"
        ),
        "Loss while training, of one draw a step (first seed)": report.line_plot(
            {row: np.array([[entry["step"] for entry in one["history"]], [entry["loss"] for entry in one["history"]]])
             for row, one in first.items()},
            "training step", "nats",
        ),
        "Test error of decoded weights when the smallest are set to 0 (first seed)": report.line_plot(
            {row: np.array([PRUNED, [100 * error for error in one["pruned"]]]) for row, one in first.items()},
            "weights set to 0, %", "test error, %",
        ),
        f"Information by leaf (first seed): {', '.join(next(iter(first.values()))['information'])}": report.line_plot(
            {row: np.array([places, list(one["information"].values())]) for row, one in first.items()}, "leaf", "bytes"
        ),
    } | {
        f"Posteriors before coding (first seed): {kind}": report.line_plot(
            {row: np.array(one["spread"][kind]) for row, one in first.items()}, kind, "% of values"
        )
        for kind in next(iter(first.values()))["spread"]
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
