"""OA-Adapter and its rivals on sequences of tasks that no one tells apart at test time.

data short and long are tasks of texts in one space of labels (MiniLM, in the `text` extra); its last layers are
adapted, those before are frozen and worked out once. digits is a small transformer over the rows of digits, trained
here, whose tasks have the pixels in orders of their own. Each seed has one of the orders of the tasks in turn.

Every method trains a cosine classifier over the task's own classes beside its adapters. Answers are those of class
means in the features (texts, where classes are the tasks' own), or of that classifier (digits, which share theirs).

python -m experiments.oa_adapter --data short --methods frozen lora o_lora oa_inputs
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.card import Card
from experiments.common import Run, RunConfig, over_seeds, parse_command
from experiments.sweep import run_grid
from experiments.text_tasks import load_tasks, lower_layers, text_streams
from jaxcl import adapters, continual, data, nets, report
from jaxcl.adapters import Adapter, AdapterState, LayerFunction
from jaxcl.continual import Adapted, Batch, Result, Strategy, Stream, streams
from jaxcl.continual.strategies import ClassMeans
from jaxcl.continual.streams import Selection
from jaxcl.nearest import normalise
from jaxcl.typing import Array, Key, PyTree, check_between

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("not measured", "that it runs"),
    "--preset cpu": Card("not measured", "not measured"),
    "--preset cpu --data short": Card("not measured", "not measured"),
    "--preset cpu --data long": Card("not measured", "not measured"),
}
Method = Literal[
    "frozen", "fine_tuning", "lora", "incremental_lora", "adapter", "incremental_adapter", "o_lora", "oa_fixed",
    "oa_outputs", "oa_down", "oa_inputs", "replay", "ewc", "lwf", "independent", "joint",
]  # fmt: skip
A_TASK_EACH = ("incremental_lora", "incremental_adapter", "o_lora", "oa_fixed", "oa_outputs", "oa_down", "oa_inputs")
TESTED_AT_ONCE = 250
TEMPERATURE = 0.05  # of the cosine classifier


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the adapter experiment; the defaults shown are those of the preset."""

    data: str = "digits"
    """digits (of scikit-learn); short or long, of the texts in the folder that JAXCL_DATA names; or json:PATH, a folder
    of tasks in the layout of O-LoRA's benchmark."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which methods to run. lora and adapter are one for all tasks, which train it in turn; incremental ones, O-LoRA
    and OA-Adapter have one more with each task; replay, EWC and LwF train a LoRA; independent is a LoRA a task, told
    which; joint trains a LoRA on all tasks at once."""
    sweep: tuple[str, ...] = ()
    """A grid: settings with values to try, as oa_sparsity=0,0.01. Each point is a run in a folder of its own in --out,
    which then holds compare.html."""
    features: Path = Path("runs/features")
    """Folder that keeps what frozen layers make of texts, which thus is worked out once for all runs."""
    tasks: int = 5
    """digits: how many."""
    train_texts: int = 1000
    """Texts: examples of a task to learn from, at most."""
    test_texts: int = 500
    """Texts: examples of a task to be tested on, at most."""
    length: int = 64
    """Texts: tokens of one, at most."""
    validation: bool = False
    """Test on a part of the training set, held out, instead of the test set: for choosing settings."""
    adapted_layers: int = 1
    """How many of the last layers are adapted."""
    answers: Literal["means", "classifier"] = "classifier"
    """Whether class means answer at test time, or the classifier."""
    drift_width: float = 0.0
    """Class means: of an example's weight in making up for drift, as its distance from a mean; 0 does not."""
    epochs: int = 3
    """Passes over a task."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 1e-3
    """Of Adam, for adapters and classifier."""
    fine_tuning_rate: float = 1e-4
    """Fine-tuning: of Adam, for all parameters of the adapted layers."""
    lora_rank: int = 8
    """LoRA: ranks at queries and values."""
    lora_alpha: float = 16.0
    """LoRA: over the rank, a factor."""
    rank: int = 16
    """Adapters: ranks after attention and after the feed-forward block; of OA-Adapter the most there may be."""
    o_lora_strength: float = 0.5
    """O-LoRA: of the penalty."""
    oa_strength: float | None = None
    """OA-Adapter: of the penalty; projects instead if not given, which makes the overlap 0."""
    oa_protected: int = 64
    """OA-Adapter: directions that are kept off at a site, at most."""
    oa_threshold: float = 0.1
    """OA-Adapter: tau at first."""
    oa_sparsity: float = 0.0
    """OA-Adapter: weight of the mean gate in the loss."""
    oa_revival: bool = True
    """OA-Adapter: whether ranks that are off can come back."""
    memory_size: int = 200
    """Replay: examples kept."""
    ewc_strength: float = 100.0
    """EWC: lambda."""
    lwf_strength: float = 1.0
    """LwF: lambda_o."""


def preset(name: str, data: str) -> Config:
    """The settings of preset `name` for a data set."""
    shared: dict[str, Any] = {"preset": name, "data": data, "out": Path("runs/oa_adapter"), "seeds": 3}
    if name == "smoke":
        small: dict[str, Any] = {"seeds": 1, "tasks": 2, "epochs": 1, "train_texts": 40, "test_texts": 20, "length": 16}
        return Config(**shared | small, answers="classifier" if data == "digits" else "means")
    if data == "digits":
        return Config(**shared, epochs=30, adapted_layers=2)
    return Config(**shared | {"seeds": 6 if data == "short" else 1}, answers="means")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, or its last point in a sweep; returns what is in metrics.json."""
    names = ("digits", "short", "long", "json")
    return run_grid(parse_command(preset, data=names, argv=argv, description=__doc__ or ""), _run)[-1]


class Body(NamedTuple):
    """A network up to its features, of which the upper part is adapted."""

    network: nn.Module  # inputs to features
    params: PyTree
    counted: Callable[[str, Batch], Array] | None  # as `continual.adapted_network` takes it


def _run(config: Config) -> dict[str, Any]:
    """Trains and tests every method in the folder of the run; returns what is in metrics.json."""
    run = Run(config, "oa_adapter")
    if document := run.finished():
        return document
    body, own = _digits(config, run) if config.data == "digits" else _texts(config)
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(config.seeds)]
    for name in config.methods:
        learner = _learner(config, name, body, own[0])
        of_method = [learner.stream(stream) for stream in own]
        params = [learner.init(key[0]) for key in keys]
        run.train(
            name, learner.strategy, optax.adam(learner.rate), params, of_method, jnp.stack([key[1] for key in keys]),
            epochs=learner.epochs, batch_size=config.batch_size, steps_per_call=1 if config.data != "digits" else 16,
        )  # fmt: skip
        _look(run, name, learner, own)
    run.tell(report.text_table(_rows(run.findings["adapters"])))
    run.tell("")
    return run.finish()


def _texts(config: Config) -> tuple[Body, list[Stream]]:
    """MiniLM's last layers, and a stream a seed."""
    network, params = nets.load_bert(nets.minilm_folder())
    check_between("adapted_layers", config.adapted_layers, 1, network.layers)
    first = network.layers - config.adapted_layers
    tasks, orders = load_tasks(
        config.data, train=config.train_texts, test=config.test_texts, validation=config.validation
    )
    ways = text_streams(
        tasks, orders, lower_layers(network, params, first), length=config.length, folder=config.features
    )
    upper = nets.BERTLayers(
        first, network.layers - 1, network.heads, network.hidden, network.epsilon, network.activation
    )
    own = {f"layers_{number}": params["params"][f"layers_{number}"] for number in range(first, network.layers)}
    body = Body(_Pooled(upper), {"params": {"layers": own}}, lambda _, batch: _real(batch.inputs))
    return body, [ways[seed % len(ways)] for seed in range(config.seeds)]


def _real(vectors: Array) -> Array:
    """[B, T], 1 where vectors [B, T, D] are not 0: a token."""
    return jnp.any(vectors != 0, axis=-1).astype(jnp.float32)


class _Pooled(nn.Module):
    """The mean over tokens of what layers make of vectors [B, T, D]."""

    layers: nn.Module

    def __call__(self, vectors: Array) -> Array:
        mask = _real(vectors)
        pooled: Array = nets.mean_over_tokens(self.layers(vectors.astype(jnp.float32), mask), mask)
        return pooled


class _Rows(nn.Module):
    """A small transformer over the rows of images [B, H, W], to features [B, D]."""

    width: int = 32
    layers: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = nn.Dense(self.width, name="embedding")(images)
        x += self.param("positions", nn.initializers.normal(0.1), x.shape[1:])
        layers = nets.BERTLayers(0, self.layers - 1, heads=4, hidden=64, epsilon=1e-6, name="layers")
        return layers(x, jnp.ones(x.shape[:2], bool)).mean(axis=1)


def _digits(config: Config, run: Run) -> tuple[Body, list[Stream]]:
    """A transformer trained on digits as they are, and a stream of permuted ones a seed."""
    split = data.digits()
    if config.validation:
        split = data.Split(*data.hold_out(split.train, share=0.2))
    split = data.Split(*(part._replace(inputs=np.asarray(part.inputs, np.float32) / 16) for part in split))
    network = _Rows(layers=config.adapted_layers)
    run.tell("Training the network on upright digits.")
    upright = streams.joint(streams.class_incremental(None, *split, classes_per_task=10))
    head_key, key = jax.random.split(jax.random.key(2**20))
    params = Adapted(network.init(key, split.train.inputs[np.arange(1)]), _classifier(head_key, network.width, 10))

    def apply(params: Adapted, images: Array) -> Array:
        return _logits(params.head, jnp.asarray(network.apply(params.adapter, images)))

    trained = continual.run(
        key, continual.naive(apply), optax.adam(3e-3), params, upright, epochs=config.epochs, batch_size=32,
        steps_per_call=64,
    )  # fmt: skip
    own = [streams.permuted(jax.random.key(seed), *split, tasks=config.tasks) for seed in range(config.seeds)]
    return Body(network, trained.params.adapter, None), own


class Learner(NamedTuple):
    """A method, ready to be trained."""

    strategy: Strategy
    init: Callable[[Key], Adapted]
    stream: Callable[[Stream], Stream]
    features: Callable[[Adapted, PyTree, Array], Array]  # (params, the strategy's state, inputs) -> [B, D]
    state: Callable[[Result], PyTree]  # what the method knows, without class means
    rate: float
    epochs: int


def _learner(config: Config, name: Method, body: Body, stream: Stream) -> Learner:
    tasks, classes = stream.eligible.shape
    width = jax.eval_shape(body.network.apply, body.params, stream.train.inputs[np.arange(1)]).shape[-1]
    method = _method(config, name, tasks, body.params)

    def layers(function: LayerFunction, inputs: Array) -> Array:
        found: Array = nets.through_layers(function, lambda: body.network.apply(body.params, inputs))
        return found

    def features(params: Adapted, state: PyTree, inputs: Array) -> Array:
        if method is not None:
            return continual.adapted_features(method, layers)(params, state if name in A_TASK_EACH else (), inputs)
        return jnp.asarray(body.network.apply(params.adapter if name == "fine_tuning" else body.params, inputs))

    def apply(params: Adapted, inputs: Array) -> Array:
        return _logits(params.head, features(params, (), inputs))

    def init(key: Key) -> Adapted:
        adapter_key, head_key = jax.random.split(key)
        adapter = body.params if name == "fine_tuning" else ()
        if method is not None:
            adapter = method.init(adapter_key, body.params)[0]
        return Adapted(adapter, _classifier(head_key, width, classes))

    replayed = {"memory_size": config.memory_size, "memory_batch_size": config.batch_size}
    if name in A_TASK_EACH:
        assert method is not None  # these have one
        strategy = continual.adapted_network(
            method, body.params, continual.classification(layers, _logits), counted=body.counted
        )
    elif name == "independent":
        strategy = continual.independent(apply, tasks)
    else:
        strategy = {
            "replay": lambda: continual.er(apply, **replayed),
            "ewc": lambda: continual.ewc(apply, strength=config.ewc_strength),
            "lwf": lambda: continual.lwf(apply, strength=config.lwf_strength),
        }.get(name, lambda: continual.naive(apply))()
    by_means = config.answers == "means" and name != "independent"
    if by_means:
        strategy = continual.class_means(strategy, features, drift_width=config.drift_width or None)
    rate, epochs = config.learning_rate, config.epochs
    if name == "fine_tuning":
        rate = config.fine_tuning_rate
    if name == "frozen" and by_means:
        rate, epochs = 0.0, 1  # nothing that it learns takes part

    def seen(stream: Stream) -> Stream:
        if name == "joint":
            return streams.joint(stream)
        if name == "independent":
            return stream._replace(task_known=True, eligible=stream.eligible_in_training)
        return stream

    return Learner(
        strategy._replace(fresh_optimizer=True), init, seen, features,
        lambda result: result.strategy_state.of_strategy if by_means else result.strategy_state, rate, epochs,
    )  # fmt: skip


def _method(config: Config, name: Method, tasks: int, params: PyTree) -> Adapter | None:
    """The adapters that a method trains; None for none."""

    def attention(path: str) -> bool:
        return path.endswith(("/query/kernel", "/value/kernel"))

    def blocks(path: str) -> bool:
        return path.endswith(("/attention_output/kernel", "/output/kernel"))

    lora = partial(adapters.lora, attention, config.lora_rank, alpha=config.lora_alpha)
    gated = partial(
        adapters.oa_adapter, blocks, config.rank, tasks, strength=config.oa_strength, protected=config.oa_protected,
        threshold=config.oa_threshold, sparsity=config.oa_sparsity, revival=config.oa_revival,
    )  # fmt: skip
    made: dict[str, Callable[[], Adapter]] = {
        "incremental_lora": lambda: adapters.incremental_lora(
            attention, config.lora_rank, tasks, alpha=config.lora_alpha
        ),
        "adapter": lambda: adapters.lora(blocks, config.rank, placement="sequential"),
        "incremental_adapter": lambda: adapters.incremental_lora(blocks, config.rank, tasks, placement="sequential"),
        "o_lora": lambda: adapters.o_lora(
            attention, config.lora_rank, tasks, alpha=config.lora_alpha, strength=config.o_lora_strength
        ),
        "oa_fixed": lambda: gated(orthogonal_to="inputs", gates="fixed"),
        "oa_outputs": lambda: gated(orthogonal_to="outputs"),
        "oa_down": lambda: gated(orthogonal_to="down"),
        "oa_inputs": lambda: gated(orthogonal_to="inputs"),
    }
    return None if name in ("frozen", "fine_tuning") else made.get(name, lora)()


def _classifier(key: Key, width: int, classes: int) -> Array:
    return jax.random.normal(key, (width, classes)) / width**0.5


def _logits(kernel: Array, features: Array) -> Array:
    """Cosines of features [B, D] and a kernel's columns [D, K], over the temperature."""
    return normalise(features) @ normalise(kernel.T).T / TEMPERATURE


def _look(run: Run, name: Method, learner: Learner, own: Sequence[Stream]) -> None:
    """Adds what only this experiment asks of a method to its findings and figures."""
    results, found = run.results[name], []
    features = jax.jit(learner.features)
    for result, stream in zip(results, own, strict=True):
        state = learner.state(result)
        row: dict[str, float] = {}
        if name != "independent":
            row |= _answers(features, result, state, stream)
        if (bank := _bank(state)) is not None:
            cost = adapters.budget(bank)
            row |= {
                "active_rank": float(np.mean(list(cost.active.values()))),
                "kept_bytes_a_task": float(cost.bytes.mean()),
                "basis_bytes": float(cost.basis_bytes),
            }
        found.append(row)
    run.findings.setdefault("adapters", {})[name] = over_seeds(
        **{part: [row[part] for row in found] for part in found[0]}
    )
    if (bank := _bank(learner.state(results[0]))) is not None:
        run.figures |= _figures(name, bank)


def _rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What only this experiment asks, as a table; means over seeds."""
    percent = ("means_task_free", "means_task_told", "classifier_task_free", "classifier_task_told", "drift_of_means")
    columns = {name: f"{name.replace('_', ' ')} %" for name in percent} | {
        "active_rank": "active rank", "kept_bytes_a_task": "bytes a task", "basis_bytes": "bytes of bases",
    }  # fmt: skip
    rows = [["method", *columns.values()]]
    for method, of_method in found.items():
        values = {name: of_method[name]["mean"] for name in columns if name in of_method}
        shown = {name: f"{100 * value:.1f}" if name in percent else f"{value:,.1f}" for name, value in values.items()}
        rows.append([method, *(shown.get(name, "") for name in columns)])
    return rows


def _answers(features: Callable[..., Array], result: Result, state: PyTree, stream: Stream) -> dict[str, float]:
    """Accuracies at the end, means over tasks: by class means and by the classifier, the task told or not."""
    labels, own = np.asarray(stream.test.labels), stream.eligible_in_training
    shown = [_shown(features, result, state, stream, part) for part in stream.test_sets]
    answered = {"classifier": [np.asarray(_logits(result.params.head, jnp.asarray(made))) for made in shown]}
    row: dict[str, float] = {}
    if isinstance(result.strategy_state, ClassMeans):
        past = result.strategy_state.past
        means, unit = np.asarray(normalise(past.sums)), [np.asarray(normalise(jnp.asarray(made))) for made in shown]
        answered["means"] = [np.where(np.asarray(past.counts) > 0, made @ means.T, -np.inf) for made in unit]
        whole, of_whole = np.concatenate(unit), np.concatenate([labels[part.rows] for part in stream.test_sets])
        now = np.stack([whole[of_whole == k].mean(axis=0) for k in np.unique(of_whole)])
        cosines = np.sum(means[np.unique(of_whole)] * now, axis=1) / np.linalg.norm(now, axis=1)
        row["drift_of_means"] = float(np.mean(1 - cosines))
    for by, of_tasks in answered.items():
        for told, choices in (("free", np.ones_like(own)), ("told", own)):
            right = [
                np.where(allowed, scores, -np.inf).argmax(axis=1) == labels[part.rows]
                for scores, allowed, part in zip(of_tasks, choices, stream.test_sets, strict=True)
            ]
            row[f"{by}_task_{told}"] = float(np.mean([of_task.mean() for of_task in right]))
    return row


def _shown(
    features: Callable[..., Array], result: Result, state: PyTree, stream: Stream, part: Selection
) -> np.ndarray:
    """Features of a task's test examples, [M, D]."""
    found = []
    for start in range(0, len(part.rows), TESTED_AT_ONCE):
        places = np.minimum(np.arange(start, start + TESTED_AT_ONCE), len(part.rows) - 1)
        inputs = jnp.asarray(stream.test.inputs[part.rows[places]])
        inputs = stream.view(stream.view_table, inputs, jnp.asarray(part.tasks[places]))
        found.append(np.asarray(features(result.params, state, inputs)))
    return np.concatenate(found)[: len(part.rows)]


def _bank(state: PyTree) -> AdapterState | None:
    """What a method with an adapter a task keeps."""
    kept = getattr(state, "of_tasks", state)
    return kept if isinstance(kept, AdapterState) else None


def _figures(name: str, bank: AdapterState) -> "dict[str, Figure]":
    """Ranks by site and task, and how near tasks' subspaces come to each other."""
    active = adapters.budget(bank).active
    ranks = np.stack(list(active.values()))
    sites = [path.removeprefix("params/").removesuffix("/kernel") for path in active]

    def nearest(which: str) -> np.ndarray:
        found = []
        for own in bank.bank.values():
            of_tasks = own.down if which == "down" else jnp.swapaxes(own.up, 1, 2)
            pairs = jax.vmap(jax.vmap(adapters.cosines, (None, 0)), (0, None))(of_tasks, of_tasks)
            found.append(np.asarray(pairs[..., 0]))
        return np.mean(found, axis=0)

    return {
        f"Active ranks by site and task, {name} (first seed)": report.heat_map(
            ranks, "active ranks", names=sites, most=max(1, ranks.max())
        ),
    } | {
        f"Largest cosine of the angles between tasks' {which} subspaces, mean over sites, {name} (first seed)": (
            report.heat_map(nearest(which), "cosine")
        )
        for which in ("down", "up")
    }


if __name__ == "__main__":
    main()
