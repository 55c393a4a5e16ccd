"""Adapters in training: a frozen network, an adapter a task, one head for all."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxcl.adapters import Adapter, LayerFunction, layer_function, second_moments
from jaxcl.continual.strategies.contract import Apply, Batch, Metrics, Strategy, cross_entropy, gradients_of
from jaxcl.typing import Array, Key, PyTree, check_between

Layers = Callable[[LayerFunction, Array], Array]
# (function, inputs [B, ...]) -> features [B, D] of a frozen network whose layers' outputs go through the function
Features = Callable[[PyTree, PyTree, Array], Array]  # (params, state, inputs [B, ...]) -> features [B, D]


class Adapted(NamedTuple):
    """What is trained; the network itself is not."""

    adapter: PyTree
    head: PyTree


def adapted_features(method: Adapter, layers: Layers) -> Features:
    """Features [B, D] of a frozen network under the adapter in `Adapted` params, given the method's state.

    A method without a state, as `adapters.lora`, is trained by any strategy: its `Apply` is
    ``lambda params, inputs: head(params.head, features(params, (), inputs))``.
    """

    def features(params: Adapted, state: PyTree, inputs: Array) -> Array:
        return layers(layer_function(method.changes(params.adapter, state), method.placement), inputs)

    return features


def adapted_network(
    method: Adapter,
    network: PyTree,
    layers: Layers,
    head: Apply,
    *,
    token_weights: Callable[[Array], Array] | None = None,
    label_smoothing: float = 0.0,
) -> Strategy:
    """A frozen network with an adapter a task, by a method of `adapters`, and one head for all; params are `Adapted`.

    They begin as ``Adapted(method.init(key, network)[0], head's parameters)``; the optimizer begins anew with each
    task. No task need be told. The strategy's state is the method's.

    Args:
        method: `adapters.oa_adapter`, `adapters.o_lora` or `adapters.incremental_lora`, for the stream's tasks or more.
        network: its parameters, or their shapes.
        layers: (function, inputs [B, ...]) -> features [B, D] of the network with the parameters held inside, as
            `nets.through_layers` makes it.
        head: (params, features [B, D]) -> logits [B, K].
        token_weights: (inputs [B, ...]) -> what each vector of an example counts where the method measures inputs, as
            the mask of texts [B, T] does; None counts all alike.
        label_smoothing: see `cross_entropy`.

    Raises:
        ValueError: an option out of range.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)
    features = adapted_features(method, layers)

    def init(key: Key, params: Adapted, batch: Batch) -> PyTree:
        return method.init(key, network)[1]

    def loss(key: Key, params: Adapted, state: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        logits = head(params.head, features(params, state, batch.inputs))
        value, metrics = cross_entropy(logits, batch, label_smoothing=label_smoothing)
        penalty, of_method = method.penalty(params.adapter, state)
        return value + penalty, metrics | of_method

    def after_update(
        key: Key, params: Adapted, state: PyTree, batch: Batch, grads: Adapted, updates: Adapted
    ) -> tuple[Adapted, PyTree]:
        return updates, method.track(params.adapter, state)

    def observe(key: Key, params: Adapted, state: PyTree, batch: Batch) -> PyTree:
        assert method.measure is not None  # or it would not be called
        changes, moments = method.changes(params.adapter, state), {}
        function = layer_function(changes, method.placement)

        def measuring(path: str, inputs: Array, outputs: Array) -> Array:
            if path in changes:
                x = inputs if method.placement == "parallel" else outputs
                counted = batch.weights.reshape(-1, *[1] * (x.ndim - 2))
                if token_weights is not None:
                    counted = counted * token_weights(batch.inputs)
                moments[path] = second_moments(x, jnp.broadcast_to(counted, x.shape[:-1]))
            return function(path, inputs, outputs)

        layers(measuring, batch.inputs)
        return method.measure(state, moments)

    def end_task(key: Key, params: Adapted, state: PyTree) -> tuple[Adapted, PyTree]:
        adapter, state = method.commit(key, params.adapter, state)
        return params._replace(adapter=adapter), state

    def predict(params: Adapted, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return head(params.head, features(params, state, inputs))

    strategy = Strategy(
        gradients_of(loss), predict, init, after_update=after_update, end_task=end_task, fresh_optimizer=True,
        tasks=method.tasks,
    )  # fmt: skip
    return strategy._replace(observe=observe) if method.measure else strategy  # without it a pass would be for nothing
