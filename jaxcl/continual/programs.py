"""The compiled programs of a run: each a pure function of keys, states and tables, compiled once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcl.continual.sharding import Layout
from jaxcl.continual.strategies import Batch, Metrics, Strategy, does_nothing
from jaxcl.continual.strategies.contract import check_outputs
from jaxcl.continual.streams import Augment, Pipeline
from jaxcl.trees import apply_updates
from jaxcl.typing import Array, ArrayLike, Key, PyTree


class LoopState(NamedTuple):
    """Everything that changes while training."""

    params: PyTree
    opt_state: PyTree
    strategy_state: PyTree
    step: Array  # [] int32, steps taken since the run began
    totals: Metrics  # each [] float32, sums over the examples of this epoch


class Tables(NamedTuple):
    """What the tasks are, on the device."""

    eligible: Array  # [T, K] bool, when a task is tested
    trained: Array  # [T, K] bool, in its training steps
    view_table: PyTree


class Resident(NamedTuple):
    """All examples on the device, and which of them each of P batches has."""

    inputs: ArrayLike  # [N, ...]
    labels: ArrayLike  # [N]
    rows: ArrayLike  # [P, B] int32; where an example only fills up, the bits of its row inverted, so below 0
    tasks: ArrayLike  # [P, B] int32, the task each example is seen as

    def take(self, position: Array) -> tuple[Array, Array, Array, Array]:
        """Inputs [B, ...], labels [B], tasks [B] and weights [B] of the batch at `position`."""
        rows, tasks = jnp.asarray(self.rows)[position], jnp.asarray(self.tasks)[position]
        real = rows >= 0
        rows = jnp.where(real, rows, ~rows)
        return jnp.asarray(self.inputs)[rows], jnp.asarray(self.labels)[rows], tasks, real.astype(jnp.float32)


class Streamed(NamedTuple):
    """A few batches at a time, read by the host; P of them from batch `first` of the epoch on."""

    inputs: ArrayLike  # [P, B, ...]
    labels: ArrayLike  # [P, B]
    tasks: ArrayLike  # [P, B] int32
    weights: ArrayLike  # [P, B] float32, 0 for what fills up
    first: ArrayLike  # [] int32

    def take(self, position: Array) -> tuple[Array, ...]:
        """Inputs [B, ...], labels, tasks and weights, as `Resident.take`."""
        leaves = self.inputs, self.labels, self.tasks, self.weights
        return tuple(lax.dynamic_index_in_dim(leaf, position - self.first, keepdims=False) for leaf in leaves)


class Programs(NamedTuple):
    """Jitted functions; their names here are what compilations are counted under. States are consumed.

    `key` is the run's, the same in every call: each program derives its own from it, the stage and the step.
    `source` is a `Resident` or a `Streamed`; positions count an epoch's batches.
    """

    start: Callable[..., LoopState]  # (key, params, tables, source) -> state; its first batch is there for the shapes
    begin_task: Callable[..., LoopState] | None  # (key, state, stage) -> state
    train: Callable[..., LoopState]  # (key, state, tables, source, stage, position, count) -> state
    refresh: Callable[..., LoopState] | None  # (key, state, tables, source, stage, position) -> state
    observe: Callable[..., LoopState] | None  # (key, state, tables, source, stage, position, count) -> state
    end_task: Callable[..., LoopState] | None  # (key, state, stage) -> state
    evaluate: Callable[..., Array]  # (state, tables, source, position, count) -> [T] int32, right answers of each task


@functools.lru_cache(maxsize=8)
def compile_programs(
    strategy: Strategy,
    tx: optax.GradientTransformation,
    pipeline: Pipeline,
    *,
    steps_per_call: int,
    layout: Layout,
    together: bool,
    shared: bool,
) -> Programs:
    """The programs of a strategy; those for which it does nothing are None.

    The same arguments give the same programs again, so that a second run compiles nothing.

    Args:
        strategy: the method.
        tx: the optimizer.
        pipeline: of the streams that the programs are for.
        steps_per_call: at most so many steps in one call of `train` and `observe`, and batches in one of `evaluate`.
        layout: how state and batches lie on the devices.
        together: whether there are several seeds: keys, states, tables and sources then have a leading seed axis.
        shared: whether inputs and labels in sources nevertheless have not, being the same for all seeds.
    """
    gather = _gather(pipeline, layout)

    def start(key: Key, params: PyTree, tables: Tables, source: Resident | Streamed) -> LoopState:
        batch = gather(tables, source, jnp.int32(0), jnp.int32(0))
        strategy_state = strategy.init(_derive(key, 0), params, batch)
        _, metrics = jax.eval_shape(strategy.gradients, key, params, strategy_state, batch)
        totals = {name: jnp.float32(0) for name in metrics}
        return _firm(LoopState(params, tx.init(params), strategy_state, jnp.int32(0), totals))

    step = _training_step(strategy, tx, pipeline.augment)

    def step_if_any(key: Key, state: LoopState, batch: Batch) -> LoopState:
        return _where(batch.weights.sum() > 0, step(key, state, batch), state)

    axes = Resident._make((None, None, 0, 0) if shared else (0, 0, 0, 0))

    def for_each_seed(function: Callable[..., Any], *axes: PyTree) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=axes) if together else function

    gather_each = for_each_seed(gather, 0, axes, None, None)

    def repeat(
        at: Callable[[Array, LoopState], LoopState], state: LoopState, position: Array, count: Array
    ) -> LoopState:
        if steps_per_call > 1:
            return lax.fori_loop(position, position + count, at, state)
        return lax.cond(count > 0, at, lambda _, state: state, position, state) if together else at(position, state)

    def train(
        key: Key,
        state: LoopState,
        tables: Tables,
        source: Any,  # a `Resident` or a `Streamed`; together, a `Resident`
        stage: Array,
        position: Array,
        count: Array,
    ) -> LoopState:
        state = state._replace(totals=jax.tree.map(lambda total: jnp.where(position == 0, 0, total), state.totals))

        def at(step: Callable[..., LoopState]) -> Callable[[Array, LoopState], LoopState]:
            return lambda position, state: step(key, state, gather_each(tables, source, position, stage))

        if not together:
            return repeat(at(step), state, position, count)
        # The last batches of an epoch may be only some seeds', and nothing happens to the others. To choose between
        # old and new state costs a pass over it all, so those come in a loop of their own.
        of_all = jnp.all(jnp.asarray(source.rows)[:, :, 0] >= 0, axis=0).sum(dtype=jnp.int32)
        first = jnp.clip(of_all - position, 0, count)
        state = repeat(at(jax.vmap(step)), state, position, first)
        return repeat(at(jax.vmap(step_if_any)), state, position + first, count - first)

    def observe(
        key: Key,
        state: LoopState,
        tables: Tables,
        source: Resident | Streamed,
        stage: Array,
        position: Array,
        count: Array,
    ) -> LoopState:
        def at(position: Array, state: LoopState) -> LoopState:
            batch, before = gather(tables, source, position, stage), state.strategy_state
            seen = strategy.observe(_derive(key, 4, stage, position), state.params, before, batch)
            if together:  # a seed may have fewer batches than another
                seen = _where(batch.weights.sum() > 0, seen, before)
            return state._replace(strategy_state=seen)

        return repeat(at, state, position, count)

    def refresh(
        key: Key, state: LoopState, tables: Tables, source: Resident | Streamed, stage: Array, position: Array
    ) -> LoopState:
        batch = gather(tables, source, position, stage)
        key = _derive(key, 3, state.step)
        params, strategy_state = strategy.refresh(key, state.params, state.strategy_state, batch)
        return state._replace(params=params, strategy_state=strategy_state)

    def begin_task(key: Key, state: LoopState, stage: Array) -> LoopState:
        params, strategy_state = strategy.begin_task(_derive(key, 2, stage), state.params, state.strategy_state, stage)
        opt_state = tx.init(params) if strategy.fresh_optimizer else state.opt_state
        return _firm(state._replace(params=params, opt_state=opt_state, strategy_state=strategy_state))

    def end_task(key: Key, state: LoopState, stage: Array) -> LoopState:
        params, strategy_state = strategy.end_task(_derive(key, 5, stage), state.params, state.strategy_state)
        return state._replace(params=params, strategy_state=strategy_state)

    def evaluate(state: LoopState, tables: Tables, source: Resident | Streamed, position: Array, count: Array) -> Array:
        def at(position: Array, right: Array) -> Array:
            task = source.take(position)[2][0]  # the same for all of a batch
            batch = gather(tables, source, position, task)
            told = task if pipeline.task_known else None
            logits = strategy.predict(state.params, state.strategy_state, batch.inputs, told)
            check_outputs(logits, tables.eligible.shape[1])
            answers = jnp.argmax(jnp.where(tables.eligible[task], logits, -jnp.inf), axis=-1)
            return right.at[task].add(jnp.sum((answers == batch.labels) & (batch.weights > 0), dtype=jnp.int32))

        none = jnp.zeros(len(tables.eligible), jnp.int32)
        return lax.fori_loop(position, position + count, at, none) if steps_per_call > 1 else at(position, none)

    def compiled(program: Callable[..., Any], name: str, *, consumes: tuple[int, ...] = (1,)) -> Any:
        def laid_out(*arguments: Any) -> Any:
            return layout.split_state(program(*arguments))

        laid_out.__name__ = name
        return jax.jit(laid_out, donate_argnums=consumes)

    def compiled_if(member: str, program: Callable[..., Any], *axes: PyTree) -> Any:
        idle = does_nothing(strategy, member) and not (member == "begin_task" and strategy.fresh_optimizer)
        return None if idle else compiled(for_each_seed(program, *axes), member)

    return Programs(
        start=compiled(for_each_seed(start, 0, 0, 0, axes), "start", consumes=()),
        begin_task=compiled_if("begin_task", begin_task, 0, 0, None),
        train=compiled(train, "train"),
        refresh=compiled_if("refresh", refresh, 0, 0, 0, axes, None, None) if strategy.refresh_every else None,
        observe=compiled_if("observe", observe, 0, 0, 0, axes, None, None, None),
        end_task=compiled_if("end_task", end_task, 0, 0, None),
        evaluate=compiled(for_each_seed(evaluate, 0, 0, axes, None, None), "evaluate", consumes=()),
    )


def _gather(pipeline: Pipeline, layout: Layout) -> Callable[..., Batch]:
    """(tables, source, position, stage) -> the batch there, as its tasks show it."""

    def gather(tables: Tables, source: Resident | Streamed, position: Array, stage: Array) -> Batch:
        inputs, labels, tasks, weights = layout.split_batch(source.take(position))
        if pipeline.prepare:
            inputs = pipeline.prepare(inputs)
        inputs = pipeline.view(tables.view_table, inputs, tasks)
        return Batch(inputs, labels, weights, tables.trained[tasks], stage)

    return gather


def _training_step(
    strategy: Strategy, tx: optax.GradientTransformation, augment: Augment | None
) -> Callable[[Key, LoopState, Batch], LoopState]:
    """Batch -> gradients -> optimizer -> after_update -> parameters."""

    def step(key: Key, state: LoopState, batch: Batch) -> LoopState:
        gradients_key, update_key, augment_key = jax.random.split(_derive(key, 1, state.step), 3)
        if augment:
            batch = batch._replace(inputs=augment(augment_key, batch.inputs))
        params, strategy_state = state.params, state.strategy_state
        grads, metrics = strategy.gradients(gradients_key, params, strategy_state, batch)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        updates, strategy_state = strategy.after_update(update_key, params, strategy_state, batch, grads, updates)
        params = apply_updates(params, updates)
        examples = batch.weights.sum()
        totals = {name: total + jnp.float32(metrics[name]) * examples for name, total in state.totals.items()}
        return LoopState(params, opt_state, strategy_state, state.step + 1, totals)

    return step


def _firm(state: LoopState) -> LoopState:
    """The state without weak types, as Python scalars have: the first step would firm them up, and compile again."""
    return jax.tree.map(lambda leaf: lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), state)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _derive(key: Key, *numbers: Array | int) -> Key:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
