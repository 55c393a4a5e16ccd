"""EWC, online EWC, SI and LwF: penalties and gradients against NumPy by hand, then whole runs against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, both_ways, plain
from scipy.special import log_softmax, softmax
from scipy.stats import chi2
from softmax import (
    KEY,
    ONCE,
    D,
    K,
    apply,
    chained,
    flat,
    logits_by_hand,
    make_batch,
    make_params,
    make_stream,
    mean_gradient,
    own_gradients,
    probe,
    wrapped,
)

from jaxcl.continual import Batch, ewc, lwf, naive, online_ewc, run, run_seeds, si
from jaxcl.continual.strategies import squared_gradients
from jaxcl.continual.strategies.regularisation import PathState
from jaxcl.trees import apply_updates


def fisher_by_hand(params, *batches):
    squares = [own_gradients(params, batch) ** 2 for batch in batches]
    return np.average(np.concatenate(squares), axis=0, weights=np.concatenate([batch.weights for batch in batches]))


def learned(strategy, params, state, *batches):
    """The state after a task that ends at `params` has been observed."""
    for batch in batches:
        state = strategy.observe(KEY, params, state, batch)
    same, state = strategy.end_task(KEY, params, state)
    np.testing.assert_array_equal(flat(same), flat(params))
    return state


# Fisher information


@pytest.mark.core
@pytest.mark.parametrize(
    ("wrap", "examples_at_a_time"),
    [(plain, 3), (plain, None), *((jax.jit, count) for count in (None, 1, 3, 4, 6, 100))],
)
def test_fisher_is_the_mean_of_each_examples_own_squared_gradient(wrap, examples_at_a_time):
    """Two batches of 6, the second with two rows that only fill up; not the square of the batch's mean gradient."""
    params = make_params()
    first, second = make_batch([0, 1, 2, 3, 0, 1]), make_batch([3, 3, 1, 0, 2, 2], seed=1, padding=2)
    strategy = wrapped(ewc(apply, strength=1.0, labels="data", examples_at_a_time=examples_at_a_time), wrap)
    state = learned(strategy, params, strategy.init(KEY, make_params(9), first), first, second)
    expected = fisher_by_hand(params, first, second)
    assert_close(flat(state.importance), expected, 1e-6)
    assert_close(flat(state.anchor), flat(params), 1e-6)
    assert float(state.examples) == 0
    assert not flat(state.squares).any()
    both = np.average([mean_gradient(params, first), mean_gradient(params, second)], axis=0, weights=[6, 4])
    assert np.abs(expected - both**2).max() > 0.1


@pytest.mark.parametrize(("count", "examples_at_a_time"), [(7, 3), (7, None), (1, 16), (6, 4), (16, 4)])
def test_squared_gradients_of_any_number_of_examples(count, examples_at_a_time):
    params, batch = make_params(), make_batch(np.arange(count) % K, eligible=[0, 1, 2, 3])
    total = squared_gradients(
        lambda params, batch: naive(apply).gradients(KEY, params, (), batch)[1]["loss"], params, batch,
        examples_at_a_time=examples_at_a_time,
    )  # fmt: skip
    assert_close(flat(total), (own_gradients(params, batch) ** 2).sum(axis=0), 1e-6)


def test_only_eligible_classes_have_fisher_information():
    params, batch = make_params(), make_batch([1, 3, 3], eligible=[1, 3])
    strategy = ewc(apply, strength=1.0, labels="data")
    state = learned(strategy, params, strategy.init(KEY, params, batch), batch)
    assert_close(flat(state.importance), fisher_by_hand(params, batch), 1e-6)
    assert not np.asarray(state.importance["kernel"])[:, [0, 2]].any()
    assert not np.asarray(state.importance["bias"])[[0, 2]].any()


@pytest.mark.parametrize("eligible", [range(K), [0, 1, 3]])
def test_labels_drawn_from_the_model(eligible):
    """One example 4,096 times over. Where a share s_k of the drawn labels is k, the bias's Fisher information is
    s_k (1 - p_k)^2 + (1 - s_k) p_k^2, from which s follows. It must be a share of 4,096, and by a chi-square test
    (0.01 %) a sample of p; the kernel's is x_d^2 times the bias's. The labels in the data play no part."""
    count, params = 4096, make_params()
    batch = make_batch(np.zeros(count), eligible=eligible)
    batch = batch._replace(inputs=np.tile(batch.inputs[:1], (count, 1)))
    strategy = wrapped(ewc(apply, strength=1.0, examples_at_a_time=512), jax.jit)
    init = strategy.init(KEY, params, batch)
    fisher = learned(strategy, params, init, batch).importance
    p = softmax(np.where(batch.eligible[0], logits_by_hand(params, batch.inputs[0]), -np.inf))
    drawn = count * (np.float64(fisher["bias"]) - p**2) / (1 - 2 * p)
    np.testing.assert_allclose(drawn, np.round(drawn), atol=0.05)
    assert np.round(drawn).sum() == count
    own = list(eligible)
    assert ((drawn - count * p)[own] ** 2 / (count * p[own])).sum() < chi2.ppf(0.9999, len(own) - 1)
    squares = np.float64(batch.inputs[0]) ** 2
    np.testing.assert_allclose(fisher["kernel"], squares[:, None] * np.float64(fisher["bias"]), rtol=1e-3, atol=1e-9)

    other = batch._replace(labels=np.full(count, 3, np.int32))
    np.testing.assert_array_equal(flat(learned(strategy, params, init, other).importance), flat(fisher))
    again = strategy.observe(jax.random.key(1), params, init, batch).squares["bias"]
    assert not np.allclose(again, strategy.observe(KEY, params, init, batch).squares["bias"], rtol=1e-6)


def test_expected_fisher_information_over_many_keys():
    """The mean over labels is x_d^2 p_k (1 - p_k): different examples in one batch, the mean over 2,000 keys."""
    params, batch = make_params(), make_batch([0, 0, 0], padding=1)
    strategy = ewc(apply, strength=1.0)
    init = strategy.init(KEY, params, batch)
    keys = jax.random.split(jax.random.key(3), 2000)
    squares = jax.jit(jax.vmap(lambda key: strategy.observe(key, params, init, batch).squares))(keys)
    p = softmax(logits_by_hand(params, batch.inputs[:2]), axis=1)
    variance = p * (1 - p)
    expected = np.einsum("bd,bk->dk", np.float64(batch.inputs[:2]) ** 2, variance)
    spread = np.asarray(squares["kernel"]).std(axis=0) / np.sqrt(2000)
    assert (np.abs(np.asarray(squares["kernel"]).mean(axis=0) - expected) < 4.5 * spread + 1e-6).all()
    np.testing.assert_allclose(squares["bias"].mean(axis=0), variance.sum(axis=0), atol=0.03)


# EWC and online EWC


def three_tasks():
    """Where each task ended, and its examples. Input 0 is always zero and input 1 in the first task, and classes 2 and
    3 are not eligible in the first two: some Fisher information is zero in all tasks, some in the earlier ones."""
    ends = [make_params(seed) for seed in (1, 2, 3)]
    batches = [
        make_batch([0, 1, 1, 0], seed=1, eligible=[0, 1]),
        make_batch([1, 0, 0, 1], seed=2, eligible=[0, 1], padding=1),
        make_batch([2, 3, 0, 1], seed=3),
    ]
    for number, batch in enumerate(batches):
        batch.inputs[:, 0] = 0
        if number == 0:
            batch.inputs[:, 1] = 0
    return ends, batches


def penalty_and_gradient(strategy, params, state, batch):
    """What the strategy adds to naive training."""
    grads, metrics = strategy.gradients(KEY, params, state, batch)
    return float(metrics["penalty"]), flat(grads) - mean_gradient(params, batch)


@pytest.mark.core
@both_ways
def test_ewc_equals_the_sum_over_tasks(wrap):
    """Gradients are those of strength / 2 * sum_t F_t (w - w_t)^2; values differ by a constant only."""
    ends, batches = three_tasks()
    strategy = wrapped(ewc(apply, strength=3.0, labels="data"), wrap)
    state, fishers, anchors = strategy.init(KEY, make_params(4), batches[0]), [], []
    offsets = []
    for end, batch in zip(ends, batches, strict=True):
        state = learned(strategy, end, state, batch)
        fishers.append(fisher_by_hand(end, batch))
        anchors.append(flat(end))
        for seed in (5, 6):
            params, now = make_params(seed), make_batch([0, 1, 2, 3], seed=9)
            value, gradient = penalty_and_gradient(strategy, params, state, now)
            moved = flat(params) - np.stack(anchors)
            assert_close(gradient, 3.0 * (np.stack(fishers) * moved).sum(axis=0))
            offsets.append(1.5 * (np.stack(fishers) * moved**2).sum() - value)
    assert_close(offsets[::2], offsets[1::2])
    assert offsets[0] == pytest.approx(0, abs=1e-5)
    assert (np.stack(fishers) == 0).all(axis=0).sum() == K
    assert ((np.stack(fishers)[:2] == 0).all(axis=0) & (fishers[2] > 0)).sum() > K


def test_fisher_information_too_small_for_float32_does_no_harm():
    """Gradients of 1e-20 to 1e-23, whose squares are denormal or zero."""
    ends, batches = three_tasks()
    scales = 1e-20, 1e-22, 1e-23
    batches = [batch._replace(inputs=scale * batch.inputs) for batch, scale in zip(batches, scales, strict=True)]
    strategy = wrapped(ewc(apply, strength=1.0, labels="data"), jax.jit)
    state = strategy.init(KEY, make_params(4), batches[0])
    for end, batch in zip(ends, batches, strict=True):
        state = learned(strategy, end, state, batch)
        assert np.isfinite(flat(state.anchor)).all()
    grads, metrics = strategy.gradients(KEY, make_params(5), state, batches[0])
    assert np.isfinite(flat(grads)).all()
    assert np.isfinite(float(metrics["penalty"]))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@both_ways
def test_online_ewc_fades_and_holds_to_the_latest_parameters(wrap, decay):
    ends, batches = three_tasks()
    strategy = wrapped(online_ewc(apply, strength=3.0, decay=decay, labels="data"), wrap)
    state, fisher = strategy.init(KEY, make_params(4), batches[0]), 0.0
    params, now = make_params(5), make_batch([0, 1, 2, 3], seed=9)
    for end, batch in zip(ends, batches, strict=True):
        state = learned(strategy, end, state, batch)
        fisher = decay * fisher + fisher_by_hand(end, batch)
        moved = flat(params) - flat(end)
        value, gradient = penalty_and_gradient(strategy, params, state, now)
        assert_close(gradient, 3.0 * fisher * moved)
        assert value == pytest.approx(1.5 * (fisher * moved**2).sum(), rel=1e-5)
        np.testing.assert_array_equal(flat(state.anchor), flat(end))
        assert_close(flat(state.importance), fisher, 1e-6)


@pytest.mark.parametrize(
    "make", [functools.partial(ewc, labels="data"), functools.partial(online_ewc, decay=0.5, labels="data"), si, lwf]
)
def test_before_the_second_task_or_without_strength_it_is_naive(make):
    ends, batches = three_tasks()
    for strength, tasks in ((2.0, 0), (0.0, 2)):
        strategy = wrapped(make(apply, strength=strength), jax.jit)
        state = strategy.init(KEY, ends[0], batches[0])
        for task in range(tasks):
            _, state = strategy.begin_task(KEY, ends[task], state, np.int32(task))
            _, state = strategy.after_update(KEY, ends[task], state, batches[task], ends[1], ends[2])
            state = learned(strategy, ends[task], state, batches[task])
        _, state = strategy.begin_task(KEY, ends[0], state, np.int32(tasks))
        grads, metrics = strategy.gradients(KEY, ends[0], state, batches[2])
        assert_close(flat(grads), mean_gradient(ends[0], batches[2]))
        plain_metrics = naive(apply).gradients(KEY, ends[0], (), batches[2])[1]
        for name, value in plain_metrics.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6)


# Synaptic intelligence


class Descent:
    """Gradient descent by hand."""

    def __init__(self, rate):
        self.rate = rate

    def update(self, gradient):
        return -self.rate * gradient


class Adam:
    """Kingma and Ba 2015, algorithm 1, by hand."""

    def __init__(self, rate):
        self.rate, self.step, self.first, self.second = rate, 0, 0.0, 0.0

    def update(self, gradient):
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        return -self.rate * first / (np.sqrt(second) + 1e-8)


def si_by_hand(params, tasks, optimizer, *, strength, damping):
    """Parameters and importance after each task, of steps on the batches of each (Zenke et al. 2017, eq. 3 to 5)."""
    w, omega = flat(params), 0.0
    anchor, path, after = w, 0.0, []
    for batches in tasks:
        for batch in batches:
            own = mean_gradient({"bias": w[:K], "kernel": w[K:].reshape(D, K)}, batch)
            update = optimizer.update(own + 2 * strength * omega * (w - anchor))
            w, path = w + update, path - own * update
        omega = np.maximum(omega + path / ((w - anchor) ** 2 + damping), 0)
        anchor, path = w, 0.0
        after.append((w, omega))
    return after


def train(strategy, tx, params, tasks):
    """What the loop does, without the loop: params and state after each task."""
    strategy = wrapped(strategy, jax.jit)
    state, opt_state = strategy.init(KEY, params, tasks[0][0]), tx.init(params)
    for number, batches in enumerate(tasks):
        params, state = strategy.begin_task(KEY, params, state, np.int32(number))
        for batch in batches:
            grads, _ = strategy.gradients(KEY, params, state, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            updates, state = strategy.after_update(KEY, params, state, batch, grads, updates)
            params = apply_updates(params, updates)
        params, state = strategy.end_task(KEY, params, state)
        yield params, state


def tasks_of_batches(tasks=3, steps=3):
    labels = [[0, 1, 2, 3, 0], [2, 2, 1, 3, 0], [3, 1, 0, 0, 2]]
    return [
        [make_batch(labels[step], seed=10 * task + step, padding=step) for step in range(steps)]
        for task in range(tasks)
    ]


@pytest.mark.core
@pytest.mark.parametrize(
    ("tx", "optimizer"), [(optax.sgd(0.2), Descent(0.2)), (optax.adam(0.1), Adam(0.1))], ids=["sgd", "adam"]
)
def test_si_equals_a_run_by_hand(tx, optimizer):
    """Three tasks of three steps; from the second on the penalty pulls, and must not be in the path."""
    params, tasks = make_params(), tasks_of_batches()
    expected = si_by_hand(params, tasks, optimizer, strength=0.7, damping=0.05)
    results = train(si(apply, strength=0.7, damping=0.05), tx, params, tasks)
    for (end, state), (w, omega) in zip(results, expected, strict=True):
        assert_close(flat(end), w)
        assert_close(flat(state.importance), omega, 2e-5)
        np.testing.assert_array_equal(flat(state.anchor), flat(end))
        assert not flat(state.path).any()
    assert (expected[-1][1] > 0).any()


def test_si_of_float64_parameters_compiles_once():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), make_params())
        strategy, batch = si(apply, strength=0.7), tasks_of_batches()[0][0]
        state = strategy.init(KEY, params, batch)
        updates = jax.tree.map(jnp.ones_like, params)
        _, after = strategy.after_update(KEY, params, state, batch, updates, updates)
        _, ended = strategy.end_task(KEY, params, after)
    for one, *others in zip(*map(jax.tree.leaves, (state, after, ended)), strict=True):
        assert {leaf.dtype for leaf in others} == {one.dtype} == {np.dtype(np.float32)}


def test_si_penalty_and_its_gradient():
    """strength * sum Omega (w - anchor)^2, without a half."""
    (end, state), *_ = train(si(apply, strength=0.7), optax.sgd(0.2), make_params(), tasks_of_batches())
    params, batch = make_params(5), make_batch([0, 1, 2, 3], seed=9)
    value, gradient = penalty_and_gradient(si(apply, strength=0.7), params, state, batch)
    moved, omega = flat(params) - flat(end), flat(state.importance)
    assert value == pytest.approx(0.7 * (omega * moved**2).sum(), rel=1e-5)
    assert_close(gradient, 1.4 * omega * moved)


@both_ways
def test_si_cuts_importance_at_zero(wrap):
    """Each weight's (importance, path, move) is one of the cases; damping 0.5."""
    cases = [(0.0, 3.0, 1.0), (0.0, -3.0, 1.0), (2.0, -1.5, 1.0), (2.0, -4.5, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    expected = [2.0, 0.0, 1.0, 0.0, 1.0, 2.0]
    importance, path, move = (jnp.asarray(column) for column in zip(*cases, strict=True))
    anchor = jnp.arange(6.0)
    state = PathState({"w": anchor}, {"w": importance}, {"w": path})
    params, after = wrap(si(apply, strength=1.0, damping=0.5).end_task)(KEY, {"w": anchor + move}, state)
    np.testing.assert_allclose(after.importance["w"], expected)
    np.testing.assert_array_equal(after.anchor["w"], anchor + move)
    np.testing.assert_array_equal(after.path["w"], np.zeros(6))
    np.testing.assert_array_equal(params["w"], anchor + move)


def test_si_path_adds_up_to_what_the_loss_fell_by():
    """Zenke et al. 2017, eq. 2 and 3: for small steps on one batch the sum of the path is the loss's decrease."""
    batch, params = make_batch([0, 1, 2, 3, 0]), make_params()
    strategy, tx = wrapped(si(apply, strength=1.0), jax.jit), optax.sgd(1e-2)
    state, opt_state, losses = strategy.init(KEY, params, batch), tx.init(params), []
    for _ in range(100):
        grads, metrics = strategy.gradients(KEY, params, state, batch)
        losses.append(float(metrics["loss"]))
        updates, opt_state = tx.update(grads, opt_state, params)
        updates, state = strategy.after_update(KEY, params, state, batch, grads, updates)
        params = apply_updates(params, updates)
    losses.append(float(strategy.gradients(KEY, params, state, batch)[1]["loss"]))
    assert losses[0] - losses[-1] > 0.05
    assert flat(state.path).sum() == pytest.approx(losses[0] - losses[-1], rel=0.02)


# Learning without forgetting

TASKS = ([0, 3], [1, 4], [2, 5])


def six(seed, scale=1.0):
    return jax.tree.map(lambda leaf: scale * leaf, make_params(seed, classes=6))


def lwf_batch(task, *, told, seed=0, padding=0, labels=None):
    own = TASKS[task]
    labels = [own[0], own[1], own[1], own[0], own[1]] if labels is None else labels
    return make_batch(labels, seed=seed, eligible=own if told else None, padding=padding, task=task, classes=6)


def lwf_state(strategy, *, told, tasks, padding=0):
    """Begun task number `tasks` after earlier ones, each of one step; the teacher is six(tasks)."""
    state = strategy.init(KEY, six(0), lwf_batch(0, told=told))
    for task in range(tasks):
        params, state = strategy.begin_task(KEY, six(task), state, np.int32(task))
        batch = lwf_batch(task, told=told, padding=padding)
        _, state = strategy.after_update(KEY, params, state, batch, six(8), six(9))
    return strategy.begin_task(KEY, six(tasks), state, np.int32(tasks))[1]


def distillation_by_hand(params, teacher, batch, groups, temperature):
    """Cross entropy of softened answers within each group of classes, and its gradient by the chain rule."""
    now, was = (logits_by_hand(p, batch.inputs) / temperature for p in (params, teacher))
    value, error = 0.0, np.zeros_like(now)
    for group in groups:
        target = softmax(was[:, group], axis=1)
        value = value - (target * log_softmax(now[:, group], axis=1)).sum(axis=1)
        error[:, group] += (softmax(now[:, group], axis=1) - target) / temperature
    gradient = np.average(chained(error, batch.inputs), axis=0, weights=batch.weights)
    return np.average(value * np.ones(len(error)), weights=batch.weights), gradient


@pytest.mark.core
@pytest.mark.parametrize(
    ("wrap", "told", "tasks", "temperature"),
    [
        (plain, True, 2, 2.0),
        (plain, False, 2, 2.0),
        (jax.jit, True, 1, 2.0),
        (jax.jit, True, 2, 1.0),
        (jax.jit, True, 2, 5.0),
        (jax.jit, False, 1, 5.0),
        (jax.jit, False, 2, 2.0),
    ],
)
def test_lwf_equals_a_softmax_for_each_old_task_or_one_in_all(wrap, told, tasks, temperature):
    groups = list(TASKS[:tasks]) if told else [[label for task in TASKS[:tasks] for label in task]]
    strategy = wrapped(lwf(apply, strength=0.6, temperature=temperature), wrap)
    state = lwf_state(strategy, told=told, tasks=tasks)
    params, batch = six(5), lwf_batch(tasks, told=told, seed=4, padding=1)
    grads, metrics = strategy.gradients(KEY, params, state, batch)
    value, gradient = distillation_by_hand(params, six(tasks), batch, groups, temperature)
    assert float(metrics["distillation"]) == pytest.approx(value, rel=1e-5)
    assert_close(flat(grads), mean_gradient(params, batch) + 0.6 * gradient)
    assert float(metrics["loss"]) == pytest.approx(
        float(naive(apply).gradients(KEY, params, (), batch)[1]["loss"]), rel=1e-6
    )


@both_ways
def test_lwf_in_its_first_task_is_naive(wrap):
    """Nothing is old: no distillation, and finite gradients, before the first step and within the task."""
    strategy, batch = wrapped(lwf(apply), wrap), lwf_batch(0, told=False)
    state = lwf_state(strategy, told=False, tasks=0)
    for _ in range(2):
        grads, metrics = strategy.gradients(KEY, six(3), state, batch)
        assert float(metrics["distillation"]) == 0
        assert_close(flat(grads), mean_gradient(six(3), batch))
        _, state = strategy.after_update(KEY, six(3), state, batch, grads, grads)


def test_lwf_keeps_its_teacher_and_old_classes_for_a_task():
    strategy = lwf(apply)
    state = lwf_state(strategy, told=True, tasks=1)
    for step in range(3):
        updates, after = strategy.after_update(KEY, six(20 + step), state, lwf_batch(1, told=True), six(1), six(2))
        np.testing.assert_array_equal(flat(updates), flat(six(2)))
        np.testing.assert_array_equal(flat(after.teacher), flat(six(1)))
        assert np.flatnonzero(after.old).tolist() == [0, 3]
        assert np.flatnonzero(after.seen).tolist() == [0, 1, 3, 4]
        state = after
    params, state = strategy.begin_task(KEY, six(30), state, np.int32(2))
    np.testing.assert_array_equal(flat(params), flat(six(30)))
    np.testing.assert_array_equal(flat(state.teacher), flat(six(30)))
    assert np.flatnonzero(state.old).tolist() == [0, 1, 3, 4]


def test_lwf_rows_that_only_fill_up_are_not_seen():
    strategy = lwf(apply)
    state = strategy.init(KEY, six(0), lwf_batch(0, told=False))
    batch = lwf_batch(0, told=False, labels=[0, 0, 5, 5], padding=2)
    _, state = strategy.after_update(KEY, six(0), state, batch, six(1), six(1))
    assert np.flatnonzero(state.seen).tolist() == [0]
    assert np.flatnonzero(state.rivals.any(axis=1)).tolist() == [0]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_lwf_of_large_logits_stays_finite(told, scale):
    strategy = wrapped(lwf(apply), jax.jit)
    state = lwf_state(strategy, told=told, tasks=2)._replace(teacher=six(6, scale))
    grads, metrics = strategy.gradients(KEY, six(5, scale), state, lwf_batch(2, told=told))
    assert np.isfinite(flat(grads)).all()
    assert np.isfinite(list(metrics.values())).all()


def test_lwf_gradient_is_zero_where_the_answers_are_the_teachers():
    strategy, batch = lwf(apply), lwf_batch(2, told=True)
    state = lwf_state(strategy, told=True, tasks=2)
    grads, metrics = strategy.gradients(KEY, state.teacher, state, batch)
    assert_close(flat(grads), mean_gradient(state.teacher, batch), 1e-6)
    assert float(metrics["distillation"]) > 0.1


# Whole runs


STRATEGIES = {
    "ewc": lambda: ewc(apply, strength=2.0),
    "online_ewc": lambda: online_ewc(apply, strength=2.0, decay=0.7),
    "si": lambda: si(apply, strength=0.1, damping=0.1),
    "lwf": lambda: lwf(apply, strength=1.5),
}
PROGRAMS = {
    "ewc": {"observe": 1, "end_task": 1},
    "online_ewc": {"observe": 1, "end_task": 1},
    "si": {"end_task": 1},
    "lwf": {"begin_task": 1},
}


class ByHand:
    """Softmax regression in float64 by gradient descent, with what a method adds."""

    def __init__(self, params, stream, rate):
        self.w, self.stream, self.rate = flat(params), stream, rate
        self.anchor, self.importance, self.path = self.w, 0.0, 0.0

    def params(self, w=None):
        w = self.w if w is None else w
        return {"bias": w[:6], "kernel": w[6:].reshape(4, 6)}

    def batch(self, rows, tasks):
        images = self.stream.train.inputs[rows]
        inputs = np.stack([self.shown(image, task) for image, task in zip(images, tasks, strict=True)])
        return Batch(
            inputs, self.stream.train.labels[rows], np.ones(len(rows)), self.stream.eligible[tasks], np.int32(tasks[0])
        )

    def shown(self, image, task):
        orders = self.stream.view_table
        return image.ravel()[np.asarray(orders)[task]] if len(orders) else image.ravel()

    def begin(self, stage):
        pass

    def extra(self, batch):
        return 0.0

    def step(self, batch):
        own = mean_gradient(self.params(), batch)
        update = -self.rate * (own + self.extra(batch))
        self.path = self.path - own * update
        self.w = self.w + update

    def end(self, batch):
        pass


class EwcByHand(ByHand):
    fishers, ends = (), ()

    def extra(self, batch):
        earlier = zip(self.fishers, self.ends, strict=True)
        return sum((2.0 * fisher * (self.w - end) for fisher, end in earlier), np.zeros(30))

    def end(self, batch):
        self.fishers, self.ends = (*self.fishers, fisher_by_hand(self.params(), batch)), (*self.ends, self.w)


class OnlineEwcByHand(ByHand):
    def extra(self, batch):
        return 2.0 * self.importance * (self.w - self.anchor)

    def end(self, batch):
        self.importance = 0.7 * self.importance + fisher_by_hand(self.params(), batch)
        self.anchor = self.w


class SiByHand(ByHand):
    def extra(self, batch):
        return 0.2 * self.importance * (self.w - self.anchor)

    def end(self, batch):
        self.importance = np.maximum(self.importance + self.path / ((self.w - self.anchor) ** 2 + 0.1), 0)
        self.anchor, self.path = self.w, 0.0


class LwfByHand(ByHand):
    groups = ()

    def begin(self, stage):
        self.teacher = self.params()

    def extra(self, batch):
        return 1.5 * distillation_by_hand(self.params(), self.teacher, batch, self.groups, 2.0)[1]

    def end(self, batch):
        own = sorted(set(batch.labels.tolist()))
        if self.stream.task_known:
            self.groups = [*self.groups, own]
        else:
            self.groups = [sorted({*own, *(label for group in self.groups for label in group)})]


BY_HAND = {"ewc": EwcByHand, "online_ewc": OnlineEwcByHand, "si": SiByHand, "lwf": LwfByHand}


def loop_by_hand(learner, key, stream, epochs=2):
    """The documented loop, in batches of 4."""
    bits = np.ravel(jax.random.key_data(key)).tolist()
    for stage, (rows, tasks) in enumerate(stream.train_sets):
        learner.begin(stage)
        for epoch in range(epochs):
            order = np.random.default_rng([*bits, stage, epoch]).permutation(len(rows))
            for start in range(0, len(order), 4):
                part = order[start : start + 4]
                learner.step(learner.batch(rows[part], tasks[part]))
        learner.end(learner.batch(rows, tasks))
    return learner.w


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "kind", "steps_per_call", "together"),
    [
        ("ewc", "class", 64, False), ("ewc", "class", 3, True),
        ("online_ewc", "class", 1, False), ("online_ewc", "permuted", 3, True),
        ("si", "class", 64, False), ("si", "task", 3, True),
        ("lwf", "class", 1, False), ("lwf", "task", 3, True),
    ],
)  # fmt: skip
def test_runs_equal_a_loop_in_numpy_however_steps_and_seeds_are_grouped(name, kind, steps_per_call, together, one_core):
    """With the data's labels in the Fisher information, every method here is a function of the order of examples.

    Two seeds, whose stages differ in length: one that is through must not move, though the penalty still pulls.
    """
    strategies = STRATEGIES | {
        "ewc": lambda: ewc(apply, strength=2.0, labels="data"),
        "online_ewc": lambda: online_ewc(apply, strength=2.0, decay=0.7, labels="data"),
    }
    several, params, keys = [make_stream(kind, key) for key in (3, 4)], [probe(0), probe(1)], jax.random.split(KEY, 2)
    results = run_seeds(
        keys, strategies[name](), optax.sgd(0.2), params, several,
        epochs=2, batch_size=4, steps_per_call=steps_per_call, together=together,
    )  # fmt: skip
    for key, initial, stream, result in zip(keys, params, several, results, strict=True):
        assert_close(flat(result.params), loop_by_hand(BY_HAND[name](initial, stream, 0.2), key, stream))
        assert result.compilations == ONCE | PROGRAMS[name]
        assert np.isfinite([value for entry in result.history for value in entry.values()]).all()


def test_drawn_labels_do_not_depend_on_how_steps_and_seeds_are_grouped(one_core):
    several, params, keys = (
        [make_stream("class", key) for key in (3, 4)],
        [probe(0), probe(1)],
        jax.random.split(KEY, 2),
    )
    in_turn, together = (
        run_seeds(
            keys, STRATEGIES["ewc"](), optax.sgd(0.2), params, several,
            epochs=1, batch_size=4, steps_per_call=steps, together=together,
        )
        for steps, together in ((1, False), (3, True))
    )  # fmt: skip
    for one, other in zip(in_turn, together, strict=True):
        np.testing.assert_array_equal(one.accuracy, other.accuracy)
        for left, right in zip(jax.tree.leaves(one.strategy_state), jax.tree.leaves(other.strategy_state), strict=True):
            assert_close(left, right)
        assert flat(one.strategy_state.importance).max() > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_bfloat16_parameters(name):
    """What is summed up is kept in float32, so that no program changes its types and compiles again."""
    result = run(
        KEY, STRATEGIES[name](), optax.sgd(0.05, momentum=0.5), probe(dtype=jnp.bfloat16), make_stream("class"),
        epochs=2, batch_size=4, steps_per_call=3,
    )  # fmt: skip
    assert result.params["kernel"].dtype == jnp.bfloat16
    assert result.compilations == ONCE | PROGRAMS[name]
    assert np.isfinite([value for entry in result.history for value in entry.values()]).all()
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(result.strategy_state))


def test_fisher_of_bfloat16_parameters_is_summed_in_float32():
    """300 equal examples: a sum in bfloat16 stalls at 256 times its term."""
    params = {"bias": jnp.zeros(2, jnp.bfloat16)}
    batch = Batch(np.zeros((300, 1)), np.zeros(300, np.int32), np.ones(300), np.ones((300, 2), bool), np.int32(0))

    def constant(params, inputs):
        return jnp.zeros((len(inputs), 2), params["bias"].dtype) + params["bias"]

    strategy = ewc(constant, strength=1.0, labels="data", examples_at_a_time=1)
    state = strategy.observe(KEY, params, strategy.init(KEY, params, batch), batch)
    np.testing.assert_allclose(state.squares["bias"], [75, 75], rtol=1e-6)


# Bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ewc(apply, strength=-1.0), "strength: got -1.0; pass 0 or more"),
        (lambda: ewc(apply, strength=float("nan")), "strength: got nan; pass 0 or more"),
        (lambda: ewc(apply, strength=1.0, labels="both"), "labels: got 'both'; choose one of 'model', 'data'"),
        (lambda: ewc(apply, strength=1.0, examples_at_a_time=0), "examples_at_a_time: got 0; pass 1 or more"),
        (lambda: online_ewc(apply, strength=-1.0), "strength: got -1.0; pass 0 or more"),
        (lambda: online_ewc(apply, strength=1.0, decay=1.5), "decay: got 1.5; pass a number from 0 to 1"),
        (lambda: si(apply, strength=-1.0), "strength: got -1.0; pass 0 or more"),
        (lambda: si(apply, strength=1.0, damping=0.0), "damping: got 0.0; pass 1e-12 or more"),
        (lambda: lwf(apply, strength=-1.0), "strength: got -1.0; pass 0 or more"),
        (lambda: lwf(apply, temperature=0.0), "temperature: got 0.0; pass a number from 0.001 to 1000.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
