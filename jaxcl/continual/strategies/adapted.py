"""Adapters in training: a frozen network, an adapter a task, and what of the network is learnt."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxcl.adapters import Adapter, LayerFunction, layer_function, second_moments
from jaxcl.continual.strategies.contract import Apply, Batch, Metrics, Strategy, cross_entropy, gradients_of
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_between

Layers = Callable[[LayerFunction, Array], Array]
# (function, inputs [B, ...]) -> features [B, D] of a frozen network whose layers' outputs go through the function
Features = Callable[[PyTree, PyTree, Array], Array]  # (params, state, inputs [B, ...]) -> features [B, D]


class Adapted(NamedTuple):
    """What is trained; the network itself is not."""

    adapter: PyTree
    head: PyTree


class Objective(NamedTuple):
    """What is learnt of a frozen network whose layers' outputs go through a function."""

    loss: Callable[[LayerFunction, PyTree, Batch], tuple[Array, Metrics]]
    # (function, head's parameters, batch) -> (mean loss in nats [], metrics)
    predict: Callable[[LayerFunction, PyTree, Array], Array]
    # (function, head's parameters, inputs [B, ...]) -> logits [B, K]


def classification(layers: Layers, head: Apply, *, label_smoothing: float = 0.0) -> Objective:
    """The classes of examples, by a head on the network's features.

    Args:
        layers: (function, inputs [B, ...]) -> features [B, D] of the network with its parameters held inside, as
            `nets.through_layers` makes it.
        head: (params, features [B, D]) -> logits [B, K].
        label_smoothing: see `cross_entropy`.

    Raises:
        ValueError: an option out of range.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)

    def loss(function: LayerFunction, params: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        return cross_entropy(predict(function, params, batch.inputs), batch, label_smoothing=label_smoothing)

    def predict(function: LayerFunction, params: PyTree, inputs: Array) -> Array:
        logits: Array = head(params, layers(function, inputs))
        return logits

    return Objective(loss, predict)


def adapted_features(method: Adapter, layers: Layers) -> Features:
    """Features [B, D] of a frozen network under the adapter in `Adapted` params, given the method's state.

    `adapters.lora` has no state: any strategy trains it, with ``lambda params, inputs: head(params.head,
    features(params, (), inputs))`` as its `Apply`.
    """

    def features(params: Adapted, state: PyTree, inputs: Array) -> Array:
        return layers(layer_function(method.changes(params.adapter, state), method.placement), inputs)

    return features


def adapted_network(
    method: Adapter,
    network: PyTree,
    objective: Objective,
    *,
    counted: Callable[[str, Batch], Array] | None = None,
) -> Strategy:
    """A frozen network with adapters by a method of `adapters`, one more with each task; params are `Adapted`.

    They begin as ``Adapted(method.init(key, network)[0], head's parameters)``; the optimizer begins anew with each
    task. No task need be told. The strategy's state is the method's.

    Args:
        method: `adapters.oa_adapter`, `adapters.o_lora` or `adapters.incremental_lora`, for the stream's tasks or more,
            or `adapters.lora`, one for all.
        network: its parameters, or their shapes.
        objective: `classification`, or as `nets.text_to_text` makes it.
        counted: (path of a site, batch) -> [B, ...], what each vector at the site counts where the method measures
            inputs, as the mask of texts [B, T] does; None counts all alike.

    Raises:
        ValueError: in training, a site that is no layer which the objective calls.
    """

    def init(key: Key, params: Adapted, batch: Batch) -> PyTree:
        return method.init(key, network)[1]

    def function(params: Adapted, state: PyTree) -> LayerFunction:
        return layer_function(method.changes(params.adapter, state), method.placement)

    def loss(key: Key, params: Adapted, state: PyTree, batch: Batch) -> tuple[Array, Metrics]:
        adapted = function(params, state)
        met: set[str] = set()

        def meeting(path: str, inputs: Array, outputs: Array) -> Array:
            met.add(path)
            return adapted(path, inputs, outputs)

        value, metrics = objective.loss(meeting, params.head, batch)
        if unmet := method.changes(params.adapter, state).keys() - met:
            raise bad_argument(
                "method", f"one for sites {sorted(unmet)}", f"cover kernels of layers that are called: {sorted(met)}"
            )
        penalty, of_method = method.penalty(params.adapter, state)
        return value + penalty, metrics | of_method

    def after_update(
        key: Key, params: Adapted, state: PyTree, batch: Batch, grads: Adapted, updates: Adapted
    ) -> tuple[Adapted, PyTree]:
        return updates, method.track(params.adapter, state)

    def observe(key: Key, params: Adapted, state: PyTree, batch: Batch) -> PyTree:
        assert method.measure is not None  # or it would not be called
        sites = method.changes(params.adapter, state).keys()
        moments: dict[str, Array] = {}
        adapted = function(params, state)

        def measuring(path: str, inputs: Array, outputs: Array) -> Array:
            if path in sites:
                x = inputs if method.placement == "parallel" else outputs
                weights = batch.weights.reshape(-1, *[1] * (x.ndim - 2))
                if counted is not None:
                    weights = weights * counted(path, batch)
                of_call = second_moments(x, jnp.broadcast_to(weights, x.shape[:-1]))
                moments[path] = moments[path] + of_call if path in moments else of_call  # a layer may be called twice
            return adapted(path, inputs, outputs)

        objective.loss(measuring, params.head, batch)
        return method.measure(state, moments)

    def end_task(key: Key, params: Adapted, state: PyTree) -> tuple[Adapted, PyTree]:
        adapter, state = method.commit(key, params.adapter, state)
        return params._replace(adapter=adapter), state

    def predict(params: Adapted, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return objective.predict(function(params, state), params.head, inputs)

    strategy = Strategy(
        gradients_of(loss), predict, init, after_update=after_update, end_task=end_task, fresh_optimizer=True,
        tasks=method.tasks,
    )  # fmt: skip
    return strategy._replace(observe=observe) if method.measure else strategy  # without it a pass would be for nothing
