"""A sub-network a task: IBM beside WSN, PackNet, EWC, one network a task, naive and joint training.

Streams are permuted (the pixels of each task in an order of its own), rotated, or split (each task has classes of its
own); the task is told at test time, and each has an output layer of its own. Mask methods forget nothing to the last
bit. They differ in how well they learn a task, and in how much of the network it takes: "weights a task" in the table.

What decides the masks (IBM's means and log variances, WSN's scores) learns at a rate of --ibm-travel or --wsn-travel
over the number of steps a task has, so that the same settings serve short and long runs. Presets: cpu takes minutes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.card import Card
from experiments.common import Run, RunConfig, over_seeds, parse_command, run_command
from experiments.images import NAMES, crop_and_flip, load_images, normalised, read_images
from experiments.sweep import run_grid
from jaxcl import continual, data, masks, nets, report
from jaxcl.continual import Strategy, Stream, streams
from jaxcl.masks import Bank, Committed, MaskMethod, TaskCost
from jaxcl.typing import Array, Key, PyTree, bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("1 min", "that it runs"),
    "--preset cpu": Card(
        "2 min",
        "permuted digits, ACC % IBM 96.9 ± 0.2 with 16 % of the weights a task, WSN 96.8 ± 0.7 with 20, PackNet 95.5 "
        "with 64, naive 42.4, EWC 57.0, one network a task 97.7",
    ),
    "--preset cpu --data mnist": Card(
        "38 min",
        "ACC % IBM 97.5 ± 0.1 with 13 % of the weights a task, WSN 97.0 ± 0.1 with 35, PackNet 95.0, naive 36.4, one "
        "network a task 97.8",
    ),
    "--preset cpu --data cifar10": Card(
        "46 min, with other work beside it",
        "ACC % IBM 88.2 with 6 % of the weights a task, WSN 88.2 with 20, PackNet 88.1 with 26, EWC 83.9, naive 72.4, "
        "one network a task 87.9",
    ),
    "--preset paper --data cifar100": Card(
        "not measured; it takes an accelerator", "published: 88.2 with ResNet-18, 82.7 with AlexNet"
    ),
}
Method = Literal["naive", "ewc", "packnet", "wsn", "ibm", "independent", "joint"]
BATCH_NORMALISED = ("alexnet", "resnet18")
MASKED = ("packnet", "wsn", "ibm")


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the comparison of mask methods; the defaults shown are those of the preset."""

    data: str = "digits"
    """digits (of scikit-learn), mnist, cifar10 or cifar100 (in the folder that JAXCL_DATA names), tinyimagenet:PATH (as
    it is distributed), folder:PATH (images in PATH/train/CLASS and PATH/test/CLASS), or tfds:NAME."""
    size: int = 32
    """Height and width to which the images of a folder are brought."""
    augment: bool = False
    """Crop training images at random, after padding by 4 pixels, and mirror half of them."""
    network: Literal["mlp", "mixer", "lenet5", "alexnet", "resnet18"] = "mlp"
    """mlp goes with every stream; the others see images, and so go with rotated and split ones."""
    stream: Literal["permuted", "rotated", "split"] = "permuted"
    """What a task is."""
    tasks: int = 10
    """How many; split ones have so many equal parts of the classes."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which methods to run."""
    validation: bool = False
    """Test on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only the first so many training examples and a fifth as many test examples."""
    sweep: tuple[str, ...] = ()
    """A grid: settings and their values, as ibm_penalty=0.003,0.01 ibm_travel=5,10. Each point is a run."""

    hidden: tuple[int, ...] = (300, 100)
    """Widths of the hidden layers of an mlp."""
    learning_rate: float = 1e-3
    """Of Adam, for weights; PackNet has its own."""
    epochs: int = 10
    """Passes over each task."""
    batch_size: int = 256
    """Examples in a step."""
    test_statistics: Literal["task", "batch"] = "task"
    """Methods with masks, in networks with batch normalisation: test with statistics of the task, or of the test batch
    as IBM's authors do, whose answers then depend on one another."""

    ibm_travel: float = 10.0
    """IBM: learning rate of means and log variances times the steps of a task."""
    ibm_penalty: float = 1e-2
    """IBM: what a nat over the batch size counts in the loss."""
    ibm_log_variance: float = -9.0
    """IBM: of new noise."""
    ibm_redraw: Literal["free", "all", "none"] = "all"
    """IBM: whose noise a new task draws anew; the paper has that of free weights."""
    ibm_ratios: bool = True
    """IBM: whether layers' penalties count by the ratios of feature decomposition."""
    ibm_reuse: bool = True
    """IBM: whether a task may use weights that others have claimed."""
    ibm_scales: Literal["folded", "authors"] = "folded"
    """IBM: few-bit scales for re-used weights only, or a float for each weight and task."""
    ibm_scale_bits: int = 3
    """IBM: of a re-used weight's scale."""
    ibm_refresh_every: int = 50
    """IBM: steps of a task from one measurement of the ratios to the next."""
    wsn_sparsity: float = 0.8
    """WSN: share of weights that a task does without."""
    wsn_travel: float = 10.0
    """WSN: learning rate of scores times the steps of a task."""
    packnet_share: float = 0.2
    """PackNet: share of the free weights that a task keeps."""
    packnet_learning_rate: float = 3e-3
    """PackNet: of Adam, for weights."""
    packnet_prune: float = 0.5
    """PackNet: share of a task's steps after which it prunes."""
    ewc_strength: float = 10.0
    """EWC: lambda."""


def preset(name: str, data: str) -> Config:
    """The settings of preset `name` for a data set."""
    shared: dict[str, Any] = {"preset": name, "data": data, "out": Path("runs/ibm"), "seeds": 3}
    kind = data.partition(":")[0]
    if name == "smoke":
        return Config(
            **shared | {"seeds": 2}, limit=400, tasks=3, hidden=(32,), epochs=2, batch_size=32, ibm_refresh_every=5
        )
    if name == "paper":
        return _published(kind, shared)
    if kind == "digits":
        return Config(**shared, epochs=30, batch_size=32, hidden=(100, 50), ibm_penalty=3e-2)
    if kind == "mnist":
        return Config(**shared, tasks=20, epochs=5, packnet_share=0.05, wsn_sparsity=0.65, ewc_strength=0.3)
    return Config(
        **shared,
        stream="split",
        tasks=5,
        network="mixer",
        epochs=10,
        batch_size=64,
        packnet_share=0.1,
        ewc_strength=100.0,
    )


def _published(kind: str, shared: Mapping[str, Any]) -> Config:
    """Settings of the paper and its authors' code, where everything learns at one rate."""
    splits = {"cifar100": (10, 32), "tinyimagenet": (20, 64), "folder": (20, 84)}  # tasks and size; the last is Mini
    if kind not in splits:
        raise bad_argument(
            "data", kind, "published are cifar100, tinyimagenet:PATH, and Mini-ImageNet, which is read as folder:PATH"
        )
    tasks, size = splits[kind]
    steps_an_epoch = 10 if kind == "folder" else 20  # of 2,500 or 5,000 images a task
    epochs, rate = 300, 1e-3
    travel = rate * epochs * steps_an_epoch
    return Config(
        **shared, stream="split", tasks=tasks, size=size, network="resnet18", augment=True, test_statistics="batch",
        methods=tuple(name for name in get_args(Method) if name != "ewc"),
        learning_rate=rate, epochs=epochs, ibm_travel=travel, ibm_penalty=1e-3, ibm_log_variance=-10.0,
        ibm_redraw="free", ibm_scales="authors", ibm_refresh_every=50 * steps_an_epoch, wsn_travel=travel,
        packnet_learning_rate=rate,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, or its last point in a sweep; returns what is in metrics.json."""
    return run_grid(parse_command(preset, data=NAMES, argv=argv, description=__doc__ or ""), _run)[-1]


def _run(config: Config) -> dict[str, Any]:
    """Trains and tests every method in the folder of the run; returns what is in metrics.json."""
    run = Run(config, "ibm")
    if document := run.finished():
        return document
    if "ewc" in config.methods and config.network in BATCH_NORMALISED:
        raise bad_argument(
            "methods", "ewc", f"EWC takes one example at a time, for which batch normalisation in {config.network} is "
            "another function: leave it out, or pass another --network",
        )  # fmt: skip
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in range(config.seeds)]
    tasks = _streams(config, [key[0] for key in keys])
    prepare, train = tasks[0].prepare, tasks[0].train
    assert prepare is not None  # streams here have one
    network = _network(config, int(np.max(train.labels)) + 1)
    first = prepare(jnp.asarray(train.inputs[np.arange(1)]))
    # Without what a training network notes of a batch.
    params = [{"params": network.testing.init(key[1], first)["params"]} for key in keys]
    steps = config.epochs * -(-max(len(part.rows) for part in tasks[0].train_sets) // config.batch_size)
    banks: dict[str, list[Bank]] = {}  # of each method with masks, one a seed
    # All before any training, so that what is wrong about one is told at once
    masked = {name: _masked(config, name, network, steps) for name in config.methods if name in MASKED}
    for name in config.methods:
        of_method = [streams.joint(stream) for stream in tasks] if name == "joint" else tasks
        rate = config.packnet_learning_rate if name == "packnet" else config.learning_rate
        tx: optax.GradientTransformation = optax.adam(rate)
        start: list[PyTree] = params
        if name in MASKED:
            method, strategy, travel = masked[name]
            start = [method.init(key[2], own)[0] for key, own in zip(keys, params, strict=True)]
            tx = masks.separate_rates(tx, optax.adam(travel / steps))
        else:
            strategy = _plain(config, name, network)
        run.train(
            name, strategy, tx, start, of_method, jnp.stack([key[3] for key in keys]), epochs=config.epochs,
            batch_size=config.batch_size, steps_per_call=16 if network.products else None,
        )  # fmt: skip
        if name in MASKED:
            states = [result.strategy_state.of_method for result in run.results[name]]
            banks[name] = [method.bank(state) for state in states]
            if name == "ibm":
                run.figures |= _figures_of_layers(states[0].committed)
    if banks:
        _tell_of_masks(run, config, banks)
    return run.finish()


def _tell_of_masks(run: Run, config: Config, banks: Mapping[str, Sequence[Bank]]) -> None:
    """Writes the masks to files, prints what they cost, and adds that and its figures to the report."""
    stored: dict[str, list[list[TaskCost]]] = {name: [] for name in banks}
    with run.bar("masks", config.seeds * len(banks), "file") as bar:
        for name, of_method in banks.items():
            for seed, bank in enumerate(of_method):
                path = config.out / "masks" / f"{name}_{seed}.masks"
                stored[name].append(masks.save_bank(path, bank, config.tasks))
                bar.update()
    rows = [["method", "weights a task %", "all tasks together %", "bits a weight and task", "as WSN stores masks"]]
    for name, of_method in banks.items():
        found = [_shares(bank, costs) for bank, costs in zip(of_method, stored[name], strict=True)]
        run.findings.setdefault("masks", {})[name] = over = over_seeds(
            **{part: [shares[part] for shares in found] for part in found[0]}
        )
        shares = (f"{100 * over[part]['mean']:.1f}" for part in ("kept_by_a_task", "kept_by_any"))
        rows.append([name, *shares, *(f"{over[part]['mean']:.3f}" for part in ("bits", "huffman_bits"))])
    run.tell(report.text_table(rows))
    numbers = np.arange(1, config.tasks + 1)
    first = {name: of_method[0] for name, of_method in banks.items()}
    run.figures |= {
        "Weights with masks that are still free (first seed)": report.line_plot(
            {name: np.array([numbers, 100 * _usage(bank)[:, 2]]) for name, bank in first.items()},
            "after task", "% of weights",
        ),
        "What a task adds to the file of masks: masks and scales (first seed)": report.line_plot(
            {name: np.array([numbers, [cost.masks / 1000 for cost in stored[name][0]]]) for name in first},
            "task", "kB",
        ),
    }  # fmt: skip
    for name, bank in first.items():
        run.figures |= {
            f"What tasks keep of each layer, {name} (first seed)": report.weight_usage_bars(
                masks.weight_usage(bank, config.tasks)
            ),
            f"How far masks of tasks overlap, {name} (first seed)": report.heat_map(
                masks.mask_overlap(bank, config.tasks), "share kept by both of what either keeps"
            ),
        }


def _usage(bank: Bank) -> np.ndarray:
    """[T, 3]: of all weights that have masks, the shares new to a task, re-used and still free."""
    sizes = np.array([owner.size for owner in bank.owner.values()], float)
    of_leaves = masks.weight_usage(bank, len(next(iter(bank.masks.values()))))
    return np.tensordot(sizes / sizes.sum(), np.stack(list(of_leaves.values())), 1)


def _shares(bank: Bank, stored: Sequence[TaskCost]) -> dict[str, float]:
    """Of all weights that have masks: shares kept, and bits that a task costs, in the mean."""
    new, reused, free = _usage(bank).T
    weights = sum(owner.size for owner in bank.owner.values())
    return {
        "kept_by_a_task": float((new + reused).mean()),
        "reused_by_a_task": float(reused.mean()),
        "kept_by_any": float(1 - free[-1]),
        "bits": 8 * float(np.mean([cost.masks for cost in stored])) / weights,
        "own_bytes": float(np.mean([cost.own for cost in stored])),
        "huffman_bits": masks.huffman_bits(bank, len(new)) / len(new),
    }


def _figures_of_layers(committed: Committed) -> "dict[str, Figure]":
    """Of IBM's layers at the end of each task: what their penalty counted, and the information that was kept."""

    def lines(values: Mapping[str, Array], label: str, scale: float) -> "Figure":
        return report.line_plot(
            {path: np.array([np.arange(1, len(of_tasks) + 1), scale * np.asarray(of_tasks)])
             for path, of_tasks in values.items()},
            "task", label,
        )  # fmt: skip

    return {
        "IBM's layer ratios: components of 97 % of the features over channels (first seed)": lines(
            committed.ratios, "ratio", 1.0
        ),
        "Information that IBM's tasks keep of each layer, at most (first seed)": lines(
            committed.information, "kbit", 1e-3 / np.log(2)
        ),
    }


class Network(NamedTuple):
    """A network, how it is applied, and which of its parameters have masks."""

    testing: nn.Module
    training: nn.Module  # the same, but batch normalisation, if it has any, goes by the batch
    head: str  # the name of its output layer
    products: bool = False  # whether it has no convolutions, which are slow in a compiled loop on a CPU


def _network(config: Config, classes: int) -> Network:
    if config.network == "mlp":
        mlp = nets.MLP(config.hidden, classes)
        return Network(mlp, mlp, f"Dense_{len(config.hidden)}", products=True)
    if config.stream == "permuted":
        raise bad_argument("network", config.network, "permuted pixels are no images: pass mlp, or another stream")
    by_batch = config.test_statistics == "batch"
    if config.network == "alexnet":
        return Network(nets.AlexNet(classes, training=by_batch), nets.AlexNet(classes, training=True), "head")
    if config.network == "resnet18":
        resnet = partial(nets.ResNet18, classes, normalisation="batch")
        return Network(resnet(training=by_batch), resnet(training=True), "Dense_0")
    plain = nets.Mixer(classes) if config.network == "mixer" else nets.LeNet5(classes)
    return Network(plain, plain, "head", products=config.network == "mixer")


def _streams(config: Config, keys: Sequence[Key]) -> list[Stream]:
    split = load_images(config.data, size=config.size, validation=config.validation, limit=config.limit)
    split = data.Split(read_images(split.train, "training images"), read_images(split.test, "test images"))
    if config.stream == "permuted":
        made = [streams.permuted(key, *split, tasks=config.tasks) for key in keys]
    elif config.stream == "rotated":
        made = [streams.rotated(*split, degrees=list(np.linspace(0, 180, config.tasks, endpoint=False)))] * len(keys)
    else:
        classes = int(np.max(split.train.labels)) + 1
        if classes % config.tasks:
            raise bad_argument("tasks", config.tasks, f"pass a divisor of {classes}, the classes that are split")
        made = [streams.task_incremental(key, *split, classes_per_task=classes // config.tasks) for key in keys]
    prepare = partial(normalised, data.channel_statistics(split.train))
    augment = crop_and_flip if config.augment else None
    return [stream._replace(task_known=True, prepare=prepare, augment=augment) for stream in made]


def _masked(config: Config, name: Method, network: Network, steps: int) -> tuple[MaskMethod, Strategy, float]:
    """A mask method, its strategy, and how far its scores travel in a task."""

    def covers(path: str) -> bool:
        return path.endswith("kernel") and network.head not in path

    options: dict[str, Any] = {}
    if network.training != network.testing:
        options = {"training_apply": network.training.apply, "statistics": nets.batch_statistics(network.training)}
    if name == "packnet":
        prune_after, travel = max(1, round(config.packnet_prune * steps)), 0.0
        method = masks.packnet(covers, config.tasks, share=config.packnet_share, prune_after=prune_after)
    elif name == "wsn":
        method, travel = masks.winning_subnetwork(covers, config.tasks, sparsity=config.wsn_sparsity), config.wsn_travel
    else:
        travel = config.ibm_travel
        method = masks.ib_masks(
            covers, config.tasks, scale_rule=config.ibm_scales, scale_bits=config.ibm_scale_bits,
            redraw=config.ibm_redraw, reuse=config.ibm_reuse, log_variance=config.ibm_log_variance,
        )  # fmt: skip
        options["penalty_weight"] = config.ibm_penalty
        if config.ibm_ratios:
            options |= {"features": nets.layer_outputs(network.training), "refresh_every": config.ibm_refresh_every}
    return method, continual.masked_network(method, network.testing.apply, **options), travel


def _plain(config: Config, name: Method, network: Network) -> Strategy:
    """Of methods without masks; batch normalisation goes by the batch at test time too, as the authors have it."""
    apply = network.training.apply
    if name == "ewc":
        return continual.ewc(apply, strength=config.ewc_strength)
    if name == "independent":
        return continual.independent(apply, config.tasks)
    return continual.naive(apply)


if __name__ == "__main__":
    run_command(main)
