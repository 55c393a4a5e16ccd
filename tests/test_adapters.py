"""Adapters: O-LoRA's goldens, what is added and merged, what is protected, gated, revived, kept and counted."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, both_ways, golden

from jaxcl import adapters, nets
from jaxcl.trees import leaves_by_path

NET = nets.MLP([6, 5], 3)
PARAMS = NET.init(jax.random.key(0), jnp.zeros((1, 4)))
X = jax.random.normal(jax.random.key(1), (7, 4))
FIRST, SECOND = "params/Dense_0/kernel", "params/Dense_1/kernel"
TASKS = 4


def hidden(path):
    return path in (FIRST, SECOND)


METHODS = {
    "lora": lambda: adapters.lora(hidden, 2, alpha=4),
    "incremental_lora": lambda: adapters.incremental_lora(hidden, 2, TASKS, alpha=4),
    "incremental adapters": lambda: adapters.incremental_lora(hidden, 2, TASKS, placement="sequential"),
    "o_lora": lambda: adapters.o_lora(hidden, 2, TASKS, norm="squared"),
    **{
        f"oa_adapter {target}": lambda target=target: adapters.oa_adapter(hidden, 3, TASKS, orthogonal_to=target)
        for target in ("outputs", "down", "inputs", None)
    },
}
A_TASK_EACH = [name for name in METHODS if name != "lora"]
every_method = pytest.mark.parametrize("name", METHODS)


def scattered(adapter, seed=3):
    """An adapter away from where it begins: as training leaves it."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def answers(method, adapter, state, x=X):
    """Of the network with the changes beside its layers."""
    function = adapters.layer_function(method.changes(adapter, state), method.placement)
    return nets.through_layers(function, lambda: NET.apply(PARAMS, x))


def measured(method, adapter, state, x=X):
    """The state after what comes to its sites was measured, if the method wants that."""
    if method.measure is None:
        return state
    found = {}
    function = adapters.layer_function(method.changes(adapter, state), method.placement)

    def look(path, inputs, outputs):
        if hidden(path):
            found[path] = adapters.second_moments(outputs)
        return function(path, inputs, outputs)

    nets.through_layers(look, lambda: NET.apply(PARAMS, x))
    return method.measure(state, found)


def after_tasks(method, tasks, x_of=lambda task: X):
    """Adapter and state after so many tasks, each with an adapter as if trained."""
    adapter, state = method.init(jax.random.key(2), PARAMS)
    for task in range(tasks):
        adapter = scattered(adapter, seed=10 + task)
        state = measured(method, adapter, method.track(adapter, state), x_of(task))
        adapter, state = method.commit(jax.random.key(20 + task), adapter, state)
    return adapter, state


def of_tasks(state):
    return getattr(state, "of_tasks", state)


@pytest.mark.core
@pytest.mark.parametrize("name", ["olora_step", "olora_step_zeroB"])
def test_a_training_step_of_o_lora(name):
    arrays, options = golden(name)
    rank, past = options["r"], options["past_tasks"]
    params = {n: {"kernel": arrays[f"{n}_base_weight"].T, "bias": arrays.get(f"{n}_base_bias", 0.0)} for n in "qv"}
    method = adapters.o_lora(
        lambda path: path.endswith("kernel"), rank, past, alpha=options["lora_alpha"], strength=options["lamda_1"],
        decay=options["lamda_2"],
    )  # fmt: skip
    _, state = method.init(jax.random.key(0), params)

    def of_site(site, which):
        return adapters.LowRank(jnp.asarray(arrays[f"{site}_{which}_A"].T), jnp.asarray(arrays[f"{site}_{which}_B"].T))

    for task in range(past):
        rows = slice(task * rank, (task + 1) * rank)
        old = {f"{n}/kernel": of_site(n, "past") for n in "qv"}
        old = {path: adapters.LowRank(own.down[:, rows], own.up[rows]) for path, own in old.items()}
        _, state = method.commit(jax.random.key(task), old, state)

    def layer(n, x, changes):
        return x @ params[n]["kernel"] + params[n]["bias"] + adapters.added(changes[f"{n}/kernel"], x)

    def losses(adapter):
        changes = method.changes(adapter, state)
        out = layer("v", jnp.tanh(layer("q", arrays["x"], changes)), changes)
        task_loss = jnp.sum(arrays["P"] * out)
        penalty, metrics = method.penalty(adapter, state)
        return task_loss + penalty, (out, task_loss, metrics["overlap"])

    new = {f"{n}/kernel": of_site(n, "new") for n in "qv"}
    (total, (out, task_loss, overlap)), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(new)
    assert_close(out, arrays["out"])
    assert_close(task_loss, arrays["task_loss"])
    assert_close(overlap, arrays["orthogonal_loss"])
    assert_close(total, arrays["total_loss"])
    for n in "qv":
        assert_close(gradient[f"{n}/kernel"].down, arrays[f"{n}_grad_new_A"].T)
        assert_close(gradient[f"{n}/kernel"].up, arrays[f"{n}_grad_new_B"].T)


@both_ways
@every_method
def test_merged_answers_as_summed(name, wrap):
    method = METHODS[name]()
    adapter, state = after_tasks(method, 2)
    adapter = scattered(adapter)
    merged = adapters.merge(PARAMS, method.changes(adapter, state), method.placement)
    assert_close(wrap(NET.apply)(merged, X), wrap(partial(answers, method))(adapter, state))


def test_a_bias_is_found_beside_its_kernel_by_the_names_of_haiku_too():
    keys = jax.random.split(jax.random.key(0), 5)
    w, b, down, up, x = (jax.random.normal(key, shape) for key, shape in zip(
        keys, [(3, 4), (4,), (4, 2), (2, 4), (5, 3)], strict=True))  # fmt: skip
    change = adapters.Change(None, down, up)
    merged = adapters.merge({"linear": {"w": w, "b": b}}, {"linear/w": change}, "sequential")["linear"]
    outputs = x @ w + b
    assert_close(x @ merged["w"] + merged["b"], outputs + adapters.added(change, outputs))


@every_method
def test_a_new_adapter_changes_nothing(name):
    method = METHODS[name]()
    adapter, state = method.init(jax.random.key(2), PARAMS)
    np.testing.assert_array_equal(answers(method, adapter, state), NET.apply(PARAMS, X))
    before = answers(method, *after_tasks(method, 1))
    assert np.abs(before - NET.apply(PARAMS, X)).max() > 0.01


@pytest.mark.parametrize("name", A_TASK_EACH)
def test_what_a_task_committed_never_moves(name):
    method = METHODS[name]()
    kept = [of_tasks(after_tasks(method, tasks)[1]).bank for tasks in range(1, TASKS + 1)]
    for task, (now, then) in enumerate(pairwise(kept)):
        for path in (FIRST, SECOND):
            for first, second in zip(now[path], then[path], strict=True):
                np.testing.assert_array_equal(first[: task + 1], second[: task + 1])
                assert np.any(np.asarray(first[task]))


@pytest.mark.parametrize("name", A_TASK_EACH)
def test_what_is_added_is_the_sum_over_tasks(name):
    """By NumPy from the bank alone: x -> sum of ((x down) * gate) up."""
    method = METHODS[name]()
    adapter, state = after_tasks(method, TASKS)
    bank = {path: [np.asarray(leaf, np.float64) for leaf in own] for path, own in of_tasks(state).bank.items()}
    x = np.random.default_rng(0).normal(size=(2, bank[SECOND][0].shape[1]))
    expected = sum(((x @ down) * gate) @ up for down, up, gate in zip(*bank[SECOND], strict=True))
    assert_close(adapters.added(method.changes(adapter, state)[SECOND], jnp.float32(x)), expected)


# What is protected


def kept_columns(state, target, path=SECOND):
    """What the tasks so far want kept off, one column a direction."""
    bank = of_tasks(state).bank[path]
    wanted = []
    for task in range(int(of_tasks(state).committed)):
        columns = bank.up[task].T if target == "outputs" else bank.down[task]
        wanted.append(columns[:, np.asarray(bank.gate[task]) != 0])
    return jnp.concatenate(wanted, axis=1)


@pytest.mark.parametrize("target", ["outputs", "down"])
def test_a_new_task_is_orthogonal_to_active_directions(target):
    """Three tasks of rank 1 in 5 dimensions: room for one more."""
    method = adapters.oa_adapter(hidden, 1, TASKS, orthogonal_to=target)
    for tasks in (1, 2, 3):
        adapter, state = after_tasks(method, tasks)
        change = method.changes(scattered(adapter), state)[SECOND]
        own = change.up.T if target == "outputs" else change.down
        assert np.abs(own).max() > 1e-3
        assert adapters.cosines(kept_columns(state, target), own).max() < 1e-5
        assert method.penalty(scattered(adapter), state)[1]["overlap"] < 1e-10


def test_a_new_task_is_orthogonal_to_earlier_inputs():
    """Inputs of the first task span two of four dimensions: a new adapter answers them as if it were not there."""
    inside = X @ jnp.diag(jnp.asarray([1.0, 1, 0, 0])) @ jnp.linalg.qr(jax.random.normal(jax.random.key(9), (4, 4)))[0]
    net = nn.Dense(4, use_bias=False)
    params = {"params": {"kernel": jnp.eye(4)}}
    method = adapters.oa_adapter(lambda path: True, 2, 2, orthogonal_to="inputs")
    adapter, state = method.init(jax.random.key(2), params)
    adapter = scattered(adapter)
    state = method.measure(state, {"params/kernel": adapters.second_moments(inside)})
    adapter, state = method.commit(jax.random.key(3), adapter, state)

    def out(adapter, x):
        function = adapters.layer_function(method.changes(adapter, state), method.placement)
        return nets.through_layers(function, lambda: net.apply(params, x))

    trained = scattered(adapter, seed=4)
    assert_close(out(trained, inside), out(adapter, inside), 1e-6)
    assert np.abs(out(trained, X) - out(adapter, X)).max() > 0.01


@pytest.mark.parametrize("strength", [None, 0.0])
def test_drift_is_what_a_new_adapter_adds_to_earlier_inputs(strength):
    """By the very inputs of two tasks, of which one is longer: relative to them it counts as much."""
    method = adapters.oa_adapter(
        lambda path: True, 2, 3, orthogonal_to="inputs", protected=1, strength=strength, drift_strength=3.0
    )
    adapter, state = method.init(jax.random.key(0), {"kernel": jnp.eye(5)})
    earlier = [scale * jax.random.normal(jax.random.key(seed), (9, 5)) for seed, scale in ((1, 1.0), (2, 30.0))]
    adapter = scattered(adapter)
    assert method.penalty(adapter, state)[0] == 0
    for task, x in enumerate(earlier):
        state = method.measure(state, {"kernel": adapters.second_moments(x)})
        _, state = method.commit(jax.random.key(task), adapter, state)
        change = method.changes(adapter, state)["kernel"]._replace(past=None)
        lengths = [jnp.square(adapters.added(change, x)).sum() / jnp.square(x).sum() for x in earlier[: task + 1]]
        penalty, metrics = method.penalty(adapter, state)
        assert_close(metrics["drift"], sum(lengths))
        assert_close(penalty, 3 * sum(lengths))
    gradient = jax.grad(lambda adapter: method.penalty(adapter, state)[0])(adapter)["kernel"]
    assert gradient.down.any() and gradient.up.any() and gradient.gate.any()


def test_inputs_in_all_directions_leave_half_to_learn_in():
    method = adapters.oa_adapter(lambda path: True, 3, 2, orthogonal_to="inputs", protected=64)
    params = {"kernel": jnp.eye(7)}
    adapter, state = method.init(jax.random.key(0), params)
    state = method.measure(state, {"kernel": adapters.second_moments(jax.random.normal(jax.random.key(1), (50, 7)))})
    adapter, state = method.commit(jax.random.key(2), adapter, state)
    assert np.linalg.matrix_rank(of_tasks(state).protected["kernel"].basis) == 4
    assert np.linalg.norm(method.changes(adapter, state)["kernel"].down, axis=0).min() > 0.1


@pytest.mark.parametrize("strength", [None, 1.0])
def test_where_nothing_is_left_to_learn_in_gradients_are_finite(strength):
    method = adapters.oa_adapter(lambda path: True, 2, 3, orthogonal_to="down", gates="fixed", strength=strength)
    adapter, state = method.init(jax.random.key(0), {"kernel": jnp.eye(2)})
    adapter, state = method.commit(jax.random.key(1), adapter, state)
    adapter = {"kernel": adapter["kernel"]._replace(up=jnp.ones((2, 2)))}

    def loss(adapter):
        return method.penalty(adapter, state)[0] + jnp.sum(method.changes(adapter, state)["kernel"].down ** 2)

    for scale in (1.0, 1e-15, 0.0):
        shrunk = jax.tree.map(lambda leaf: scale * leaf, adapter)  # noqa: B023
        for leaf in jax.tree.leaves(jax.grad(loss)(shrunk)):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("width", [384, 1024])
def test_one_strength_serves_all_widths(width):
    """A loss that wants the new directions where the old ones are, and a penalty of strength 1 that keeps them off."""
    method = adapters.oa_adapter(lambda path: True, 8, 2, orthogonal_to="outputs", strength=1.0, gates="fixed")
    params = {"kernel": jnp.zeros((4, width))}
    adapter, state = jax.jit(method.init)(jax.random.key(0), params)
    old = {"kernel": adapter["kernel"]._replace(up=jax.random.normal(jax.random.key(1), (8, width)) / width**0.5)}
    adapter, state = jax.jit(method.commit)(jax.random.key(2), old, state)
    mixed = old["kernel"].up + jax.random.normal(jax.random.key(3), (8, width)) / width**0.5
    adapter = {"kernel": adapter["kernel"]._replace(up=mixed)}
    tx = optax.adam(2e-3)

    def loss(adapter):
        return method.penalty(adapter, state)[0] - 1e-3 * jnp.sum(adapter["kernel"].up * old["kernel"].up)

    @jax.jit
    def step(adapter, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(adapter), opt_state)
        return optax.apply_updates(adapter, updates), opt_state

    opt_state, penalty = jax.jit(tx.init)(adapter), jax.jit(method.penalty)
    assert penalty(adapter, state)[1]["overlap"] > 0.4
    for _ in range(300):
        adapter, opt_state = step(adapter, opt_state)
    assert penalty(adapter, state)[1]["overlap"] <= 0.01
    assert jnp.square(adapter["kernel"].up).sum() > 4  # and not by vanishing


def test_principal_angles():
    """Of planes in 3 dimensions that share a line and are turned by a known angle about it."""
    angle = 0.3
    first = jnp.asarray([[1.0, 0], [0, 1], [0, 0]])
    second = jnp.asarray([[2.0, 0], [0, np.cos(angle)], [0, np.sin(angle)]])
    assert_close(adapters.cosines(first, second), [1, np.cos(angle)])
    assert_close(adapters.cosines(first * jnp.asarray([1, 1e-5]), second), [1, np.cos(angle)])  # however short
    assert_close(adapters.cosines(first * jnp.asarray([1, 0]), second), [1, 0])
    assert_close(adapters.cosines(first, jnp.asarray([[0.0], [0], [3]])), [0])
    assert_close(adapters.overlap(first, jnp.asarray([[0.0], [3], [4]])), 9 / 25)
    assert_close(adapters.overlap(first, jnp.zeros((3, 1))), 0)


def test_the_protected_subspace_is_the_principal_one():
    protected = adapters.nothing_protected(5, 2)
    vectors = np.random.default_rng(0).normal(size=(5, 3)) * [3, 2, 0.1]
    for column in vectors.T:
        protected = adapters.protect(protected, jnp.outer(column, column))
    left = np.linalg.svd(vectors)[0][:, :2]
    assert_close(protected.basis @ protected.basis.T, left @ left.T)
    one = adapters.protect(adapters.nothing_protected(5, 3), jnp.outer(vectors[:, 0], vectors[:, 0]))
    assert np.linalg.matrix_rank(one.basis) == 1


# Gates


def gated(gates, log_threshold=0.0, up=1.0):
    rank = len(gates)
    return adapters.Gated(
        jnp.eye(5)[:, :rank], up * jnp.ones((rank, 5)), jnp.float32(gates), jnp.float32(log_threshold)
    )


def test_soft_threshold():
    own = gated([3.0, -2.5, 0.4, -0.25], np.log(0.5))
    assert_close(adapters.soft_gate(own), [2.5, -2.0, 0, 0])
    slope = jax.grad(lambda own: adapters.soft_gate(own).sum())(own)
    assert_close(slope.gate, [1, 1, 0, 0])
    assert_close(slope.log_threshold, 0.5 * (-1 + 1))


@pytest.mark.parametrize("revival", [True, False])
def test_a_rank_that_is_off_comes_back_only_with_revival(revival):
    """The target needs the rank that starts below its threshold."""
    method = adapters.oa_adapter(lambda path: path == SECOND, 2, 1, orthogonal_to=None, revival=revival)
    _, state = method.init(jax.random.key(0), PARAMS)
    adapter = {SECOND: gated([0.5, 0.05], np.log(0.1), up=0.1)}
    x, tx = jnp.eye(5), optax.adam(1e-2)
    target = jnp.zeros((5, 5)).at[1].set(1.0)

    def loss(adapter):
        return jnp.square(adapters.added(method.changes(adapter, state)[SECOND], x) - target).sum()

    @jax.jit
    def step(adapter, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(adapter), opt_state)
        return optax.apply_updates(adapter, updates), opt_state

    assert (jax.jit(jax.grad(loss))(adapter)[SECOND].gate[1] != 0) == revival
    opt_state, first, track = tx.init(adapter), float(loss(adapter)), jax.jit(method.track)
    for _ in range(300):
        adapter, opt_state = step(adapter, opt_state)
        state = track(adapter, state)
    on = [event for event in adapters.switches(state) if event["rank"] == 1]
    if revival:
        assert loss(adapter) < 0.1 * first
        assert [event["active"] for event in on][-1]
    else:
        assert adapters.soft_gate(adapter[SECOND])[1] == 0
        assert not on or not on[-1]["active"]


def test_revival_changes_gradients_only():
    with_it, without = (
        adapters.oa_adapter(lambda path: path == SECOND, 2, 1, orthogonal_to=None, revival=revival)
        for revival in (True, False)
    )
    _, state = with_it.init(jax.random.key(0), PARAMS)
    adapter, x = {SECOND: gated([0.5, 0.05], np.log(0.1))}, jax.random.normal(jax.random.key(1), (3, 5))
    (first, of_first), (second, of_second) = (
        jax.value_and_grad(lambda a, m=method: jnp.sin(adapters.added(m.changes(a, state)[SECOND], x)).sum())(adapter)
        for method in (with_it, without)
    )
    assert first == second
    assert_close(of_first[SECOND].gate[0], of_second[SECOND].gate[0])
    assert of_second[SECOND].gate[1] == 0 != of_first[SECOND].gate[1]
    assert not of_second[SECOND].up[1].any() and of_first[SECOND].up[1].any()


def test_sparsity_raises_the_threshold_and_lowers_gates():
    method = adapters.oa_adapter(lambda path: path == SECOND, 2, 1, sparsity=0.5)
    _, state = method.init(jax.random.key(0), PARAMS)
    slope = jax.grad(lambda a: method.penalty(a, state)[0])({SECOND: gated([1.0, -1.0], np.log(0.1))})[SECOND]
    assert_close(slope.gate, [0.25, -0.25])
    assert_close(slope.log_threshold, -0.5 * 0.1)


def test_the_log_has_each_switch_once():
    method = adapters.oa_adapter(lambda path: path == SECOND, 3, 2, log_size=3)
    _, state = method.init(jax.random.key(0), PARAMS)
    state = state._replace(active={SECOND: jnp.asarray([True, True, False])})
    track = jax.jit(method.track)
    for gates in ([1.0, 1, 0], [1.0, 0.1, 1], [1.0, 0.1, 1], [1.0, 1, 0]):
        state = track({SECOND: gated(gates, np.log(0.5))}, state)
    found = [(event["step"], event["site"], event["rank"], event["active"]) for event in adapters.switches(state)]
    assert found == [(1, SECOND, 1, False), (1, SECOND, 2, True), (3, SECOND, 1, True)]  # the fourth has no room
    assert state.log.seen == 4
    assert adapters.switches(state)[0]["threshold"] == pytest.approx(0.5)


def test_what_tasks_cost():
    """Counted by hand: the second site is 5 wide, a rank there has 5 + 5 + 1 numbers."""
    method = adapters.oa_adapter(lambda path: path == SECOND, 3, 2, orthogonal_to="down", protected=2)
    _, state = method.init(jax.random.key(0), PARAMS)
    _, state = method.commit(jax.random.key(1), {SECOND: gated([1.0, 0.1, -2], np.log(0.5))}, state)
    cost = adapters.budget(state.of_tasks)
    np.testing.assert_array_equal(cost.active[SECOND], [2, 0])
    np.testing.assert_array_equal(cost.parameters, [22, 0])
    np.testing.assert_array_equal(cost.bytes, [88, 0])
    assert cost.basis_bytes == 4 * (5 * 5 + 5 * 2)


def test_a_task_too_many_is_told_with_what_tasks_cost():
    method = adapters.incremental_lora(hidden, 2, 1)
    adapter, state = method.init(jax.random.key(0), PARAMS)
    for _ in range(2):
        adapter, state = jax.jit(method.commit)(jax.random.key(1), adapter, state)
    with pytest.raises(ValueError, match="state: got 2 tasks in room for 1; make the method with more tasks"):
        adapters.budget(state)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_outputs_keep_the_type_of_the_layer(placement):
    """Which computes in bfloat16, while float32 goes in."""
    net = nn.Dense(3, dtype=jnp.bfloat16)
    x = jnp.ones((2, 4))
    params = net.init(jax.random.key(0), x)
    method = adapters.lora(lambda path: path.endswith("kernel"), 2, placement=placement)
    adapter, state = method.init(jax.random.key(1), params)
    function = adapters.layer_function(method.changes(scattered(adapter), state), placement)
    out = nets.through_layers(function, lambda: net.apply(params, x))
    assert out.dtype == jnp.bfloat16 and np.any(out != net.apply(params, x))


# Bad arguments


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: adapters.lora(hidden, 0), "rank: got 0"),
        (lambda: adapters.incremental_lora(hidden, 1, 0), "tasks: got 0"),
        (lambda: adapters.lora(hidden, 1, placement="after"), "placement: got 'after'"),
        (lambda: adapters.o_lora(hidden, 1, 1, strength=-1), "strength: got -1"),
        (lambda: adapters.o_lora(hidden, 1, 1, norm="l2"), "norm: got 'l2'"),
        (lambda: adapters.oa_adapter(hidden, 1, 1, orthogonal_to="up"), "orthogonal_to: got 'up'"),
        (lambda: adapters.oa_adapter(hidden, 1, 1, threshold=0), "threshold: got 0"),
        (lambda: adapters.oa_adapter(hidden, 1, 1, strength=-0.5), "strength: got -0.5"),
        (lambda: adapters.oa_adapter(hidden, 1, 1, drift_strength=-1), "drift_strength: got -1"),
        (
            lambda: adapters.oa_adapter(hidden, 1, 1, orthogonal_to="down", drift_strength=1.0),
            'drift_strength: got 1.0; pass orthogonal_to="inputs"',
        ),
        (lambda: adapters.lora(lambda path: "query" in path, 1).init(jax.random.key(0), PARAMS), "no match among"),
        (lambda: adapters.lora(lambda path: "bias" in path, 1).init(jax.random.key(0), PARAMS), "covers: got leaves"),
        (lambda: adapters.merge(PARAMS, {"params/x": None}, "parallel"), "changes: got sites"),
        (lambda: adapters.merge(PARAMS, {}, "beside"), "placement: got 'beside'"),
        (lambda: adapters.layer_function({}, "beside"), "placement: got 'beside'"),
        (
            lambda: adapters.merge(PARAMS, {FIRST: adapters.Change(None, *[jnp.ones((4, 4))] * 2)}, "parallel"),
            r"of shape \(4, 4\), parallel to a kernel of \(4, 6\); pass those that were made",
        ),
        (
            lambda: adapters.merge(
                {"v": jnp.ones((2, 2))}, {"v": adapters.Change(None, *[jnp.ones((2, 2))] * 2)}, "sequential"
            ),
            "changes: got site 'v'; name kernels as one of",
        ),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_adapter_too_many_is_refused():
    method = adapters.incremental_lora(hidden, 1, tasks=1)
    adapter, state = method.init(jax.random.key(0), PARAMS)
    adapter, state = method.commit(jax.random.key(1), adapter, state)
    with pytest.raises(ValueError, match="task: got 1; there is room for 1, from 0 on"):
        method.commit(jax.random.key(2), adapter, state)


def test_every_leaf_is_a_site_of_its_own():
    sites = adapters.sites_of(PARAMS, hidden, "sequential")
    assert sites == {FIRST: (6, 6), SECOND: (5, 5)}
    assert adapters.sites_of(PARAMS, hidden, "parallel") == {FIRST: (4, 6), SECOND: (6, 5)}
    assert set(sites) <= set(leaves_by_path(PARAMS))
