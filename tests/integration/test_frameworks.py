"""Users of other neural-network libraries: what the core needs of a network is a function of parameters and inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcl import continual
from jaxcl.continual import Examples, streams


def nnx_network():
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return (lambda params, inputs: nnx.merge(graph, params)(inputs)), params


def equinox_network():
    params, static = eqx.partition(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.is_array)
    return (lambda params, inputs: jax.vmap(eqx.combine(params, static))(inputs)), params


@pytest.mark.parametrize("network", [nnx_network, equinox_network])
def test_a_network_of_another_library_trains_through_the_loop(network):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    inputs = (np.eye(4)[labels] * 3 + rng.normal(size=(60, 4)) * 0.3).astype(np.float32)
    examples = Examples(inputs, labels)
    stream = streams.joint(streams.class_incremental(None, examples, examples, classes_per_task=[1, 2]))
    apply, params = network()
    before = jax.tree.map(jnp.copy, params)
    result = continual.run(
        jax.random.key(1), continual.naive(apply), optax.adam(0.1), params, stream, epochs=10, batch_size=16
    )
    # Three clusters ten standard deviations apart: any linear classifier that learns at all separates them.
    assert continual.metrics.average_accuracy(result.accuracy) == 1.0
    assert jax.tree.structure(result.params) == jax.tree.structure(before)
