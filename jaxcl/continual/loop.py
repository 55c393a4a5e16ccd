"""The loop: one compiled program for training and one for evaluation, whatever the number of tasks.

A run is a fold of pure programs over one pytree, `LoopState`. The host only decides what comes next: which rows (a
function of key, task and epoch, never of an iterator's memory), which task, how many steps a call.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.continual.compilations import count_compilations
from jaxcl.continual.programs import LoopState, Order, Programs, Table, compile_programs
from jaxcl.continual.strategies import Strategy
from jaxcl.continual.streams import Examples, Selection, Stream
from jaxcl.trees import byte_count, parameter_count
from jaxcl.typing import Key, PyTree, bad_argument, check_at_least

# Steps a call. On CPU a convolution inside a compiled loop is 8 to 16 times slower than outside (XLA runs it on one
# thread, unvectorised), and a call costs only some tens of microseconds; on accelerators launching dominates.
_STEPS_PER_CALL = {"cpu": 1}
_STEPS_PER_CALL_ELSEWHERE = 32


class Progress(NamedTuple):
    """What the loop tells its callback at the end of each epoch."""

    seed: int  # position of the seed in the run; 0 where all are trained together
    stage: int
    stages: int
    epoch: int
    epochs: int
    metrics: dict[str, float]  # means over the epoch's examples (and over seeds trained together)


class Result(NamedTuple):
    """What a run leaves."""

    accuracy: np.ndarray  # [I, T]: on task j's test set after training stage i; I is T, or 1 if trained jointly
    untrained: np.ndarray  # [T], before any training
    history: list[dict[str, float]]  # one entry an epoch: "stage", "epoch" and the strategy's metrics
    params: PyTree
    strategy_state: PyTree
    parameters: int  # scalars that the optimizer trains
    bytes: int  # of parameters and the strategy's state, at the end
    seconds: float  # wall time, compilation included; of seeds trained together, an equal share
    compilations: dict[str, int]  # programs compiled, by name, over all seeds of the run


def run(
    key: Key,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: PyTree,
    stream: Stream,
    *,
    epochs: int,
    batch_size: int,
    steps_per_call: int | None = None,
    evaluation_batch_size: int = 1024,
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Trains on a stream's tasks in turn and tests on all of them after each.

    Args:
        key: decides data order and all that the strategy draws; consumed.
        strategy: the continual-learning method.
        tx: the optimizer; it starts afresh with the run, not with each task.
        params: initial parameters; not consumed.
        stream: the tasks.
        epochs: passes over a task's training set.
        batch_size: B; an epoch's last batch may hold fewer examples.
        steps_per_call: training steps in one call of the compiled program. None takes the backend's default: 1 on CPU,
            where a convolution inside a compiled loop is many times slower, 32 elsewhere. Small networks without
            convolutions are faster with more on CPU too. The results are the same.
        evaluation_batch_size: test examples at a time, at most.
        callback: told the `Progress` after each epoch.

    Raises:
        ValueError: a size below 1, or a stage or task without examples.
    """
    return run_seeds(
        jnp.stack([key]),
        strategy,
        tx,
        [params],
        [stream],
        epochs=epochs,
        batch_size=batch_size,
        steps_per_call=steps_per_call,
        evaluation_batch_size=evaluation_batch_size,
        callback=callback,
    )[0]


def run_seeds(
    keys: Key,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: Sequence[PyTree],
    streams: Sequence[Stream],
    *,
    epochs: int,
    batch_size: int,
    together: bool = False,
    steps_per_call: int | None = None,
    evaluation_batch_size: int = 1024,
    callback: Callable[[Progress], None] | None = None,
) -> list[Result]:
    """`run` for several seeds that share one compilation: one after another, or all in each step.

    Args:
        keys: [S]; consumed.
        strategy: as in `run`.
        tx: as in `run`.
        params: one tree a seed.
        streams: one a seed, with examples and test sets of equal shapes.
        epochs: as in `run`.
        batch_size: as in `run`.
        together: trains all seeds under `vmap`. Faster where calls rather than arithmetic are the limit. The numbers
            are those of one seed after another, up to rounding.
        steps_per_call: as in `run`.
        evaluation_batch_size: as in `run`.
        callback: as in `run`.

    Returns:
        One `Result` a seed.

    Raises:
        ValueError: as in `run`; lengths of `keys`, `params` and `streams` that differ; streams that are not alike; a
            strategy that refreshes, trained `together`.
    """
    check_at_least("epochs", epochs, 1)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("evaluation_batch_size", evaluation_batch_size, 1)
    if steps_per_call is None:
        steps_per_call = _STEPS_PER_CALL.get(jax.default_backend(), _STEPS_PER_CALL_ELSEWHERE)
    check_at_least("steps_per_call", steps_per_call, 1)
    if not len(keys) == len(params) == len(streams):
        raise bad_argument(
            "keys, params, streams", f"{len(keys)}, {len(params)} and {len(streams)} of them", "pass one of each a seed"
        )
    for stream in streams:
        _check_stream(stream)
        if (stream.view, stream.task_known) != (streams[0].view, streams[0].task_known):
            raise bad_argument("streams", "streams of several kinds", "make them all by the same function")
        if len(stream.train_sets) != len(streams[0].train_sets) or stream.eligible.shape != streams[0].eligible.shape:
            raise bad_argument("streams", "different numbers of tasks or classes", "make them alike but for their keys")
    if together and strategy.refresh_every:
        raise bad_argument(
            "together", together, "train in turn: seeds reach the strategy's `refresh_every` steps at different times"
        )

    shared = all(stream.train is streams[0].train and stream.test is streams[0].test for stream in streams)
    axes = Table._make((None if shared else 0, 0, 0))
    programs = compile_programs(
        strategy,
        tx,
        streams[0].view,
        steps_per_call=steps_per_call,
        task_known=streams[0].task_known,
        seed_axes=axes if together else None,
    )
    largest_test = max(len(part.rows) for stream in streams for part in stream.test_sets)
    evaluation_batch_size = min(evaluation_batch_size, largest_test)
    shape = _Shape(
        epochs,
        batch_size,
        batches=max(-(-len(part.rows) // batch_size) for stream in streams for part in stream.train_sets),
        evaluation_batch_size=evaluation_batch_size,
        evaluation_batches=-(-largest_test // evaluation_batch_size),
        steps_per_call=steps_per_call,
        refresh_every=strategy.refresh_every,
    )
    results: list[Result] = []
    with count_compilations(programs._fields) as compilations:
        for group in [range(len(streams))] if together else [[seed] for seed in range(len(streams))]:
            seeds = _Seeds([params[seed] for seed in group], [streams[seed] for seed in group], together, shared)
            results += _run_group(keys[np.asarray(group)], seeds, programs, shape, len(results), callback)
    return [result._replace(compilations=dict(compilations)) for result in results]


class _Shape(NamedTuple):
    """How long a run is and how large its batches are: the same for all seeds, so that they share programs."""

    epochs: int
    batch_size: int
    batches: int  # P, of the largest stage
    evaluation_batch_size: int
    evaluation_batches: int  # of the largest task
    steps_per_call: int
    refresh_every: int


class _Seeds(NamedTuple):
    """Seeds trained together, or a single one."""

    params: list[PyTree]
    streams: list[Stream]
    together: bool
    shared: bool

    def stack(self, trees: Sequence[PyTree]) -> PyTree:
        """The trees on a new leading axis; a single seed's tree as it is, copied to the device."""
        if self.together:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trees[0])

    def unstack(self, tree: PyTree) -> list[PyTree]:
        if self.together:
            return [jax.tree.map(lambda leaf, seed=seed: leaf[seed], tree) for seed in range(len(self.streams))]
        return [tree]

    def table(self, examples: Sequence[Examples]) -> Table:
        return Table(
            jax.tree.map(jnp.asarray, examples[0]) if self.shared else self.stack(examples),
            self.stack([jnp.asarray(stream.eligible) for stream in self.streams]),
            self.stack([stream.view_table for stream in self.streams]),
        )

    def order(self, parts: Sequence[Selection], batch_size: int, batches: int) -> Order:
        """Rows as they come, in `batches` batches; -1 fills up."""
        filled = []
        for part in parts:
            room = np.full((2, batches * batch_size), -1, np.int32)
            room[0, : len(part.rows)], room[1, : len(part.rows)] = part
            room[1, len(part.rows) :] = 0
            filled.append(Order(*room.reshape(2, batches, batch_size)))
        return self.stack(filled)


def _run_group(
    key: Key,
    seeds: _Seeds,
    programs: Programs,
    shape: _Shape,
    first_seed: int,
    callback: Callable[[Progress], None] | None,
) -> list[Result]:
    began = time.perf_counter()
    # numpy's generator takes a key's bits: data order depends on key, stage and epoch alone.
    bits = [[int(word) for word in np.ravel(jax.random.key_data(one))] for one in key]
    key = key if seeds.together else key[0]
    table = seeds.table([stream.train for stream in seeds.streams])
    test_table = seeds.table([stream.test for stream in seeds.streams])
    tests = _test_orders(seeds, shape)

    def shuffled(stage: int, epoch: int) -> tuple[Order, int]:
        """An epoch's batches, and how many of them the seed with most has."""
        parts = [stream.train_sets[stage] for stream in seeds.streams]
        orders = [
            np.random.default_rng([*b, stage, epoch]).permutation(len(p.rows)) for b, p in zip(bits, parts, strict=True)
        ]
        parts = [Selection(p.rows[o], p.tasks[o]) for p, o in zip(parts, orders, strict=True)]
        steps = -(-max(len(p.rows) for p in parts) // shape.batch_size)
        return seeds.order(parts, shape.batch_size, shape.batches), steps

    state = programs.start(key, seeds.stack(seeds.params), table, shuffled(0, 0)[0])
    untrained = _accuracy(programs, state, test_table, tests, shape.evaluation_batch_size)
    accuracy, history = [], []
    stages = len(seeds.streams[0].train_sets)
    for stage in range(stages):
        if programs.begin_task:
            state = programs.begin_task(key, state, np.int32(stage))
        taken = 0
        for epoch in range(shape.epochs):
            order, steps = shuffled(stage, epoch)
            position = 0
            while position < steps:
                count = min(shape.steps_per_call, steps - position)
                if programs.refresh:
                    count = min(count, shape.refresh_every - taken % shape.refresh_every)
                state = programs.train(key, state, table, order, np.int32(stage), np.int32(position), np.int32(count))
                position, taken = position + count, taken + count
                if programs.refresh and taken % shape.refresh_every == 0:
                    state = programs.refresh(key, state, table, order, np.int32(stage))
            totals, examples = jax.device_get((state.totals, state.examples))
            means = {name: np.atleast_1d(total / examples) for name, total in totals.items()}
            history.append((stage, epoch, means))
            if callback:
                metrics = {name: float(mean.mean()) for name, mean in means.items()}
                callback(Progress(first_seed, stage, stages, epoch, shape.epochs, metrics))
        if programs.end_task:
            state = programs.end_task(key, state, table, order, np.int32(stage))
        accuracy.append(_accuracy(programs, state, test_table, tests, shape.evaluation_batch_size))

    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / len(seeds.streams)
    finals = zip(seeds.unstack(state.params), seeds.unstack(state.strategy_state), strict=True)
    return [
        Result(
            accuracy=np.stack(accuracy)[:, seed],
            untrained=untrained[seed],
            history=[
                {"stage": stage, "epoch": epoch} | {name: float(mean[seed]) for name, mean in means.items()}
                for stage, epoch, means in history
            ],
            params=params,
            strategy_state=strategy_state,
            parameters=parameter_count(params),
            bytes=byte_count((params, strategy_state)),
            seconds=seconds,
            compilations={},
        )
        for seed, (params, strategy_state) in enumerate(finals)
    ]


def _test_orders(seeds: _Seeds, shape: _Shape) -> list[tuple[Order, np.ndarray]]:
    """A task's test batches, on the device, and how many examples each seed has in them [S]."""
    tests = []
    for parts in zip(*(stream.test_sets for stream in seeds.streams), strict=True):
        order = seeds.order(parts, shape.evaluation_batch_size, shape.evaluation_batches)
        tests.append((order, np.asarray([len(part.rows) for part in parts])))
    return tests


def _accuracy(
    programs: Programs, state: LoopState, table: Table, tests: list[tuple[Order, np.ndarray]], batch_size: int
) -> np.ndarray:
    """[S, T]."""
    right = [
        [
            programs.evaluate(state, table, order, np.int32(task), np.int32(position))
            for position in range(-(-int(sizes.max()) // batch_size))
        ]
        for task, (order, sizes) in enumerate(tests)
    ]
    counts = np.stack([np.atleast_1d(sum(counts)) for counts in jax.device_get(right)], axis=1)
    return counts / np.stack([sizes for _, sizes in tests], axis=1)


def _check_stream(stream: Stream) -> None:
    for name, parts in (("train_sets", stream.train_sets), ("test_sets", stream.test_sets)):
        if not parts:
            raise bad_argument(f"stream.{name}", "no task", "pass a stream of one task or more")
        for task, part in enumerate(parts):
            if not len(part.rows):
                raise bad_argument(f"stream.{name}[{task}]", "no examples", "leave the task out or give it examples")
