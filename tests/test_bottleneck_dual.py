"""Training votes in the dual: the counts by brute force, and every step that of the strategy in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl import bottleneck as bn
from jaxcl import trees
from jaxcl.continual import Batch, key_value_bottleneck

pytestmark = pytest.mark.core

CODEBOOKS, PAIRS = 20, 9


def random_indices(examples, top_k, seed=0):
    """Distinct pairs within an example's codebook, as a look-up gives them."""
    draws = np.random.default_rng(seed).random((examples, CODEBOOKS, PAIRS))
    return np.argsort(draws, axis=-1)[..., :top_k].astype(np.uint16)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("examples", [5, 256, 300])
def test_coincidences_are_those_of_brute_force(examples, top_k):
    indices = random_indices(examples, top_k)
    expected = (indices[:, None, :, :, None] == indices[None, :, :, None, :]).sum(axis=(2, 3, 4))
    counts = bn.coincidences(indices)
    assert counts.dtype == jnp.uint16
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_two_tasks_are_those_of_the_strategy(top_k):
    """Sixty steps on each of two tasks, whose last batches are ragged: losses, values and votes to 1e-5."""
    layer = bn.discrete_key_value_bottleneck(4, 6, codebooks=CODEBOOKS, pairs=PAIRS, key_width=2, top_k=top_k)
    strategy, tx = key_value_bottleneck(layer, classes=5), bn.sparse_sgd(3.0, max_norm=1.0)
    rng = np.random.default_rng(2)
    values = jnp.asarray(0.1 * rng.standard_normal((CODEBOOKS, PAIRS, 6)), jnp.float32)
    params = expected = {"values": values}

    @jax.jit
    def step(params, indices, labels, weights):
        batch = Batch(indices, labels, weights, jnp.ones((len(labels), 5), bool), jnp.int32(0))
        grads, metrics = strategy.gradients(jax.random.key(0), params, (), batch)
        return trees.apply_updates(params, tx.update(grads, tx.init(params), params)[0]), metrics["loss"]

    for task in range(2):
        indices, labels = random_indices(30, top_k, seed=task), rng.integers(5, size=30).astype(np.int32)
        orders = np.full((15, 4, 8), -1, np.int32)
        for order in orders:
            order.reshape(-1)[:30] = rng.permutation(30)
        orders = orders.reshape(60, 8)
        losses = []
        for rows in orders:
            filled = np.where(rows >= 0, rows, rows[0])
            expected, loss = step(expected, indices[filled], labels[filled], (rows >= 0).astype(np.float32))
            losses.append(float(loss))
        votes = bn.begin_votes(params, indices, labels, classes=5)
        assert_close(votes.before, strategy.predict(params, (), indices, None), 1e-6)
        found = []
        for part in np.split(orders, 3):
            votes, loss = bn.train_votes(votes, part, learning_rate=3.0)
            found.append(float(loss))
        params = bn.end_votes(params, votes)
        assert_close(found, np.reshape(losses, (3, 20)).mean(axis=1), 1e-5)
        assert_close(params["values"], expected["values"], 1e-5)
    np.testing.assert_array_equal(params["values"][..., 5], values[..., 5])
    assert float(jnp.abs(params["values"] - values).max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": np.zeros((3, 20), np.uint16)}, "indices: got shape"),
        ({"labels": np.zeros(2, np.int32)}, "labels: got 2 of them; pass one for each of 3 examples"),
        ({"labels": np.full(3, 5)}, "labels: got values from 5 to 5"),
        ({"classes": 7}, "classes: got 7; pass a number from 1 to 6"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    good = {"indices": np.zeros((3, 20, 1), np.uint16), "labels": np.zeros(3, np.int32), "classes": 5}
    with pytest.raises(ValueError, match=message):
        bn.begin_votes({"values": jnp.zeros((20, 9, 6))}, **good | changes)
