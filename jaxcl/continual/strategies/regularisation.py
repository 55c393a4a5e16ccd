"""Strategies that hold on to the past by a penalty: on moving weights that mattered, or on changing old answers."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.continual.strategies.contract import (
    Apply,
    Batch,
    Metrics,
    Strategy,
    cross_entropy,
    eligible_logits,
    gradients_of,
    predict_by,
)
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_between, check_choice, check_count

Labels = Literal["model", "data"]
Leaves = tuple[Array, Array, Array, Array]  # of a `Batch`, without the task


class QuadraticState(NamedTuple):
    """A quadratic penalty on leaving `anchor`, and the Fisher information gathered for the next one."""

    anchor: PyTree  # like params but in float32, as are all here
    importance: PyTree  # like params, not negative
    squares: PyTree  # like params, sums of squared gradients over the examples observed since the task began
    examples: Array  # [] float32, how many those are


def ewc(apply: Apply, *, strength: float, labels: Labels = "model", examples_at_a_time: int | None = None) -> Strategy:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3): a quadratic penalty for each earlier task.

    The penalty is `strength / 2 * sum over tasks t of F_t (w - w_t)^2`, F_t the diagonal Fisher information at w_t,
    the mean over the task's examples of each example's own squared gradient. Sums of quadratics are quadratic: the
    state holds the sum of the F_t and the mean of the w_t weighted by it, so that its size does not grow with the
    tasks. That differs from the sum over tasks by a constant only.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K]; examples must not affect each other's logits.
        strength: lambda.
        labels: whose gradient the Fisher information squares: a label drawn from the model's own prediction (the
            definition), or the label in the data ("empirical", as most codebases have it).
        examples_at_a_time: see `squared_gradients`.
    """

    def consolidate(state: QuadraticState, params: PyTree, fisher: PyTree) -> tuple[PyTree, PyTree]:
        importance = jax.tree.map(jnp.add, state.importance, fisher)

        def between(param: Array, anchor: Array, old: Array, total: Array) -> Array:
            return param + jnp.where(total > 0, old / jnp.where(total > 0, total, 1), 0) * (anchor - param)

        params = _float32(params)
        return jax.tree.map(between, params, state.anchor, state.importance, importance), importance

    return _fisher_penalty(apply, strength, labels, examples_at_a_time, consolidate)


def online_ewc(
    apply: Apply,
    *,
    strength: float,
    decay: float = 1.0,
    labels: Labels = "model",
    examples_at_a_time: int | None = None,
) -> Strategy:
    """Online EWC (Schwarz et al. 2018, eq. 9): one penalty about the latest parameters, whose Fisher fades.

    The penalty is `strength / 2 * F (w - w_last)^2`; after each task `F = decay * F + F_task`. The paper's penalty has
    `decay * F` in place of F, which scales `strength`.

    Args:
        apply: as in `ewc`.
        strength: lambda.
        decay: gamma, from 0 to 1.
        labels: as in `ewc`.
        examples_at_a_time: as in `ewc`.
    """
    check_between("decay", decay, 0, 1)

    def consolidate(state: QuadraticState, params: PyTree, fisher: PyTree) -> tuple[PyTree, PyTree]:
        return _float32(params), jax.tree.map(lambda old, new: decay * old + new, state.importance, fisher)

    return _fisher_penalty(apply, strength, labels, examples_at_a_time, consolidate)


def _fisher_penalty(
    apply: Apply,
    strength: float,
    labels: Labels,
    examples_at_a_time: int | None,
    consolidate: Callable[[QuadraticState, PyTree, PyTree], tuple[PyTree, PyTree]],
) -> Strategy:
    """EWC with a rule (state, params, fisher) -> (anchor, importance) for the end of a task."""
    check_at_least("strength", strength, 0)
    check_choice("labels", labels, ("model", "data"))
    if examples_at_a_time is not None:
        check_count("examples_at_a_time", examples_at_a_time, 1)

    def init(key: Key, params: PyTree, batch: Batch) -> QuadraticState:
        return QuadraticState(_float32(params), _zeros(params), _zeros(params), jnp.float32(0))

    def loss(key: Key, params: PyTree, state: QuadraticState, batch: Batch) -> tuple[Array, Metrics]:
        value, metrics = cross_entropy(apply(params, batch.inputs), batch)
        penalty = strength / 2 * _distance(params, state.anchor, state.importance)
        return value + penalty, metrics | {"penalty": penalty}

    def observe(key: Key, params: PyTree, state: QuadraticState, batch: Batch) -> QuadraticState:
        if labels == "model":
            batch = batch._replace(
                labels=jax.random.categorical(key, eligible_logits(apply(params, batch.inputs), batch))
            )
        squares = squared_gradients(
            lambda params, batch: cross_entropy(apply(params, batch.inputs), batch)[0],
            params,
            batch,
            examples_at_a_time=examples_at_a_time,
        )
        squares = jax.tree.map(jnp.add, state.squares, squares)
        return state._replace(squares=squares, examples=state.examples + batch.weights.sum())

    def end_task(key: Key, params: PyTree, state: QuadraticState) -> tuple[PyTree, QuadraticState]:
        fisher = jax.tree.map(lambda total: total / state.examples, state.squares)
        anchor, importance = consolidate(state, params, fisher)
        return params, QuadraticState(anchor, importance, _zeros(params), jnp.float32(0))

    return Strategy(gradients_of(loss), predict_by(apply), init, observe=observe, end_task=end_task)


def squared_gradients(
    loss: Callable[[PyTree, Batch], Array], params: PyTree, batch: Batch, *, examples_at_a_time: int | None = None
) -> PyTree:
    """Sum over a batch of the squares of each example's own gradient, like params but in float32.

    Examples count by their weights.

    Args:
        loss: (params, batch of one example, leaves [1, ...]) -> scalar.
        params: where the gradients are taken.
        batch: leaves [B, ...] but for the task.
        examples_at_a_time: how many gradients are held at once, at most. None takes what suits the platform that the
            program is compiled for: 1 on CPU, where the sum over several is slow, 16 elsewhere.
    """

    def squares(params: PyTree, example: Leaves) -> PyTree:
        inputs, label, weight, eligible = example
        alone = Batch(inputs[None], label[None], jnp.ones(1), eligible[None], batch.task)
        gradient = _float32(jax.grad(loss)(params, alone))
        return jax.tree.map(lambda leaf: weight * jnp.square(leaf), gradient)

    def one_by_one(params: PyTree, leaves: Leaves) -> PyTree:
        def add(total: PyTree, example: Leaves) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, squares(params, example)), None

        return lax.scan(add, _zeros(params), leaves, unroll=4)[0]

    def several(params: PyTree, leaves: Leaves, *, at_a_time: int) -> PyTree:
        count = len(batch.labels)
        width = next(width for width in range(min(at_a_time, count), 0, -1) if count % width == 0)

        # Parts take every (B / width)-th example, so that an axis split over devices stays split within a part.
        def split(leaf: Array) -> Array:
            return jnp.moveaxis(leaf.reshape(width, count // width, *leaf.shape[1:]), 1, 0)

        def add(total: PyTree, examples: Leaves) -> tuple[PyTree, None]:
            each = jax.vmap(squares, in_axes=(None, 0))(params, examples)
            return jax.tree.map(lambda total, leaf: total + leaf.sum(axis=0), total, each), None

        return lax.scan(add, _zeros(params), jax.tree.map(split, leaves))[0]

    leaves = batch.inputs, batch.labels, batch.weights, batch.eligible
    if examples_at_a_time == 1:
        return one_by_one(params, leaves)
    if examples_at_a_time is not None:
        return several(params, leaves, at_a_time=examples_at_a_time)
    return lax.platform_dependent(params, leaves, cpu=one_by_one, default=functools.partial(several, at_a_time=16))


class PathState(NamedTuple):
    """What synaptic intelligence remembers."""

    anchor: PyTree  # like params, as they were when the task began; in float32, as are all here
    importance: PyTree  # like params, not negative
    path: PyTree  # like params, by how much moving it has lowered the loss since the task began


def si(apply: Apply, *, strength: float, damping: float = 1e-3) -> Strategy:
    """Synaptic intelligence (Zenke et al. 2017): weights whose path lowered the loss are held.

    While training, `path -= gradient of the task's own loss * update`; after each task
    `importance += path / ((w - anchor)^2 + damping)` and the anchor moves to w. The penalty is
    `strength * importance * (w - anchor)^2`. Importance is cut at zero, as in the authors' code but not in the paper's
    equation 5: it would otherwise reward leaving the anchor.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        strength: c.
        damping: xi.
    """
    check_at_least("strength", strength, 0)
    check_at_least("damping", damping, 1e-12)  # at 0 a weight that never moves would have importance 0 / 0

    def init(key: Key, params: PyTree, batch: Batch) -> PathState:
        return PathState(_float32(params), _zeros(params), _zeros(params))

    def loss(key: Key, params: PyTree, state: PathState, batch: Batch) -> tuple[Array, Metrics]:
        value, metrics = cross_entropy(apply(params, batch.inputs), batch)
        penalty = strength * _distance(params, state.anchor, state.importance)
        return value + penalty, metrics | {"penalty": penalty}

    def after_update(
        key: Key, params: PyTree, state: PathState, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, PathState]:
        def extend(path: Array, grad: Array, update: Array, param: Array, anchor: Array, importance: Array) -> Array:
            own = grad - 2 * strength * importance * (param - anchor)  # the penalty's gradient taken off again
            return (path - own * update).astype(path.dtype)

        path = jax.tree.map(extend, state.path, grads, updates, params, state.anchor, state.importance)
        return updates, state._replace(path=path)

    def end_task(key: Key, params: PyTree, state: PathState) -> tuple[PyTree, PathState]:
        def add(importance: Array, path: Array, param: Array, anchor: Array) -> Array:
            more = path / (jnp.square(param - anchor) + damping)
            return jnp.maximum(importance + more, 0).astype(importance.dtype)

        importance = jax.tree.map(add, state.importance, state.path, params, state.anchor)
        return params, PathState(_float32(params), importance, _zeros(params))

    return Strategy(gradients_of(loss), predict_by(apply), init, after_update=after_update, end_task=end_task)


class TeacherState(NamedTuple):
    """The network as it was when the task began, and the classes that it knew."""

    teacher: PyTree  # like params
    old: Array  # [K] bool, classes of earlier tasks
    seen: Array  # [K] bool, classes of earlier tasks and this one
    rivals: Array  # [K, K] bool: [k, l] is whether l was eligible in examples of class k


def lwf(apply: Apply, *, strength: float = 1.0, temperature: float = 2.0) -> Strategy:
    """Learning without forgetting (Li & Hoiem 2016): on new data, old classes keep the answers they had.

    The loss is cross entropy, plus `strength` times the cross entropy between the answers of the network as it was
    before the task and its answers now, both softened by the temperature, over the classes of earlier tasks: one
    softmax for each set of old classes that were eligible together, so one a task where the task is told, and one in
    all where it is not. As in the paper there is no factor of temperature squared.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        strength: lambda_o.
        temperature: T.
    """
    check_at_least("strength", strength, 0)
    check_between("temperature", temperature, 1e-3, 1e3)

    def init(key: Key, params: PyTree, batch: Batch) -> TeacherState:
        none = jnp.zeros(batch.eligible.shape[-1], bool)
        return TeacherState(params, none, none, none[:, None] & none)

    def begin_task(key: Key, params: PyTree, state: TeacherState, task: Array) -> tuple[PyTree, TeacherState]:
        return params, state._replace(teacher=params, old=state.seen)

    def loss(key: Key, params: PyTree, state: TeacherState, batch: Batch) -> tuple[Array, Metrics]:
        logits = apply(params, batch.inputs)
        value, metrics = cross_entropy(logits, batch)
        # Old classes that were eligible together form a group, which goes by the first of them.
        groups = jnp.where(state.old, jnp.argmax(state.rivals & state.old, axis=-1), len(state.old))
        was = _softened(apply(state.teacher, batch.inputs), groups, temperature)
        now = _softened(logits, groups, temperature)
        terms = jnp.where(state.old, jnp.exp(was) * now, 0).sum(axis=-1)
        distillation = -jnp.sum(terms * batch.weights) / jnp.maximum(batch.weights.sum(), 1)
        return value + strength * distillation, metrics | {"distillation": distillation}

    def after_update(
        key: Key, params: PyTree, state: TeacherState, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, TeacherState]:
        hits = jax.nn.one_hot(batch.labels, len(state.seen)) * batch.weights[:, None]
        rivals = hits.T @ batch.eligible.astype(jnp.float32) > 0
        return updates, state._replace(seen=state.seen | (hits.sum(axis=0) > 0), rivals=state.rivals | rivals)

    return Strategy(gradients_of(loss), predict_by(apply), init, begin_task, after_update)


def _softened(logits: Array, groups: Array, temperature: float) -> Array:
    """Log probabilities [B, K] of each class within its group, at a temperature; `groups` [K] is in [0, K]."""
    logits = logits.astype(jnp.float32).T / temperature  # [K, B]
    count = len(groups) + 1
    highest = lax.stop_gradient(jax.ops.segment_max(logits, groups, count))[groups]
    total = jax.ops.segment_sum(jnp.exp(logits - highest), groups, count)[groups]
    return (logits - highest - jnp.log(total)).T


def _float32(tree: PyTree) -> PyTree:
    """The tree in float32: sums over many examples, and differences of weights, need its digits."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, _float32(tree))


def _distance(params: PyTree, anchor: PyTree, importance: PyTree) -> Array:
    """Sum over all weights of importance times squared distance from the anchor."""

    def of_leaf(param: Array, anchor: Array, importance: Array) -> Array:
        return jnp.sum(importance * jnp.square(param - anchor))

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, params, anchor, importance)), jnp.float32(0))
