"""A sub-network a task in training: weights and masks learn together, and what a task keeps is forgotten never."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.continual.strategies.contract import Apply, Batch, Metrics, Strategy, cross_entropy, gradients_of
from jaxcl.masks import Masked, MaskMethod, refresh_ratios
from jaxcl.trees import replace_leaves
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least, check_between, check_count

Measure = Callable[[PyTree, Array], Mapping[str, Array]]  # (params, inputs [B, ...]) -> by path, what is there


class MaskedTasks(NamedTuple):
    """What the mask method knows, how many tasks it has committed, and what is measured for normalisation."""

    of_method: PyTree
    committed: Array  # [] int32
    statistics: dict[str, Array]  # by path, sums over the examples observed, [channels] each
    examples: Array  # [] float32, how many those are


def masked_network(
    method: MaskMethod,
    apply: Apply,
    *,
    training_apply: Apply | None = None,
    statistics: Measure | None = None,
    penalty_weight: float = 0.0,
    features: Measure | None = None,
    refresh_every: int = 0,
    label_smoothing: float = 0.0,
) -> Strategy:
    """Each task trains and keeps a sub-network of its own, by a method of `masks`; params are `masks.Masked`.

    They begin as ``method.init(key, network's parameters)[0]``; the optimizer, best `masks.separate_rates`, begins anew
    with each task. The task must be told at test time: a stream by domain takes ``stream._replace(task_known=True)``.
    Tasks that are not yet committed are answered by the network as it would be kept if its task ended now.

    Args:
        method: `masks.ib_masks`, `masks.winning_subnetwork` or `masks.packnet`, for the stream's tasks or more.
        apply: (params, inputs [B, ...]) -> logits [B, K] of the network.
        training_apply: the same in a training step, where batch normalisation takes its statistics from the batch; None
            takes `apply`.
        statistics: by path of a parameter, what a batch has for it, as `nets.batch_statistics` measures it: its mean
            over one more pass becomes that parameter at a task's end.
        penalty_weight: what the method's penalty in nats, over the batch's examples, counts in the loss; IBM's authors
            have 1e-3.
        features: for `masks.ib_masks`, by path what layers make of a batch, as `nets.layer_outputs` tells; those of
            leaves without a mask do not count.
        refresh_every: steps of a task from one measurement of the ratios to the next; 0 never measures.
        label_smoothing: see `cross_entropy`.

    Raises:
        ValueError: an option out of range; in use, a task that is not told.
    """
    check_at_least("penalty_weight", penalty_weight, 0)
    check_count("refresh_every", refresh_every, 0)
    check_between("label_smoothing", label_smoothing, 0, 1)
    if bool(refresh_every) != (features is not None):
        raise bad_argument("refresh_every", refresh_every, "pass features and 1 or more, or leave both out")

    def init(key: Key, params: Masked, batch: Batch) -> MaskedTasks:
        _, state = method.init(key, params.weights)
        measured = jax.eval_shape(statistics, params.weights, batch.inputs) if statistics else {}
        sums = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in measured.items()}
        return MaskedTasks(state, jnp.int32(0), sums, jnp.float32(0))

    def loss(key: Key, params: Masked, state: MaskedTasks, batch: Batch) -> tuple[Array, Metrics]:
        sampled, nats = method.sample(key, params, state.of_method)
        logits = (training_apply or apply)(sampled, batch.inputs)
        value, metrics = cross_entropy(logits, batch, label_smoothing=label_smoothing)
        penalty = penalty_weight * nats / jnp.maximum(batch.weights.sum(), 1)
        return value + penalty, metrics | {"penalty": penalty}

    def after_update(
        key: Key, params: Masked, state: MaskedTasks, batch: Batch, grads: PyTree, updates: Masked
    ) -> tuple[Masked, MaskedTasks]:
        updates, of_method = method.protect(params, updates, state.of_method)
        return updates, state._replace(of_method=of_method)

    def refresh(key: Key, params: Masked, state: MaskedTasks, batch: Batch) -> tuple[Masked, MaskedTasks]:
        assert features is not None  # or it would not be called
        hidden = features(method.current(params, state.of_method), batch.inputs)
        covered = {path: hidden[path] for path in method.bank(state.of_method).owner if path in hidden}
        return params, state._replace(of_method=refresh_ratios(state.of_method, covered))

    def observe(key: Key, params: Masked, state: MaskedTasks, batch: Batch) -> MaskedTasks:
        assert statistics is not None  # or it would not be called
        measured = statistics(method.current(params, state.of_method), batch.inputs)
        weight = batch.weights.sum()
        sums = {path: total + weight * measured[path] for path, total in state.statistics.items()}
        return state._replace(statistics=sums, examples=state.examples + weight)

    def end_task(key: Key, params: Masked, state: MaskedTasks) -> tuple[Masked, MaskedTasks]:
        means = {path: total / jnp.maximum(state.examples, 1) for path, total in state.statistics.items()}
        params = params._replace(weights=replace_leaves(params.weights, means))
        params, of_method = method.commit(key, params, state.of_method, state.committed)
        none = jax.tree.map(jnp.zeros_like, state.statistics)
        return params, MaskedTasks(of_method, state.committed + 1, none, jnp.zeros_like(state.examples))

    def predict(params: Masked, state: MaskedTasks, inputs: Array, task: Array | None) -> Array:
        if task is None:
            raise bad_argument("task", task, "masks go by task: pass a stream that tells it, task_known=True")
        return apply(
            lax.cond(
                task < state.committed,
                lambda: method.select(params, state.of_method, task),
                lambda: method.current(params, state.of_method),
            ),
            inputs,
        )

    strategy = Strategy(
        gradients_of(loss), predict, init, after_update=after_update, refresh=refresh, end_task=end_task,
        refresh_every=refresh_every, fresh_optimizer=True, tasks=method.tasks,
    )  # fmt: skip
    return strategy._replace(observe=observe) if statistics else strategy  # without it a pass would be for nothing
