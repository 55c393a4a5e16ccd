"""Networks against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import nets


@pytest.mark.parametrize("hidden", [(), (5,), (5, 3)])
def test_mlp_is_affine_maps_with_relu_between(hidden):
    net = nets.MLP(hidden, classes=4)
    inputs = jax.random.normal(jax.random.key(0), (6, 2, 3))
    params = net.init(jax.random.key(1), inputs)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that biases count
    x = np.asarray(inputs, np.float64).reshape(6, 6)
    for layer in range(len(hidden) + 1):
        x = x if layer == 0 else np.maximum(x, 0)
        weights = params["params"][f"Dense_{layer}"]
        x = x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"], np.float64)
    np.testing.assert_allclose(net.apply(params, inputs), x, atol=1e-5)
    np.testing.assert_allclose(jax.jit(net.apply)(params, inputs), x, atol=1e-5)
    assert net.apply(params, inputs.astype(jnp.bfloat16)).shape == (6, 4)
