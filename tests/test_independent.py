"""One network a task, and an optimizer that begins anew with each."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest

from jaxcl import continual, masks


def run(strategy, tx, *, stream=None, **options):
    return continual.run(
        jax.random.key(0), strategy, tx, methods.network_params(), stream or methods.stream_of(told=True),
        epochs=5, batch_size=4, **options,
    )  # fmt: skip


def test_each_task_has_a_network_of_its_own_from_the_same_start():
    """So that of the first task is naive training's, and no later task changes any answer."""
    tx = optax.adam(0.05)
    result, alone = run(continual.independent(methods.network, 2), tx), run(continual.naive(methods.network), tx)
    kept = result.strategy_state.kept
    assert result.accuracy[0, 0] == result.accuracy[1, 0] == alone.accuracy[0, 0]
    for first, own, last in zip(*map(jax.tree.leaves, (methods.network_params(), kept, result.params)), strict=True):
        np.testing.assert_array_equal(own[1], last)
        assert np.any(own[0] != own[1])
        assert (
            np.abs(own[1] - first).max() < 0.05 * 1.01 * 5 * 4
        )  # steps of Adam from the start: of the second task alone
    assert all(count == 1 for count in result.compilations.values())


def test_a_task_that_is_not_told_is_an_error():
    with pytest.raises(ValueError, match="task: got None; networks go by task"):
        run(continual.independent(methods.network, 2), optax.sgd(0.1), stream=methods.stream_of())
    with pytest.raises(ValueError, match="tasks: got 0"):
        continual.independent(methods.network, 0)


def test_more_tasks_than_there_is_room_for_are_an_error():
    with pytest.raises(ValueError, match="strategy: got one for 1 tasks; make it for 2, those of the stream"):
        run(continual.independent(methods.network, 1), optax.sgd(0.1))
    method = masks.packnet(lambda path: path == "first", 1, share=0.5, prune_after=1)
    with pytest.raises(ValueError, match="strategy: got one for 1 tasks"):
        run(continual.masked_network(method, methods.network), optax.sgd(0.1))


@pytest.mark.parametrize("fresh", [False, True])
def test_an_optimizer_begins_anew_where_the_strategy_says_so(fresh):
    """Gradients of the second task are zero: only what momentum is left from the first moves anything."""
    naive = continual.naive(methods.network)

    def gradients(key, params, state, batch):
        grads, metrics = naive.gradients(key, params, state, batch)
        return jax.tree.map(lambda grad: jnp.where(batch.task == 0, grad, 0), grads), metrics

    seen = []
    strategy = naive._replace(
        gradients=gradients, fresh_optimizer=fresh, end_task=lambda key, params, state: (params, state + 1),
        init=lambda key, params, batch: jnp.int32(0),
        predict=lambda params, state, inputs, task: methods.network(params, inputs),
    )  # fmt: skip
    result = run(strategy, optax.sgd(0.1, momentum=0.9), callback=seen.append)
    only_first = run(strategy, optax.sgd(0.1, momentum=0.9), stream=methods.stream_of(told=True)._replace(
        train_sets=methods.stream_of(told=True).train_sets[:1]
    ))  # fmt: skip
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (result.params, only_first.params)), strict=True)
    ]
    assert max(moved) == 0 if fresh else min(moved) > 0
    assert all(count == 1 for count in result.compilations.values())
