"""The compiled programs of a run: each a pure function of keys, states and tables, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcl.continual.strategies import Batch, Metrics, Strategy
from jaxcl.continual.streams import Examples, View
from jaxcl.trees import apply_updates
from jaxcl.typing import Array, ArrayLike, Key, PyTree


class LoopState(NamedTuple):
    """Everything that changes while training."""

    params: PyTree
    opt_state: PyTree
    strategy_state: PyTree
    step: Array  # [] int32, steps taken since the run began
    totals: Metrics  # each [] float32, sums over the examples of this epoch
    examples: Array  # [] float32, how many those are


class Order(NamedTuple):
    """Batches of row numbers; P, their number, is the same for every task of a stream."""

    rows: ArrayLike  # [P, B] int32; -1 fills up
    tasks: ArrayLike  # [P, B] int32, the task each example is seen as


class Table(NamedTuple):
    """What batches are made from, on the device."""

    examples: Examples  # [N, ...], [N]
    eligible: Array  # [T, K] bool
    view_table: PyTree


class Programs(NamedTuple):
    """Jitted functions; their names here are what compilations are counted under. States are consumed.

    `key` is the run's, the same in every call: each program derives its own from it, the stage and the step.
    """

    start: Callable[..., LoopState]  # (key, params, table, order) -> state
    begin_task: Callable[..., LoopState] | None  # (key, state, stage) -> state
    train: Callable[..., LoopState]  # (key, state, table, order, stage, position, count) -> state
    refresh: Callable[..., LoopState] | None  # (key, state, table, order, stage) -> state
    end_task: Callable[..., LoopState] | None  # (key, state, table, order, stage) -> state
    evaluate: Callable[..., Array]  # (state, table, order, task, position) -> [] int32, right answers


def compile_programs(
    strategy: Strategy,
    tx: optax.GradientTransformation,
    view: View,
    *,
    steps_per_call: int,
    task_known: bool,
    seed_axes: PyTree,
) -> Programs:
    """The programs of a strategy; those for which it does nothing are None.

    Args:
        strategy: the method.
        tx: the optimizer.
        view: how inputs are seen in each task.
        steps_per_call: at most so many steps in one call of `train`.
        task_known: whether `predict` is told the task.
        seed_axes: None for one seed. For seeds trained together, a `Table` of 0 for what has a leading seed axis and
            None for what is shared; keys, states, orders and rows then have one too.
    """

    def gather(table: Table, rows: Array, tasks: Array, stage: Array) -> Batch:
        real = rows >= 0
        rows = jnp.where(real, rows, 0)
        inputs = view(table.view_table, table.examples.inputs[rows], tasks)
        weights = real.astype(jnp.float32)
        return Batch(inputs, table.examples.labels[rows], weights, table.eligible[tasks], stage)

    def start(key: Key, params: PyTree, table: Table, order: Order) -> LoopState:
        strategy_state = strategy.init(_derive(key, 0), params)
        batch = gather(table, order.rows[0], order.tasks[0], jnp.int32(0))
        _, metrics = jax.eval_shape(strategy.gradients, key, params, strategy_state, batch)
        totals = {name: jnp.float32(0) for name in metrics}
        state = LoopState(params, tx.init(params), strategy_state, jnp.int32(0), totals, jnp.float32(0))
        # A Python scalar among the leaves has a weak type, which the first step would firm up: a second compilation.
        return jax.tree.map(lambda leaf: lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), state)

    def step(key: Key, state: LoopState, batch: Batch) -> LoopState:
        gradients_key, update_key = jax.random.split(_derive(key, 1, state.step))
        params, strategy_state = state.params, state.strategy_state
        grads, metrics = strategy.gradients(gradients_key, params, strategy_state, batch)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        updates, strategy_state = strategy.after_update(update_key, params, strategy_state, batch, grads, updates)
        params = apply_updates(params, updates)
        examples = batch.weights.sum()
        totals = {name: total + metrics[name] * examples for name, total in state.totals.items()}
        after = LoopState(params, opt_state, strategy_state, state.step + 1, totals, state.examples + examples)
        if seed_axes is None:
            return after
        # Seeds trained together may have fewer batches than the longest: then nothing happens.
        return jax.tree.map(lambda new, old: jnp.where(examples > 0, new, old), after, state)

    def train(
        key: Key, state: LoopState, table: Table, order: Order, stage: Array, position: Array, count: Array
    ) -> LoopState:
        zero = jax.tree.map(lambda total: jnp.where(position == 0, 0, total), (state.totals, state.examples))
        state = state._replace(totals=zero[0], examples=zero[1])

        def at(position: Array, state: LoopState) -> LoopState:
            return step(key, state, gather(table, order.rows[position], order.tasks[position], stage))

        if steps_per_call == 1:
            return at(position, state)
        return lax.fori_loop(position, position + count, at, state)

    def visit(member: str, purpose: int) -> Callable[..., LoopState]:
        def program(key: Key, state: LoopState, table: Table, order: Order, stage: Array) -> LoopState:
            batches = jax.vmap(lambda rows, tasks: gather(table, rows, tasks, stage))(order.rows, order.tasks)
            key = _derive(key, purpose, stage, state.step)
            params, strategy_state = getattr(strategy, member)(key, state.params, state.strategy_state, batches)
            return state._replace(params=params, strategy_state=strategy_state)

        return program

    def begin_task(key: Key, state: LoopState, stage: Array) -> LoopState:
        params, strategy_state = strategy.begin_task(_derive(key, 2, stage), state.params, state.strategy_state, stage)
        return state._replace(params=params, strategy_state=strategy_state)

    def evaluate(state: LoopState, table: Table, order: Order, task: Array, position: Array) -> Array:
        batch = gather(table, order.rows[position], order.tasks[position], task)
        logits = strategy.predict(state.params, state.strategy_state, batch.inputs, task if task_known else None)
        answers = jnp.argmax(jnp.where(batch.eligible, logits, -jnp.inf), axis=-1)
        return jnp.sum((answers == batch.labels) & (batch.weights > 0), dtype=jnp.int32)

    def compiled(program: Callable[..., Any], *axes: PyTree, consumes: tuple[int, ...] = (1,)) -> Any:
        together = program if seed_axes is None else jax.vmap(program, in_axes=axes)
        together.__name__ = program.__name__
        return jax.jit(together, donate_argnums=consumes)

    def visiting(member: str, purpose: int) -> Any:
        if getattr(strategy, member) is Strategy._field_defaults[member]:
            return None
        program = visit(member, purpose)
        program.__name__ = member
        return compiled(program, 0, 0, seed_axes, 0, None)

    begins = strategy.begin_task is not Strategy._field_defaults["begin_task"]
    return Programs(
        start=compiled(start, 0, 0, seed_axes, 0, consumes=()),
        begin_task=compiled(begin_task, 0, 0, None) if begins else None,
        train=compiled(train, 0, 0, seed_axes, 0, None, None, None),
        refresh=visiting("refresh", 3) if strategy.refresh_every else None,
        end_task=visiting("end_task", 4),
        evaluate=compiled(evaluate, 0, seed_axes, 0, None, None, consumes=()),
    )


def _derive(key: Key, *numbers: Array | int) -> Key:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
