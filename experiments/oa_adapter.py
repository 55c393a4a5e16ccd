"""OA-Adapter and its rivals on sequences of tasks that no one tells apart at test time.

data short and long are tasks of texts in one space of labels (MiniLM, in the `text` extra); its last layers are
adapted, those before are frozen and worked out once. digits is a small transformer over the rows of digits, trained
here, whose tasks have the pixels in orders of their own. Each seed has one of the orders of the tasks in turn.

Every method trains a cosine classifier over the task's own classes beside its adapters. Answers are those of a
discriminant analysis of the features (texts, where classes are the tasks' own), or of that classifier (digits, which
share theirs); the report has what class means answer too.

python -m experiments.oa_adapter --data short --methods frozen lora o_lora oa_inputs
python -m experiments.oa_adapter --data short --model t5:models/t5-large --methods lora o_lora oa_outputs
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from experiments.adapter_bodies import (
    UNCHANGED,
    Body,
    Cosines,
    ends_of_blocks,
    in_words,
    permuted_digits,
    queries_and_values,
    upper_layers,
)
from experiments.adapter_findings import bank_of, figures_of, findings_of, table_of
from experiments.card import Card
from experiments.common import Run, RunConfig, over_seeds, parse_command, run_command
from experiments.sweep import run_grid
from experiments.text_tasks import load_tasks
from jaxcl import adapters, continual, report
from jaxcl.adapters import Adapter, LayerFunction
from jaxcl.continual import Adapted, Objective, Result, Strategy, Stream, streams
from jaxcl.continual.strategies import Features
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_choice

CARDS = {
    "--preset smoke": Card("1 min", "that it runs"),
    "--preset cpu": Card(
        "23 min beside other work",
        "permuted pixels, ACC %: adapters 23 to 35, fine-tuning 40, replay 65, joint 89",
    ),
    "--preset cpu --data short": Card(
        "3 hours",
        "ACC % by class means: OA-Adapter off inputs 64.6 with 4.2 of 8 ranks, O-LoRA 59.3, off outputs 58.4, "
        "frozen 57.2, one LoRA 52.2, joint 67.4",
    ),
    "--preset cpu --data long": Card(
        "4 hours of one core, split by --methods",
        "ACC % by discriminant: EWC on a LoRA 61.3, OA-Adapter 58.3 to 59.4, frozen 57.6, O-LoRA 46.0, one LoRA 27.2, "
        "joint 62.6 (one seed)",
    ),
    "--preset paper --data short --model t5:PATH": Card(
        "not measured; it takes an accelerator", "O-LoRA's schedule for T5-large and LLaMA-7B, on the texts at hand"
    ),
}
Method = Literal[
    "frozen", "fine_tuning", "lora", "incremental_lora", "adapter", "incremental_adapter", "o_lora", "oa_fixed",
    "oa_free", "oa_outputs", "oa_down", "oa_inputs", "replay", "ewc", "lwf", "independent", "joint",
]  # fmt: skip
GATED = {"oa_free", "oa_outputs", "oa_down", "oa_inputs"}
SHORT: tuple[Method, ...] = (
    "frozen", "lora", "incremental_lora", "adapter", "incremental_adapter", "o_lora", "oa_fixed", "oa_outputs",
    "oa_down", "oa_inputs", "replay", "joint",
)  # fmt: skip
NEED_LOGITS = {"replay", "ewc", "lwf", "independent"}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the adapter experiment; the defaults shown are those of the preset."""

    data: str = "digits"
    """digits (of scikit-learn); short or long, of the texts in the folder that JAXCL_DATA names; json:PATH, a folder of
    tasks in the layout of O-LoRA's benchmark; or tfds:NAME,NAME, data sets of texts that TFDS has prepared, a task
    each."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which methods to run. lora and adapter are one for all tasks, which train it in turn; incremental ones, O-LoRA
    and OA-Adapter have one more with each task; replay, EWC and LwF train a LoRA; independent is a LoRA a task, told
    which; joint trains a LoRA on all tasks at once. OA-Adapter keeps off what earlier tasks have as outputs, down or
    inputs (the best of these with fixed ranks: oa_fixed), or off nothing (oa_free)."""
    sweep: tuple[str, ...] = ()
    """A grid: settings with values to try, as oa_sparsity=0,0.01. Each point is a run in a folder of its own in --out,
    which then holds compare.html."""
    features: Path = Path("runs/features")
    """Folder that keeps what frozen layers make of texts, which thus is worked out once for all runs."""
    model: str = "minilm"
    """Texts: minilm (in the text extra), which classifies; or t5:PATH or llama:PATH, Hugging Face folders with
    tokenizer.json, which answer with the name of a class."""
    tasks: int = 5
    """digits: how many."""
    train_texts: int = 1000
    """Texts: examples of a task to learn from, at most."""
    test_texts: int = 500
    """Texts: examples of a task to be tested on, at most."""
    test_split: str = "test"
    """tfds: the split to be tested on; that of GLUE and SuperGLUE has no labels, but validation has."""
    length: int = 64
    """Texts: tokens of one, at most."""
    validation: bool = False
    """Test on a part of the training set, held out, instead of the test set: for choosing settings."""
    adapted_layers: int = 1
    """How many of the last layers are adapted."""
    answers: Literal["discriminant", "means", "classifier"] = "classifier"
    """What answers at test time: a discriminant analysis of the features, their class means, or the classifier."""
    shrinkage: float = 1e-3
    """Discriminant: how far the covariance within classes is shrunk towards 1, features being of unit length."""
    against_means: tuple[Method, ...] = ("oa_fixed", "oa_inputs")
    """Discriminant and means: methods that train a task's classes against the means of earlier tasks' classes too."""
    held_back: float = 3.0
    """Those means: nats by which they count for less than the task's own classes."""
    drift_width: float = 0.0
    """Class means: of an example's weight in making up for drift, as its distance from a mean; 0 does not."""
    epochs: int = 3
    """Passes over a task."""
    batch_size: int = 32
    """Examples in a step."""
    microbatches: int = 1
    """Adapters and fine-tuning: parts in which a step goes through its examples, for less memory; they divide them."""
    learning_rate: float = 1e-3
    """Of Adam, for adapters and classifier, where none of the following is meant."""
    o_lora_rate: float = 1e-3
    """O-LoRA: of Adam."""
    oa_rate: float = 1e-3
    """OA-Adapter: of Adam, where gates, which begin small, are learnt."""
    fine_tuning_rate: float = 1e-4
    """Fine-tuning: of Adam, for all parameters of the adapted layers."""
    lora_rank: int = 8
    """LoRA: ranks at queries and values."""
    lora_alpha: float = 16.0
    """LoRA: over the rank, a factor."""
    rank: int = 16
    """Adapters: ranks after attention and after the feed-forward block; of other OA-Adapters the most there may be."""
    o_lora_strength: float = 0.5
    """O-LoRA: of the penalty."""
    oa_strength: float | None = None
    """OA-Adapter: of the penalty; projects instead if not given, which makes the overlap 0."""
    oa_protected: int = 64
    """OA-Adapter: directions that are kept off at a site, at most."""
    oa_drift_strength: float = 0.0
    """OA-Adapter off inputs: of the penalty on what an adapter adds to what earlier tasks had at its site."""
    oa_at_queries: bool = False
    """OA-Adapter off inputs: whether queries and values have adapters too, beside the ends of blocks."""
    oa_inputs_rank: int = 16
    """OA-Adapter off inputs: ranks at a site, at most."""
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
        return Config(**shared | small, answers="classifier" if data == "digits" else "discriminant")
    if data == "digits":
        return Config(**shared | ({"seeds": 10} if name == "paper" else {}), epochs=30, adapted_layers=2)
    if name == "paper":  # those of O-LoRA's authors
        return Config(
            **shared, methods=("lora", "incremental_lora", "o_lora", "oa_outputs", "joint"), train_texts=5000,
            test_texts=7600, length=512, epochs=1, batch_size=64, lora_alpha=32.0,
        )  # fmt: skip
    of_short: dict[str, Any] = {"seeds": 6, "methods": SHORT} if data == "short" else {"seeds": 1}
    return Config(
        **shared | of_short, answers="discriminant", adapted_layers=2,
        o_lora_rate=4e-3, oa_rate=8e-3, oa_protected=128, oa_sparsity=1.0, oa_drift_strength=100.0, oa_at_queries=True,
        oa_inputs_rank=8,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, or its last point in a sweep; returns what is in metrics.json."""
    names = ("digits", "short", "long", "json:PATH", "tfds:NAME")
    return run_grid(parse_command(preset, data=names, argv=argv, description=__doc__ or ""), _run)[-1]


def _run(config: Config) -> dict[str, Any]:
    """Trains and tests every method in the folder of the run; returns what is in metrics.json."""
    run = Run(config, "oa_adapter")
    if document := run.finished():
        return document
    body, ways = _body(config, run)
    own = [ways[seed % len(ways)] for seed in range(config.seeds)]
    keys = [jax.random.split(jax.random.key(seed)) for seed in range(config.seeds)]
    # All before any training, so that what is wrong about one is told at once
    learners = {name: _learner(config, name, body, own[0]) for name in config.methods}
    for name, learner in learners.items():
        of_method = [learner.stream(stream) for stream in own]
        params = [learner.init(key[0]) for key in keys]
        run.train(
            name, learner.strategy, optax.adam(learner.rate), params, of_method, jnp.stack([key[1] for key in keys]),
            epochs=learner.epochs, batch_size=config.batch_size, steps_per_call=16 if config.data == "digits" else 1,
        )  # fmt: skip
        features = None if learner.features is None else jax.jit(learner.features)
        states = [learner.state(result) for result in run.results[name]]
        found = [findings_of(features, *one) for one in zip(run.results[name], states, own, strict=True)]
        run.findings.setdefault("adapters", {})[name] = over_seeds(
            **{part: [row[part] for row in found] for part in found[0]}
        )
        if (bank := bank_of(states[0])) is not None:
            run.figures |= figures_of(name, bank)
    run.tell(f"{report.text_table(table_of(run.findings['adapters']))}\n")
    return run.finish()


def _body(config: Config, run: Run) -> tuple[Body, list[Stream]]:
    """The network, and streams of which each seed has one in turn."""
    check_choice("model", config.model.partition(":")[0], ("minilm", "t5", "llama"))
    if config.microbatches < 1 or config.batch_size % config.microbatches:
        raise bad_argument("microbatches", config.microbatches, f"pass a divisor of --batch-size, {config.batch_size}")
    if config.data == "digits":
        if config.model != "minilm":
            raise bad_argument("model", config.model, "digits have a network of their own: pass texts as --data, too")
        run.tell("Training the network on upright digits.")
        return permuted_digits(
            tasks=config.tasks, seeds=config.seeds, layers=config.adapted_layers, epochs=config.epochs,
            validation=config.validation,
        )  # fmt: skip
    tasks, orders = load_tasks(
        config.data, train=config.train_texts, test=config.test_texts, validation=config.validation,
        test_split=config.test_split,
    )  # fmt: skip
    if config.model != "minilm":
        if unfit := set(config.methods) & NEED_LOGITS:
            raise bad_argument("methods", sorted(unfit), f"leave these out with {config.model}, which answers in words")
        return in_words(config.model, tasks, orders, length=config.length)
    return upper_layers(tasks, orders, adapted=config.adapted_layers, length=config.length, folder=config.features)


class Learner(NamedTuple):
    """A method, ready to be trained."""

    strategy: Strategy
    init: Callable[[Key], Adapted]
    stream: Callable[[Stream], Stream]
    features: Features | None  # None where there are none, or the task must be told
    state: Callable[[Result], PyTree]  # what the method knows, without class means
    rate: float
    epochs: int


def _learner(config: Config, name: Method, body: Body, stream: Stream) -> Learner:
    tasks, method = len(stream.test_sets), _method(config, name, len(stream.test_sets))
    objective = body.objective(body.params)
    told = name == "independent"

    def function(params: Adapted, state: PyTree) -> LayerFunction:
        return adapters.layer_function(method.changes(params.adapter, state), method.placement) if method else UNCHANGED

    def features(params: Adapted, state: PyTree, inputs: Array) -> Array:
        assert body.features is not None  # or it would not be called
        layers = body.features(params.adapter if name == "fine_tuning" else body.params)
        return layers(function(params, state), inputs)

    def apply(params: Adapted, inputs: Array) -> Array:
        return objective.predict(function(params, ()), params.head, inputs)

    def imprint(params: Adapted, means: Array, which: Array) -> Adapted:
        kernel, offset = params.head
        return params._replace(
            head=Cosines(jnp.where(which, means.T, kernel), jnp.where(which, -config.held_back, offset))
        )

    def init(key: Key) -> Adapted:
        adapter_key, head_key = jax.random.split(key)
        adapter = body.params if name == "fine_tuning" else ()
        if method is not None:
            adapter = method.init(adapter_key, body.params)[0]
        return Adapted(adapter, body.head(head_key))

    strategy = {
        "replay": lambda: continual.er(apply, memory_size=config.memory_size, memory_batch_size=config.batch_size),
        "ewc": lambda: continual.ewc(apply, strength=config.ewc_strength),
        "lwf": lambda: continual.lwf(apply, strength=config.lwf_strength),
        "independent": lambda: continual.independent(apply, tasks),
    }.get(name, lambda: continual.in_microbatches(_of_objective(name, body, method), config.microbatches))()
    by_features = config.answers != "classifier" and body.features is not None and not told
    if by_features and config.answers == "means":
        strategy = continual.class_means(strategy, features, drift_width=config.drift_width or None)
    elif by_features:
        strategy = continual.answered_by(continual.streaming_lda(shrinkage=config.shrinkage), strategy, features)
    if by_features and name in config.against_means:
        strategy = continual.against_means(strategy, imprint)
    rates = {
        "o_lora": config.o_lora_rate,
        "fine_tuning": config.fine_tuning_rate,
        **dict.fromkeys(GATED, config.oa_rate),
    }
    rate, epochs = rates.get(name, config.learning_rate), config.epochs
    if name == "frozen" and (by_features or body.features is None):  # nothing that it would learn takes part
        strategy = strategy._replace(
            gradients=lambda key, params, state, batch: (jax.tree.map(jnp.zeros_like, params), {})
        )
        epochs = 1

    def seen(stream: Stream) -> Stream:
        if name == "joint":
            return streams.joint(stream)
        return stream._replace(task_known=True, eligible=stream.eligible_in_training) if told else stream

    return Learner(
        strategy._replace(fresh_optimizer=True), init, seen, None if told or body.features is None else features,
        lambda result: result.strategy_state.of_strategy if by_features else result.strategy_state, rate, epochs,
    )  # fmt: skip


def _of_objective(name: Method, body: Body, method: Adapter | None) -> Strategy:
    """Training in turn on the objective, of adapters or, where there are none, of the network or its head alone."""
    if method is not None:
        return continual.adapted_network(method, body.params, body.objective(body.params), counted=body.counted)

    def objective(params: Adapted) -> Objective:
        return body.objective(params.adapter if name == "fine_tuning" else body.params)

    return Strategy(
        continual.gradients_of(lambda key, params, state, batch: objective(params).loss(UNCHANGED, params.head, batch)),
        lambda params, state, inputs, task: objective(params).predict(UNCHANGED, params.head, inputs),
    )


def _method(config: Config, name: Method, tasks: int) -> Adapter | None:
    """The adapters that a method trains; None for none."""
    lora = partial(adapters.lora, queries_and_values, config.lora_rank, alpha=config.lora_alpha)
    gated = partial(
        adapters.oa_adapter, tasks=tasks, strength=config.oa_strength, protected=config.oa_protected,
        threshold=config.oa_threshold, sparsity=config.oa_sparsity, revival=config.oa_revival,
    )  # fmt: skip
    published = partial(gated, ends_of_blocks, config.rank)

    def everywhere(path: str) -> bool:
        return ends_of_blocks(path) or (config.oa_at_queries and queries_and_values(path))

    off_inputs = partial(
        gated, everywhere, config.oa_inputs_rank, orthogonal_to="inputs", drift_strength=config.oa_drift_strength
    )
    made: dict[str, Callable[[], Adapter]] = {
        "incremental_lora": lambda: adapters.incremental_lora(
            queries_and_values, config.lora_rank, tasks, alpha=config.lora_alpha
        ),
        "adapter": lambda: adapters.lora(ends_of_blocks, config.rank, placement="sequential"),
        "incremental_adapter": lambda: adapters.incremental_lora(
            ends_of_blocks, config.rank, tasks, placement="sequential"
        ),
        "o_lora": lambda: adapters.o_lora(
            queries_and_values, config.lora_rank, tasks, alpha=config.lora_alpha, strength=config.o_lora_strength
        ),
        "oa_fixed": lambda: off_inputs(gates="fixed"),
        "oa_free": lambda: published(orthogonal_to=None),
        "oa_outputs": lambda: published(orthogonal_to="outputs"),
        "oa_down": lambda: published(orthogonal_to="down"),
        "oa_inputs": off_inputs,
    }
    return None if name in ("frozen", "fine_tuning") else made.get(name, lora)()


if __name__ == "__main__":
    run_command(main)
