"""Heads at test time for any strategy whose network has features: it trains as it does without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.continual.strategies.adapted import Features
from jaxcl.continual.strategies.contract import Batch, Metrics, Strategy
from jaxcl.nearest import normalise
from jaxcl.typing import Array, Key, PyTree, check_at_least


class Means(NamedTuple):
    """Means over examples, as sums until a task ends."""

    counts: Array  # [K]
    sums: Array  # [K, D]


class Answered(NamedTuple):
    """What `answered_by` keeps beside the strategy's own state."""

    of_strategy: PyTree
    of_classifier: PyTree

    @property
    def seen(self) -> Means:
        """Of tasks that are done."""
        counts, sums, _, origin = self.of_classifier.moments
        return Means(counts, sums + counts[:, None] * origin)


class ClassMeans(NamedTuple):
    """What `class_means` keeps beside the strategy's own state."""

    of_strategy: PyTree
    past: Means  # of tasks that are done, as sums over their examples
    present: Means  # of this task's, gathered in one more pass at its end
    before: PyTree  # parameters as this task began; () where drift is not made up for
    drift: Means  # by old class, how this task's examples near it have moved: weights, and weighted moves

    @property
    def seen(self) -> Means:
        """Of tasks that are done."""
        return self.past


def answered_by(classifier: Strategy, strategy: Strategy, features: Features) -> Strategy:
    """A strategy that answers, at test time, by a classifier in closed form of its features; it trains as before.

    The classifier sees features of unit length, of all of a task's examples in one more pass at its end, by the network
    of that time. No examples are kept, and what later tasks change of the network is not made up for.

    Args:
        classifier: `streaming_lda`, `nearest_class_mean` or `ridge_classifier`.
        strategy: any whose `predict` need not be told the task.
        features: (params, the strategy's state, inputs [B, ...]) -> features [B, D].
    """
    unit = _unit(features)

    def seen(params: PyTree, of_strategy: PyTree, batch: Batch) -> Batch:
        return batch._replace(inputs=unit(params, of_strategy, batch.inputs))

    def init(key: Key, params: PyTree, batch: Batch) -> Answered:
        of_strategy = strategy.init(key, params, batch)
        shape = jax.eval_shape(seen, params, of_strategy, batch).inputs
        return Answered(of_strategy, classifier.init(key, (), batch._replace(inputs=jnp.zeros(shape.shape))))

    def observe(key: Key, params: PyTree, state: Answered, batch: Batch) -> Answered:
        of_classifier = classifier.observe(key, (), state.of_classifier, seen(params, state.of_strategy, batch))
        return Answered(strategy.observe(key, params, state.of_strategy, batch), of_classifier)

    def end_task(key: Key, params: PyTree, state: Answered) -> tuple[PyTree, Answered]:
        params, of_strategy = strategy.end_task(key, params, state.of_strategy)
        return params, Answered(of_strategy, classifier.end_task(key, (), state.of_classifier)[1])

    def predict(params: PyTree, state: Answered, inputs: Array, task: Array | None) -> Array:
        return classifier.predict((), state.of_classifier, unit(params, state.of_strategy, inputs), task)

    return _around(strategy)._replace(init=init, observe=observe, end_task=end_task, predict=predict)


def class_means(strategy: Strategy, features: Features, *, drift_width: float | None = None) -> Strategy:
    """A strategy that answers, at test time, with the class whose mean is nearest; it trains as before.

    Features and means are of unit length, so that it is the class of the largest cosine. Means are those of all the
    class's examples as they were seen, in one more pass over a task at its end, by the network of that time. What later
    tasks change of the network can be made up for: a class's mean moves as this task's examples do that lie near it
    (semantic drift compensation, Yu et al. 2020, arXiv 2004.00440, equations 8 to 10). No examples are kept.

    Args:
        strategy: any whose `predict` need not be told the task.
        features: (params, the strategy's state, inputs [B, ...]) -> features [B, D].
        drift_width: standard deviation, in features of unit length, of how an example's weight falls with its distance
            from a mean; the paper has 0.3. None does not make up for drift.

    Raises:
        ValueError: a width that is not above 0.
    """
    if drift_width is not None:
        check_at_least("drift_width", drift_width, 1e-6)

    unit = _unit(features)

    def init(key: Key, params: PyTree, batch: Batch) -> ClassMeans:
        of_strategy = strategy.init(key, params, batch)
        width = jax.eval_shape(features, params, of_strategy, batch.inputs).shape[-1]
        none = Means(jnp.zeros(batch.eligible.shape[1]), jnp.zeros((batch.eligible.shape[1], width)))
        return ClassMeans(of_strategy, none, none, params if drift_width else (), none)

    def begin_task(key: Key, params: PyTree, state: ClassMeans, task: Array) -> tuple[PyTree, ClassMeans]:
        params, of_strategy = strategy.begin_task(key, params, state.of_strategy, task)
        return params, state._replace(of_strategy=of_strategy, before=params if drift_width else ())

    def observe(key: Key, params: PyTree, state: ClassMeans, batch: Batch) -> ClassMeans:
        now = unit(params, state.of_strategy, batch.inputs)
        members = jax.nn.one_hot(batch.labels, len(state.past.counts)) * batch.weights[:, None]  # [B, K]
        present = _add(state.present, members, now)
        drift = state.drift
        if drift_width:
            then = unit(state.before, state.of_strategy, batch.inputs)
            squares = 2 - 2 * then @ normalise(state.past.sums).T  # [B, K], of distances from the means
            near = jnp.exp(-squares / (2 * drift_width**2)) * batch.weights[:, None]
            drift = Means(drift.counts + near.sum(axis=0), drift.sums + near.T @ (now - then))
        of_strategy = strategy.observe(key, params, state.of_strategy, batch)
        return state._replace(of_strategy=of_strategy, present=present, drift=drift)

    def end_task(key: Key, params: PyTree, state: ClassMeans) -> tuple[PyTree, ClassMeans]:
        params, of_strategy = strategy.end_task(key, params, state.of_strategy)
        counts, sums = state.past
        if drift_width:
            means = normalise(sums) + state.drift.sums / jnp.maximum(state.drift.counts, 1e-12)[:, None]
            sums = jnp.linalg.norm(sums, axis=1, keepdims=True) * normalise(means)
        past = Means(counts + state.present.counts, sums + state.present.sums)
        none = jax.tree.map(jnp.zeros_like, past)
        return params, ClassMeans(of_strategy, past, none, state.before, none)

    def predict(params: PyTree, state: ClassMeans, inputs: Array, task: Array | None) -> Array:
        logits = unit(params, state.of_strategy, inputs) @ normalise(state.past.sums).T
        return jnp.where(state.past.counts > 0, logits, jnp.finfo(jnp.float32).min)

    return _around(strategy)._replace(
        init=init, begin_task=begin_task, observe=observe, end_task=end_task, predict=predict
    )  # fmt: skip


def against_means(strategy: Strategy, imprint: Callable[[PyTree, Array, Array], PyTree]) -> Strategy:
    """A strategy that trains each task's classes against those of earlier tasks too, which stand still as their means.

    A classifier of a task's own classes alone keeps them apart from each other, not from what came before. Here it has
    the means of earlier classes beside them. No examples are kept, so the network must hardly move the features of
    earlier inputs, or these go where the task's own are drawn: `adapters.oa_adapter` keeps off them.

    Args:
        strategy: what `class_means` or `answered_by` made.
        imprint: (params, means [K, D] of unit length, which [K] bool) -> params whose classifier has the means as the
            weights of the classes that `which` holds for.
    """

    def gradients(key: Key, params: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Metrics]:
        seen = state.seen
        earlier = (seen.counts > 0) & ~batch.eligible.any(axis=0)
        imprinted, back = jax.vjp(lambda params: imprint(params, normalise(seen.sums), earlier), params)
        grads, metrics = strategy.gradients(key, imprinted, state, batch._replace(eligible=batch.eligible | earlier))
        return back(grads)[0], metrics

    return strategy._replace(gradients=gradients)


def _unit(features: Features) -> Features:
    """The features scaled to unit length, in float32."""

    def unit(params: PyTree, state: PyTree, inputs: Array) -> Array:
        return normalise(features(params, state, inputs).astype(jnp.float32))

    return unit


def _around(strategy: Strategy) -> Strategy:
    """The strategy for a state that holds its own as `of_strategy`: what it does while a task is trained."""

    def gradients(key: Key, params: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Metrics]:
        return strategy.gradients(key, params, state.of_strategy, batch)

    def begin_task(key: Key, params: PyTree, state: Any, task: Array) -> tuple[PyTree, Any]:
        params, of_strategy = strategy.begin_task(key, params, state.of_strategy, task)
        return params, state._replace(of_strategy=of_strategy)

    def after_update(
        key: Key, params: PyTree, state: Any, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, Any]:
        updates, of_strategy = strategy.after_update(key, params, state.of_strategy, batch, grads, updates)
        return updates, state._replace(of_strategy=of_strategy)

    def refresh(key: Key, params: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Any]:
        params, of_strategy = strategy.refresh(key, params, state.of_strategy, batch)
        return params, state._replace(of_strategy=of_strategy)

    return strategy._replace(
        gradients=gradients, begin_task=begin_task, after_update=after_update, refresh=refresh
    )  # fmt: skip


def _add(means: Means, members: Array, features: Array) -> Means:
    """The sums with those of features [B, D], each of the classes in a row of [B, K]."""
    return Means(means.counts + members.sum(axis=0), means.sums + members.T @ features)
