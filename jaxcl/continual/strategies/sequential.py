"""Strategies that keep nothing of the past: what the others are compared with."""

from jaxcl.continual.strategies.contract import (
    Apply,
    Batch,
    Metrics,
    Strategy,
    cross_entropy,
    gradients_of,
    predict_by,
)
from jaxcl.typing import Array, Key, PyTree, check_between


def naive(apply: Apply, *, label_smoothing: float = 0.0) -> Strategy:
    """Sequential fine-tuning: each batch's gradient and nothing else, the floor that other methods are compared with.

    On `streams.joint` it is joint training, the ceiling.

    Args:
        apply: (params, inputs [B, ...]) -> logits [B, K].
        label_smoothing: see `cross_entropy`.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)

    def loss(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        return cross_entropy(apply(params, batch.inputs), batch, label_smoothing=label_smoothing)

    return Strategy(gradients_of(loss), predict_by(apply))


def linear_probe(*, label_smoothing: float = 0.0) -> Strategy:
    """One linear layer on frozen features, trained in turn: params ``{"kernel": [D, K], "bias": [K]}``, inputs [B, D].

    The problem is convex, so zeros are the usual start. `label_smoothing` as in `cross_entropy`.
    """

    def apply(params: PyTree, features: Array) -> Array:
        logits: Array = features.reshape(len(features), -1) @ params["kernel"] + params["bias"]
        return logits

    return naive(apply, label_smoothing=label_smoothing)
