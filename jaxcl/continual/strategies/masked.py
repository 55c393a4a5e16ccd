"""A sub-network a task in training: weights and masks learn together, and what a task keeps is forgotten never."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.continual.strategies.contract import Apply, Batch, Metrics, Strategy, cross_entropy, gradients_of
from jaxcl.masks import Masked, MaskMethod, refresh_ratios
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least, check_between

Features = Callable[[PyTree, Array], Mapping[str, Array]]
# (params, inputs [B, ...]) -> by path of a masked leaf, what its layer makes of them, [B, ..., channels]


class MaskedTasks(NamedTuple):
    """What the mask method knows, and how many tasks it has committed."""

    of_method: PyTree
    committed: Array  # [] int32


def masked_network(
    method: MaskMethod,
    apply: Apply,
    *,
    penalty_weight: float = 0.0,
    features: Features | None = None,
    refresh_every: int = 0,
    label_smoothing: float = 0.0,
) -> Strategy:
    """Each task trains and keeps a sub-network of its own, by a method of `masks`; params are `masks.Masked`.

    They begin as ``method.init(key, network's parameters)[0]``; the optimizer is best `masks.separate_rates`. The task
    must be told at test time: a stream by domain takes ``stream._replace(task_known=True)``. Tasks that are not yet
    committed are answered by the network as training has it.

    Args:
        method: `masks.ib_masks`, `masks.winning_subnetwork` or `masks.packnet`, for as many tasks as the stream has.
        apply: (params, inputs [B, ...]) -> logits [B, K] of the network.
        penalty_weight: what the method's penalty in nats, over the batch's examples, counts in the loss; IBM's authors
            have 1e-3.
        features: for `masks.ib_masks`, what each masked layer makes of a batch: see `masks.refresh_ratios`.
        refresh_every: steps of a task from one measurement of the ratios to the next; 0 never measures.
        label_smoothing: see `cross_entropy`.

    Raises:
        ValueError: an option out of range; in use, a task that is not told.
    """
    check_at_least("penalty_weight", penalty_weight, 0)
    check_at_least("refresh_every", refresh_every, 0)
    check_between("label_smoothing", label_smoothing, 0, 1)
    if bool(refresh_every) != (features is not None):
        raise bad_argument("refresh_every", refresh_every, "pass features and 1 or more, or leave both out")

    def init(key: Key, params: Masked, batch: Batch) -> MaskedTasks:
        _, state = method.init(key, params.weights)
        return MaskedTasks(state, jnp.int32(0))

    def loss(key: Key, params: Masked, state: MaskedTasks, batch: Batch) -> tuple[Array, Metrics]:
        sampled, nats = method.sample(key, params, state.of_method)
        value, metrics = cross_entropy(apply(sampled, batch.inputs), batch, label_smoothing=label_smoothing)
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
        return params, state._replace(of_method=refresh_ratios(state.of_method, hidden))

    def end_task(key: Key, params: Masked, state: MaskedTasks) -> tuple[Masked, MaskedTasks]:
        params, of_method = method.commit(key, params, state.of_method, state.committed)
        return params, MaskedTasks(of_method, state.committed + 1)

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

    return Strategy(
        gradients_of(loss), predict, init, after_update=after_update, refresh=refresh, end_task=end_task,
        refresh_every=refresh_every,
    )  # fmt: skip
