"""Accuracy against bytes: what a learner of many tasks weighs when it travels as one file, system beside system.

One stream: twenty tasks of handwritten digits, the pixels of each in an order of its own, the task told to those who
ask. DKVB (also with SimVQ's keys), IBM and its rivals, adapters on a small transformer, and the baselines meet it.
In the end each learner is written to a file with all that it takes to answer, and nothing else; the file is read again,
and must give the very accuracies that the learner had. Masks are entropy-coded, adapters summed.

python -m experiments.lifelong
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.adapter_bodies import Body, ends_of_blocks, permuted_digits
from experiments.adapter_findings import bank_of
from experiments.card import Card
from experiments.common import Run, RunConfig, over_seeds, parse_command, run_command
from experiments.keys import KeyFitting, load_tree, save_tree, train_bottleneck
from jaxcl import adapters, bottleneck, continual, masks, nets, report, trees
from jaxcl.adapters import Adapter, Change
from jaxcl.bottleneck import Bottleneck
from jaxcl.continual import Adapted, Result, Strategy, Stream, streams
from jaxcl.masks import Masked, MaskMethod
from jaxcl.typing import Array, Key, PyTree

CARDS = {
    "--preset smoke": Card("1 min", "that it runs"),
    "--preset cpu": Card(
        "7 min on one core",
        "ACC % and kB of the file: IBM 96.8 in 116, one network a task 97.6 in 966, WSN 94.5 in 89, PackNet 91.1 in "
        "97, DKVB 85.2 in 1,311, ER 79.3 in 50, naive 26.6",
    ),
    "--preset paper": Card("not measured", "nothing is published; ten seeds"),
}
Method = Literal[
    "naive", "ewc", "er", "dkvb", "dkvb_simvq", "packnet", "wsn", "ibm", "lora", "oa_adapter", "independent", "joint"
]
_TESTED_AT_ONCE = 512
Answer = Callable[[PyTree, Array, Array], Any]  # (what the file holds, inputs [B, H, W], task []) -> logits [B, K]


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the comparison; the defaults shown are those of the preset."""

    data: Literal["digits"] = "digits"
    """The digits of scikit-learn."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which learners to compare."""
    tasks: int = 20
    """How many."""
    validation: bool = False
    """Test on a part of the training set, held out, instead of the test set: for choosing settings."""
    hidden: tuple[int, ...] = (100, 50)
    """Widths of the hidden layers of the MLP that all but DKVB and adapters train."""
    learning_rate: float = 1e-3
    """Of Adam, for weights and adapters."""
    epochs: int = 30
    """Passes over each task."""
    batch_size: int = 32
    """Examples in a step."""
    memory_size: int = 1000
    """ER: examples kept."""
    ewc_strength: float = 10.0
    """EWC: lambda."""
    travel: float = 10.0
    """IBM and WSN: learning rate of what decides masks, times the steps of a task."""
    ibm_penalty: float = 3e-2
    """IBM: what a nat over the batch size counts in the loss."""
    wsn_sparsity: float = 0.8
    """WSN: share of weights that a task does without."""
    packnet_share: float = 0.1
    """PackNet: share of the free weights that a task keeps."""
    codebooks: int = 64
    """DKVB: codebooks."""
    pairs: int = 256
    """DKVB: key-value pairs in each codebook."""
    key_width: int = 8
    """DKVB: width of a key."""
    key_epochs: int = 10
    """DKVB: passes over the first task's images that fit the keys, or iterations for SimVQ's."""
    dkvb_learning_rate: float = 30.0
    """DKVB: of gradient descent on the values; the global norm is clipped to 1."""
    rank: int = 8
    """Adapters: ranks after attention and after the feed-forward block."""
    layers: int = 2
    """Adapters: of the transformer."""


def preset(name: Any, _: str) -> Config:
    """The settings of preset `name`."""
    shared: dict[str, Any] = {"preset": name, "out": Path("runs/lifelong"), "seeds": 10 if name == "paper" else 3}
    if name == "smoke":
        return Config(
            **shared | {"seeds": 1}, tasks=2, hidden=(16,), epochs=1, codebooks=4, pairs=16, key_epochs=1, layers=1
        )
    return Config(**shared)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison; returns what is in metrics.json."""
    config = parse_command(preset, data=("digits",), argv=argv, description=__doc__ or "")
    run = Run(config, "lifelong")
    if document := run.finished():
        return document
    run.tell("Training the network that adapters change on upright digits.")
    body, tasks = permuted_digits(
        tasks=config.tasks, seeds=config.seeds, layers=config.layers, epochs=config.epochs, validation=config.validation
    )
    tasks = [stream._replace(task_known=True) for stream in tasks]
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    sizes: dict[str, dict[str, Any]] = {}
    for name in config.methods:
        learners = _learn(run, config, name, body, tasks, keys)
        found = [
            _travel(config, f"{name}_{seed}", learner, result, stream)
            for seed, (learner, result, stream) in enumerate(zip(learners, run.results[name], tasks, strict=True))
        ]
        sizes[name] = over_seeds(file_bytes=found)
        run.findings.setdefault("files", {})[name] = sizes[name]
    results = {
        name: over_seeds(acc=[continual.metrics.average_accuracy(result.accuracy) for result in of_seeds])
        for name, of_seeds in run.results.items()
    }
    run.figures["Accuracy in the end against bytes of the file that answers"] = report.accuracy_against(
        results, sizes, "file_bytes", "bytes of the file"
    )
    rows = [[name, f"{sizes[name]['file_bytes']['mean']:,.0f}"] for name in config.methods]
    run.tell(report.text_table([["method", "bytes of the file"], *rows]))
    return run.finish()


class Travelling(NamedTuple):
    """A learner as a file."""

    save: Callable[[Path], None]
    load: Callable[[Path], PyTree]
    answer: Answer


def _travel(config: Config, name: str, learner: Travelling, result: Result, stream: Stream) -> float:
    """Writes a learner's file, and sees that it answers as the learner did; its bytes.

    Raises:
        RuntimeError: it does not.
    """
    path = config.out / "files" / f"{name}.learner"
    learner.save(path)
    held, answer = learner.load(path), jax.jit(learner.answer)
    accuracies = []
    for number, part in enumerate(stream.test_sets):
        right = 0
        for start in range(0, len(part.rows), _TESTED_AT_ONCE):
            rows = np.arange(start, start + _TESTED_AT_ONCE)
            places = np.minimum(rows, len(part.rows) - 1)  # so that one shape serves all
            inputs = jnp.asarray(stream.test.inputs[part.rows[places]])
            inputs = stream.view(stream.view_table, inputs, jnp.asarray(part.tasks[places]))
            answers = np.asarray(answer(held, inputs, jnp.int32(number)).argmax(axis=1))
            labels = np.asarray(stream.test.labels)[part.rows[places]]
            right += int(np.sum((answers == labels)[rows < len(part.rows)]))
        accuracies.append(right / len(part.rows))
    if not np.allclose(accuracies, result.accuracy[-1], atol=1e-6):
        raise RuntimeError(f"{path} answers with {accuracies}, where the learner had {result.accuracy[-1]}")
    return float(path.stat().st_size)


def _learn(
    run: Run, config: Config, name: Method, body: Body, tasks: Sequence[Stream], keys: Sequence[Key]
) -> list[Travelling]:
    """Trains a learner on all seeds; what of each travels."""
    run_keys = jnp.stack([key[0] for key in keys])
    steps: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size, "steps_per_call": 16}
    if name.startswith("dkvb"):
        return _learn_bottleneck(run, config, name, tasks, keys)
    tx: optax.GradientTransformation = optax.adam(config.learning_rate)
    if name in ("lora", "oa_adapter"):
        method = _adapter(config, name)
        strategy = continual.adapted_network(method, body.params, body.objective(body.params))
        adapted = [Adapted(method.init(key[1], body.params)[0], body.head(key[2])) for key in keys]
        run.train(name, strategy, tx, adapted, tasks, run_keys, **steps)
        return [_of_adapters(method, body, result) for result in run.results[name]]
    net = nets.MLP(config.hidden, 10)
    params = [net.init(key[1], tasks[0].train.inputs[np.arange(1)]) for key in keys]
    if name in ("packnet", "wsn", "ibm"):
        of_task = config.epochs * -(-len(tasks[0].train_sets[0].rows) // config.batch_size)
        masked, strategy = _masked(config, name, net, of_task)
        tx = masks.separate_rates(tx, optax.adam(config.travel / of_task))
        start = [masked.init(key[2], own)[0] for key, own in zip(keys, params, strict=True)]
        run.train(name, strategy, tx, start, tasks, run_keys, **steps)
        return [_of_masks(config, masked, net, result) for result in run.results[name]]
    strategies: dict[str, Callable[[], Strategy]] = {
        "ewc": lambda: continual.ewc(net.apply, strength=config.ewc_strength),
        "er": lambda: continual.er(net.apply, memory_size=config.memory_size, memory_batch_size=config.batch_size),
        "independent": lambda: continual.independent(net.apply, config.tasks),
    }
    of_method = [streams.joint(stream) for stream in tasks] if name == "joint" else tasks
    strategy = strategies.get(name, lambda: continual.naive(net.apply))()
    run.train(name, strategy, tx, params, of_method, run_keys, **steps)
    if name == "independent":
        kept = [result.strategy_state.kept for result in run.results[name]]
        return [_as_arrays(own, lambda held, x, task: net.apply(trees.pick(held, task), x)) for own in kept]
    return [_as_arrays(result.params, lambda held, x, task: net.apply(held, x)) for result in run.results[name]]


def _as_arrays(tree: PyTree, answer: Answer) -> Travelling:
    """A learner that is a tree of arrays, as a file of these."""
    shapes = jax.tree.map(np.asarray, tree)
    return Travelling(partial(save_tree, tree=tree), partial(load_tree, like=shapes), answer)


def _adapter(config: Config, name: str) -> Adapter:
    if name == "lora":
        return adapters.incremental_lora(ends_of_blocks, config.rank, config.tasks, placement="sequential")
    return adapters.oa_adapter(ends_of_blocks, config.rank, config.tasks)


def _of_adapters(method: Adapter, body: Body, result: Result) -> Travelling:
    """The network, its head, and the sum of what all tasks added at each site."""
    of_tasks = bank_of(result.strategy_state)
    assert of_tasks is not None  # both methods have an adapter a task
    held = {"network": body.params, "past": of_tasks.past, "head": result.params.head}

    def answer(held: PyTree, inputs: Array, task: Array) -> Array:
        changes = {
            path: Change(past, jnp.zeros((len(past), 1)), jnp.zeros((1, past.shape[1])))
            for path, past in held["past"].items()
        }
        function = adapters.layer_function(changes, method.placement)
        logits: Array = body.objective(held["network"]).predict(function, held["head"], inputs)
        return logits

    return _as_arrays(held, answer)


def _masked(config: Config, name: str, net: nets.MLP, steps: int) -> tuple[MaskMethod, Strategy]:
    head = f"Dense_{len(config.hidden)}"

    def covers(path: str) -> bool:
        return path.endswith("kernel") and head not in path

    if name == "packnet":
        method = masks.packnet(covers, config.tasks, share=config.packnet_share, prune_after=max(1, steps // 2))
        return method, continual.masked_network(method, net.apply)
    if name == "wsn":
        method = masks.winning_subnetwork(covers, config.tasks, sparsity=config.wsn_sparsity)
        return method, continual.masked_network(method, net.apply)
    method = masks.ib_masks(covers, config.tasks)
    return method, continual.masked_network(
        method, net.apply, penalty_weight=config.ibm_penalty, features=nets.layer_outputs(net), refresh_every=50
    )


def _of_masks(config: Config, method: MaskMethod, net: nets.MLP, result: Result) -> Travelling:
    """Masks, scales and heads of all tasks, and the weights that any of them keeps."""
    weights, state = result.params.weights, result.strategy_state.of_method
    bank = method.bank(state)

    def load(path: Path) -> PyTree:
        stored = masks.load_bank(path)
        blank = jax.tree.map(jnp.zeros_like, weights)
        return trees.replace_leaves(blank, stored.weights or {}), state._replace(bank=stored.bank)

    def answer(held: PyTree, inputs: Array, task: Array) -> Any:
        kept, of_file = held
        return net.apply(method.select(Masked(kept, ()), of_file, task), inputs)

    def save(path: Path) -> None:
        masks.save_bank(path, bank, config.tasks, weights=weights)

    return Travelling(save, load, answer)


def _learn_bottleneck(
    run: Run, config: Config, name: str, tasks: Sequence[Stream], keys: Sequence[Key]
) -> list[Travelling]:
    flat = [_flattened(stream) for stream in tasks]
    width = flat[0].train.inputs.shape[1]
    layer = bottleneck.discrete_key_value_bottleneck(
        width, 10, codebooks=config.codebooks, pairs=config.pairs, key_width=config.key_width
    )
    indexed = train_bottleneck(
        run, layer, config.dkvb_learning_rate, flat, [key[1] for key in keys], jnp.stack([key[0] for key in keys]),
        name=name, classes=10, fitting=KeyFitting(config.key_epochs, 256, simvq=name == "dkvb_simvq"),
        epochs=config.epochs, batch_size=config.batch_size, steps_per_call=16,
    )  # fmt: skip
    return [_of_bottleneck(layer, seed.state, result) for seed, result in zip(indexed, run.results[name], strict=True)]


def _of_bottleneck(layer: Bottleneck, state: bottleneck.KeyState, result: Result) -> Travelling:
    """Projection, keys and values."""
    held = {"projection": state.projection, "keys": state.keys.codebook, "params": result.params}

    def answer(held: PyTree, inputs: Array, task: Array) -> Array:
        own = state._replace(projection=held["projection"], keys=state.keys._replace(codebook=held["keys"]))
        indices = layer.lookup(held["params"], own, inputs.reshape(len(inputs), -1))
        return bottleneck.vote(layer.read(held["params"], indices))

    return _as_arrays(held, answer)


def _flattened(stream: Stream) -> Stream:
    """The stream with each image [H, W] as a feature [D]; orders of pixels are of the flat image anyway."""
    train, test = (
        part._replace(inputs=np.asarray(part.inputs).reshape(len(part.labels), -1))
        for part in (stream.train, stream.test)
    )
    return stream._replace(train=train, test=test)


if __name__ == "__main__":
    run_command(main)
