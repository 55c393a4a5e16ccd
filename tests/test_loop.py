"""The loop against a second one in NumPy, and what it calls, when, with what, and how often it compiles."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from jaxcl.continual import Examples, Strategy, linear_probe, loop, run, run_seeds, streams

pytestmark = pytest.mark.core

ONCE = {"start": 1, "train": 1, "evaluate": 1}
KEY = jax.random.key(9)


def uneven_examples(sizes, width=4, seed=0):
    """`sizes[c]` examples of class c, in random order, each near its class's own mean."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    means = random.normal(size=(len(sizes), width))
    return Examples((means[labels] + random.normal(size=(len(labels), width))).astype(np.float32), labels)


TRAIN = uneven_examples([3, 8, 5, 9, 2, 6])
TEST = uneven_examples([4, 2, 3, 5, 2, 4], seed=1)


def make_stream(key=None, *, told=False, train=TRAIN, test=TEST, classes_per_task=2):
    make = streams.task_incremental if told else streams.class_incremental
    return make(None if key is None else jax.random.key(key), train, test, classes_per_task=classes_per_task)


def probe(width=4, classes=6, seed=0):
    random = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(random.normal(size=(width, classes)), jnp.float32),
        "bias": jnp.asarray(random.normal(size=classes), jnp.float32),
    }


def assert_results_close(left, right, tolerance=1e-5):
    np.testing.assert_array_equal(left.accuracy, right.accuracy)
    np.testing.assert_array_equal(left.untrained, right.untrained)
    assert [list(entry) for entry in left.history] == [list(entry) for entry in right.history]
    for ours, theirs in zip(left.history, right.history, strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(jax.tree.leaves(left.params), jax.tree.leaves(right.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# A second loop, in NumPy


class NumpyProbe:
    """Softmax regression by gradient descent in float64."""

    def __init__(self, params, stream, rate, smoothing):
        self.kernel, self.bias = np.float64(params["kernel"]), np.float64(params["bias"])
        self.stream, self.rate, self.smoothing = stream, rate, smoothing

    def logits(self, examples, rows, tasks):
        logits = np.float64(examples.inputs[rows]) @ self.kernel + self.bias
        return np.where(self.stream.eligible[tasks], logits, -np.inf)

    def right(self, examples, rows, tasks):
        return np.argmax(self.logits(examples, rows, tasks), axis=1) == examples.labels[rows]

    def step(self, rows, tasks):
        """Updates; returns the examples' losses and whether they were right before the update."""
        examples, eligible = self.stream.train, self.stream.eligible[tasks]
        logs = log_softmax(self.logits(examples, rows, tasks), axis=1)
        one_hot = np.eye(eligible.shape[1])[examples.labels[rows]]
        target = (1 - self.smoothing) * one_hot + self.smoothing * eligible / eligible.sum(axis=1, keepdims=True)
        losses = -np.where(eligible, target * np.where(eligible, logs, 0), 0).sum(axis=1)
        right = self.right(examples, rows, tasks)
        error = (np.exp(logs) - target) / len(rows)
        self.kernel -= self.rate * np.float64(examples.inputs[rows]).T @ error
        self.bias -= self.rate * error.sum(axis=0)
        return losses, right

    def accuracies(self):
        return [self.right(self.stream.test, *part).mean() for part in self.stream.test_sets]


def numpy_run(key, params, stream, *, epochs, batch_size, rate, smoothing):
    """The documented loop: shuffle by (key, stage, epoch), cut into batches, test after each stage."""
    learner = NumpyProbe(params, stream, rate, smoothing)
    bits = [int(word) for word in np.ravel(jax.random.key_data(key))]
    untrained, accuracy, history = learner.accuracies(), [], []
    for stage, part in enumerate(stream.train_sets):
        for epoch in range(epochs):
            order = np.random.default_rng([*bits, stage, epoch]).permutation(len(part.rows))
            seen = [
                learner.step(
                    part.rows[order[start : start + batch_size]], part.tasks[order[start : start + batch_size]]
                )
                for start in range(0, len(order), batch_size)
            ]
            losses, right = (np.concatenate(parts) for parts in zip(*seen, strict=True))
            history.append({"stage": stage, "epoch": epoch, "accuracy": right.mean(), "loss": losses.mean()})
        accuracy.append(learner.accuracies())
    return learner, np.asarray(untrained), np.asarray(accuracy), history


STREAMS = {
    "class": lambda: make_stream(3),
    "task": lambda: make_stream(3, told=True),
    "joint": lambda: streams.joint(make_stream(3, told=True)),
    "permuted": lambda: streams.permuted(jax.random.key(1), TRAIN, TEST, tasks=2),
}


@pytest.mark.parametrize(
    ("kind", "steps_per_call"), [("class", 1), ("class", 3), ("class", 64), ("task", 3), ("joint", None)]
)
def test_run_equals_a_loop_in_numpy(kind, steps_per_call):
    """Stages of 6 to 17 examples in batches of 4: ragged last batches, and stages of unequal length."""
    stream, params, key = STREAMS[kind](), probe(), jax.random.key(7)
    result = run(
        key, linear_probe(label_smoothing=0.1), optax.sgd(0.3), params, stream,
        epochs=3, batch_size=4, steps_per_call=steps_per_call, evaluation_batch_size=3,
    )  # fmt: skip
    learner, untrained, accuracy, history = numpy_run(
        key, params, stream, epochs=3, batch_size=4, rate=0.3, smoothing=0.1
    )
    np.testing.assert_allclose(result.params["kernel"], learner.kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.params["bias"], learner.bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.untrained, untrained, rtol=1e-12)
    np.testing.assert_allclose(result.accuracy, accuracy, rtol=1e-12)
    assert accuracy.shape == ((1 if kind == "joint" else 3), 3)
    assert [sorted(entry) for entry in result.history] == [sorted(entry) for entry in history]
    for ours, theirs in zip(result.history, history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert result.compilations == ONCE


def test_a_permuted_stream_is_the_run_on_permuted_copies():
    """Each task's view applied beforehand: the NumPy loop on copied data, tasks one behind the other."""
    stream, params, key = STREAMS["permuted"](), probe(), jax.random.key(2)
    result = run(key, linear_probe(), optax.sgd(0.1), params, stream, epochs=2, batch_size=7)
    orders = np.asarray(stream.view_table)
    copies = [
        Examples(np.concatenate([data.inputs[:, o] for o in orders]), np.tile(data.labels, 2)) for data in (TRAIN, TEST)
    ]
    sets = [
        tuple(streams.Selection(part.rows + task * len(part.rows), part.tasks) for task, part in enumerate(parts))
        for parts in (stream.train_sets, stream.test_sets)
    ]
    copied = stream._replace(train=copies[0], test=copies[1], train_sets=sets[0], test_sets=sets[1])
    learner, untrained, accuracy, _ = numpy_run(key, params, copied, epochs=2, batch_size=7, rate=0.1, smoothing=0.0)
    np.testing.assert_allclose(result.params["kernel"], learner.kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.untrained, untrained)
    np.testing.assert_allclose(result.accuracy, accuracy)


def usual_run(params, **options):
    options = {"epochs": 1, "batch_size": 8} | options
    return run(jax.random.key(0), linear_probe(), optax.adam(0.1), params, make_stream(), **options)


@pytest.fixture(scope="module")
def usual():
    return usual_run(probe())


def test_the_size_of_test_batches_does_not_matter(usual):
    assert_results_close(usual, usual_run(probe(), evaluation_batch_size=3), 0)


def test_parameters_are_not_consumed_and_runs_are_bit_identical(usual):
    """What was passed in can be read afterwards, and run again to the same bits; NumPy parameters do as well."""
    params, before = probe(), jax.tree.map(np.array, probe())
    assert_results_close(usual, usual_run(params), 0)
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert_results_close(usual, usual_run(before), 0)


def test_a_strategy_may_keep_the_parameters_in_its_state():
    """An anchor, as in regularisation methods: it holds the initial values while the parameters move on.

    Its bytes count: 120 of parameters, as many of the anchor, and 10 of int8.
    """
    strategy = linear_probe()._replace(
        init=lambda key, params, batch: {"anchor": params, "bits": jnp.zeros(10, jnp.int8)}
    )
    result = run(jax.random.key(0), strategy, optax.sgd(0.1), probe(), make_stream(), epochs=1, batch_size=8)
    assert (result.parameters, result.bytes) == (30, 120 + 120 + 10)
    np.testing.assert_array_equal(result.strategy_state["anchor"]["kernel"], probe()["kernel"])
    assert not np.array_equal(result.params["kernel"], probe()["kernel"])


def test_sizes_count_parameters_and_bytes(usual):
    """4 x 6 + 6 = 30 scalars of 4 bytes; Adam's moments are the optimizer's and not counted."""
    assert (usual.parameters, usual.bytes) == (30, 120)


# Several seeds


def seeds_and_streams(shared):
    """Three class orders of unequal classes: 9 to 17 examples a stage, so the seeds differ in batches."""
    copies = [(TRAIN, TEST) if shared else (Examples(*TRAIN), Examples(*TEST)) for _ in range(3)]
    several = [make_stream(seed, train=train, test=test) for seed, (train, test) in enumerate(copies)]
    batches = [[-(-len(part.rows) // 4) for part in stream.train_sets] for stream in several]
    assert any(len(set(stage)) > 1 for stage in zip(*batches, strict=True))
    return jax.random.split(jax.random.key(4), 3), [probe(seed=seed) for seed in range(3)], several


def adam_on(keys, params, several, **options):
    strategy = linear_probe(label_smoothing=0.1)
    return run_seeds(keys, strategy, optax.adam(0.05), params, several, epochs=2, batch_size=4, **options)


@pytest.fixture(scope="module")
def in_turn():
    return adam_on(*seeds_and_streams(True))


def test_seeds_in_turn_equal_a_seed_alone(in_turn):
    keys, params, several = seeds_and_streams(True)
    alone = adam_on(keys[2:], params[2:], several[2:])[0]
    assert_results_close(in_turn[2], alone, 1e-6)
    assert alone.compilations == ONCE
    assert all(result.compilations == ONCE for result in in_turn)


@pytest.mark.parametrize(("seeds", "cores", "size", "alone", "expected"), [
    (8, 1, 0, False, (8, 1)), (8, 2, 0, False, (4, 2)), (8, 2, 30_000, False, (4, 2)), (5, 2, 30_000, False, (3, 2)),
    (8, 2, 40_000, False, (2, 2)), (8, 2, 2**17, False, (1, 2)), (8, 2, 2**30, False, (1, 2)),
    (8, 2, 30_000, True, (1, 2)), (1, 2, 30_000, False, (1, 1)), (3, 8, 30_000, False, (1, 3)),
])  # fmt: skip
def test_small_networks_share_steps_and_all_cores_have_work(seeds, cores, size, alone, expected, monkeypatch):
    monkeypatch.setattr(loop, "_cores", lambda: cores)
    assert loop._grouping(seeds, size, None, in_turn=False, alone=alone) == expected
    assert loop._grouping(seeds, size, None, in_turn=True, alone=alone) == (1, 1)


@pytest.mark.parametrize("alone", [False, True])
def test_an_accelerator_has_all_seeds_in_one_step(alone, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert loop._grouping(8, 2**30, None, in_turn=False, alone=alone) == ((1, 1) if alone else (8, 1))


@pytest.mark.parametrize(
    ("shared", "steps_per_call", "cores", "size"),
    [(True, 1, 1, 2**17), (True, 3, 2, 2**17), (True, 3, 2, 0), (False, 64, 3, 2**17), (False, 1, 1, 0)],
)
def test_seeds_together_equal_seeds_in_turn(in_turn, shared, steps_per_call, cores, size, monkeypatch):
    """Adam would move on a zero gradient: a seed that has run out of batches must not take a step at all.

    Three seeds on one core are one group, on two a pair and a seed with a copy of itself, on more one each; and so are
    seeds too large to share a step.
    """
    monkeypatch.setattr(loop, "_cores", lambda: cores)
    monkeypatch.setattr(loop, "_SHARED_STEP_BYTES", size)
    together = adam_on(*seeds_and_streams(shared), together=True, steps_per_call=steps_per_call)
    for ours, theirs in zip(together, in_turn, strict=True):
        assert_results_close(ours, theirs)
        assert (ours.parameters, ours.bytes) == (theirs.parameters, theirs.bytes) == (30, 120)
        assert ours.examples == theirs.examples == 2 * len(TRAIN.labels)
        assert ours.compilations == ONCE


# Compilations


def many_classes(count):
    """1 to 4 training examples a class, so 2 to 8 a task of two classes."""
    train = uneven_examples([1 + (7 * c) % 4 for c in range(count)], width=3)
    return train, uneven_examples([1 + c % 2 for c in range(count)], width=3, seed=1)


@pytest.mark.parametrize(
    ("tasks", "steps_per_call", "seeds", "together"),
    [(5, 1, 1, False), (50, 1, 1, False), (50, 2, 2, False), (50, 4, 2, True)],
)
def test_many_tasks_compile_each_program_once(tasks, steps_per_call, seeds, together):
    train, test = many_classes(2 * tasks)
    several = [make_stream(seed, train=train, test=test) for seed in range(seeds)]
    assert len({len(part.rows) for stream in several for part in stream.train_sets}) > 1
    results = run_seeds(
        jax.random.split(jax.random.key(0), seeds), linear_probe(), optax.sgd(0.1), [probe(3, 2 * tasks)] * seeds,
        several, epochs=1, batch_size=3, together=together, steps_per_call=steps_per_call,
    )  # fmt: skip
    for result in results:
        assert result.accuracy.shape == (tasks, tasks)
        assert result.compilations == ONCE


# A strategy that writes down what it is called with

BEGIN, UPDATE, REFRESH, OBSERVE, END = 1, 2, 3, 4, 5


def note(state, *entry):
    log, position = state
    return log.at[position].set(jnp.stack([jnp.asarray(value, jnp.float32) for value in entry])), position + 1


def note_batch(code, state, params, batch, *rest):
    """Code, task, w, examples, ids seen, something else; ids are powers of two, so sums name them."""
    ids = (batch.weights * batch.inputs[:, 0]).sum()
    return note(state, code, batch.task, params["w"], batch.weights.sum(), ids, *rest)


def recorder(refresh_every):
    """w loses twice its number of examples a step; begin, refresh and end add 1,000, 10,000 and 100,000 to it."""

    def add(params, amount):
        return {"w": params["w"] + amount}

    def init(key, params, batch):
        assert (batch.inputs.shape, batch.inputs.dtype) == ((2, 1), jnp.float32)
        assert (batch.labels.shape, batch.weights.shape, batch.task.shape) == ((2,), (2,), ())
        assert (batch.eligible.shape, batch.eligible.dtype) == ((2, 2), bool)
        return note((jnp.zeros((64, 6)), jnp.int32(0)), 0, 0, params["w"], 0, 0, 0)

    def gradients(key, params, state, batch):
        return {"w": batch.weights.sum()}, {"ids": (batch.weights * batch.inputs[:, 0]).sum() / batch.weights.sum()}

    def after_update(key, params, state, batch, grads, updates):
        return {"w": 2 * updates["w"]}, note_batch(UPDATE, state, params, batch, updates["w"])

    return Strategy(
        gradients=gradients,
        predict=lambda params, state, inputs, task: jnp.zeros((len(inputs), 2)),
        init=init,
        begin_task=lambda key, params, state, task: (
            add(params, 1_000), note(state, BEGIN, task, params["w"], 0, 0, 0)
        ),
        after_update=after_update,
        refresh=lambda key, params, state, batch: (
            add(params, 10_000), note_batch(REFRESH, state, params, batch, len(batch.labels))
        ),
        observe=lambda key, params, state, batch: note_batch(OBSERVE, state, params, batch, len(batch.labels)),
        end_task=lambda key, params, state: (add(params, 100_000), note(state, END, 0, params["w"], 0, 0, 0)),
        refresh_every=refresh_every,
    )  # fmt: skip


def eight_ids(first_class):
    """Eight examples whose input is 2 ** row: `first_class` of class 0, the others of class 1."""
    ids = Examples((2.0 ** np.arange(8, dtype=np.float32))[:, None], np.repeat([0, 1], [first_class, 8 - first_class]))
    return make_stream(train=ids, test=ids, classes_per_task=1)


def expected_log(key, stream, *, epochs, batch_size, refresh_every):
    """The documented order of events, in plain Python."""
    bits = [int(word) for word in np.ravel(jax.random.key_data(key))]
    w, log = 0.0, [[0] * 6]

    def batches(task, part, epoch):
        rows = part.rows[np.random.default_rng([*bits, task, epoch]).permutation(len(part.rows))]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield len(batch), sum(2.0**row for row in batch)

    for task, part in enumerate(stream.train_sets):
        log.append([BEGIN, task, w, 0, 0, 0])
        w, taken = w + 1_000, 0
        for epoch in range(epochs):
            for count, ids in batches(task, part, epoch):
                log.append([UPDATE, task, w, count, ids, -count])
                w, taken = w - 2 * count, taken + 1
                if refresh_every and taken % refresh_every == 0:
                    log.append([REFRESH, task, w, count, ids, batch_size])
                    w += 10_000
        log += [[OBSERVE, task, w, count, ids, batch_size] for count, ids in batches(task, part, epochs)]
        log.append([END, 0, w, 0, 0, 0])
        w += 100_000
    return w, log


@pytest.mark.parametrize(("refresh_every", "steps_per_call"), [(0, 1), (3, 1), (4, 1), (2, 3), (5, 64), (100, 2)])
def test_every_member_is_called_at_its_step_with_its_arguments(refresh_every, steps_per_call):
    """Tasks of 5 and 3 examples in batches of 2: 3 and 2 steps an epoch, 6 and 4 a task. So 3 divides an epoch of the
    first task, 2 one of the second; 4 and 5 divide neither epoch, and 100 never comes."""
    key, stream = jax.random.key(9), eight_ids(5)
    result = run(
        key, recorder(refresh_every), optax.sgd(1.0), {"w": jnp.float32(0)}, stream,
        epochs=2, batch_size=2, steps_per_call=steps_per_call,
    )  # fmt: skip
    w, log = expected_log(key, stream, epochs=2, batch_size=2, refresh_every=refresh_every)
    entries, count = result.strategy_state
    np.testing.assert_array_equal(entries[: int(count)], log)
    assert float(result.params["w"]) == w
    refreshed = any(code == REFRESH for code, *_ in log)
    optional = {"refresh": 1} if refreshed else {}
    assert result.compilations == ONCE | {"begin_task": 1, "observe": 1, "end_task": 1} | optional
    assert result.examples == 2 * 8


@pytest.mark.parametrize(
    ("cores", "steps_per_call", "refresh_every"), [(1, 1, 0), (1, 64, 0), (2, 3, 0), (1, 3, 2), (2, 1, 2)]
)
def test_seeds_together_call_every_member_for_each_seed(cores, steps_per_call, refresh_every, monkeypatch):
    """5 and 3 examples for one seed, 2 and 6 for the other: each log is the one of the seed alone, without the other's
    steps and without batches to observe that are only the other's."""
    monkeypatch.setattr(loop, "_cores", lambda: cores)
    keys, several = jax.random.split(jax.random.key(1), 2), [eight_ids(5), eight_ids(2)]
    results = run_seeds(
        keys, recorder(refresh_every), optax.sgd(1.0), [{"w": jnp.float32(0)}] * 2, several,
        epochs=2, batch_size=2, together=True, steps_per_call=steps_per_call,
    )  # fmt: skip
    for key, stream, result in zip(keys, several, results, strict=True):
        w, log = expected_log(key, stream, epochs=2, batch_size=2, refresh_every=refresh_every)
        entries, count = result.strategy_state
        np.testing.assert_array_equal(entries[: int(count)], log)
        assert float(result.params["w"]) == w
        optional = {"refresh": 1} if refresh_every else {}
        assert result.compilations == ONCE | {"begin_task": 1, "observe": 1, "end_task": 1} | optional


def test_every_call_draws_from_a_key_of_its_own():
    """One number a call, kept by its member in the state (`gradients` hands its own over as a metric)."""

    def draw(key):
        return jax.random.uniform(key)

    def kept(key, params, state, *_):
        draws, position = state
        return params, (draws.at[position].set(draw(key)), position + 1)

    strategy = Strategy(
        gradients=lambda key, params, state, batch: ({"w": jnp.float32(0)}, {"draw": draw(key)}),
        predict=lambda params, state, inputs, task: jnp.zeros((len(inputs), 2)),
        init=lambda key, params, batch: (jnp.zeros(64).at[0].set(draw(key)), jnp.int32(1)),
        begin_task=kept,
        after_update=lambda key, params, state, batch, grads, updates: kept(key, updates, state),
        refresh=kept,
        observe=lambda key, params, state, batch: kept(key, params, state)[1],
        end_task=kept,
        refresh_every=2,
    )
    result = run(
        jax.random.key(0), strategy, optax.sgd(0.1), {"w": jnp.float32(0)}, eight_ids(5), epochs=4, batch_size=4
    )
    draws, count = result.strategy_state
    # init, and for each of two tasks, of two batches and of one: begin, updates, refreshes, observations, end
    assert int(count) == 1 + (1 + 8 + 4 + 2 + 1) + (1 + 4 + 2 + 1 + 1)
    every = [*np.asarray(draws[: int(count)]).tolist(), *(entry["draw"] for entry in result.history)]
    assert len(set(every)) == len(every) == 26 + 8


# What is measured


def stub(predict, **members):
    """A strategy that learns nothing; `predict` is the test's. Its metric is NaN for a batch that only fills up."""

    def gradients(key, params, state, batch):
        return jax.tree.map(jnp.zeros_like, params), {"mean": jnp.average(batch.inputs[:, 0], weights=batch.weights)}

    return Strategy(gradients, predict, **members)


def test_accuracy_matrix_counts_right_answers_after_each_stage():
    """Inputs are (label, stage from which on it is answered rightly); the counts are NumPy's on that rule."""
    labels, since = np.arange(9) % 3, np.asarray([0, 1, 2, 9, 1, 1, 2, 0, 9])
    test = Examples(np.column_stack([labels, since]).astype(np.float32), labels)
    train = Examples(np.zeros((6, 2), np.float32), np.arange(6) % 3)

    def predict(params, state, inputs, task):
        assert task is None  # class-incremental: the method is not told
        wrong = inputs[:, 1] > state
        return jax.nn.one_hot((inputs[:, 0].astype(int) + wrong) % 3, 3)

    strategy = stub(
        predict,
        init=lambda key, params, batch: jnp.float32(-1),
        begin_task=lambda key, params, state, task: (params, task.astype(jnp.float32)),
    )
    result = run(
        jax.random.key(0), strategy, optax.sgd(0.1), {"w": jnp.zeros(2)},
        make_stream(train=train, test=test, classes_per_task=1),
        epochs=1, batch_size=4, evaluation_batch_size=2,
    )  # fmt: skip
    by_task = since.reshape(3, 3).T  # [task, example], as labels go 0, 1, 2, 0, ...
    np.testing.assert_array_equal(result.accuracy, [(by_task <= stage).mean(axis=1) for stage in range(3)])
    np.testing.assert_array_equal(result.untrained, [0, 0, 0])
    # Written out: since is (0, 9, 2) for task 0, (1, 1, 0) for task 1 and (2, 1, 9) for task 2.
    assert result.accuracy.tolist() == [[1 / 3, 1 / 3, 0], [1 / 3, 1, 1 / 3], [2 / 3, 1, 2 / 3]]


def test_task_incremental_tells_the_task():
    """`predict` answers the task's first class, so a task's accuracy is the share of that class in its test set:
    4 of 6, 3 of 8 and 2 of 6 in TEST. Ineligible classes score higher and must not win."""

    def predict(params, state, inputs, task):
        classes = jnp.arange(6)
        logits = jnp.where(classes == 2 * task, 1.0, jnp.where(classes // 2 == task, 0.0, 5.0))
        return jnp.broadcast_to(logits, (len(inputs), 6))

    result = run(
        jax.random.key(0), stub(predict), optax.sgd(0.1), {"w": jnp.zeros(2)}, make_stream(told=True),
        epochs=1, batch_size=16,
    )  # fmt: skip
    np.testing.assert_allclose(result.accuracy, [[4 / 6, 3 / 8, 2 / 6]] * 3)
    np.testing.assert_allclose(result.untrained, [4 / 6, 3 / 8, 2 / 6])


def predict_nothing(params, state, inputs, task):
    return jnp.zeros((len(inputs), 6))


@pytest.mark.parametrize("together", [False, True])
def test_history_holds_means_over_examples(together):
    """Batches of 4 leave ragged ones; the mean over the epoch is the mean of the task's rows whatever the batches."""
    keys, _, several = seeds_and_streams(True)
    results = run_seeds(
        keys, stub(predict_nothing), optax.sgd(0.1), [{"w": jnp.zeros(2)}] * 3, several,
        epochs=2, batch_size=4, together=together,
    )  # fmt: skip
    for stream, result in zip(several, results, strict=True):
        expected = [
            {"stage": stage, "epoch": epoch, "mean": TRAIN.inputs[part.rows, 0].mean()}
            for stage, part in enumerate(stream.train_sets)
            for epoch in range(2)
        ]
        assert [list(entry) for entry in result.history] == [list(entry) for entry in expected]
        for ours, theirs in zip(result.history, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_callback_is_told_each_epoch_of_each_seed_in_order():
    keys, params, several = seeds_and_streams(True)
    told, kernels = [], []

    def callback(progress):
        told.append(progress)
        kernels.append(np.array(progress.params["kernel"]))

    results = run_seeds(
        keys[:2], linear_probe(), optax.sgd(0.1), params[:2], several[:2],
        epochs=2, batch_size=4, callback=callback,
    )  # fmt: skip
    assert [progress[:6] for progress in told] == [
        (seed, 1, stage, 3, epoch, 2) for seed in range(2) for stage in range(3) for epoch in range(2)
    ]
    history = [entry for result in results for entry in result.history]
    assert [{"stage": p.stage, "epoch": p.epoch, **p.metrics} for p in told] == history
    assert [p.examples for p in told] == [len(several[p.seed].train_sets[p.stage].rows) for p in told]
    assert all(p.seconds > 0 for p in told)
    for progress in told:
        if progress.epoch == 0:
            assert progress.accuracy is None
        else:
            np.testing.assert_array_equal(progress.accuracy, results[progress.seed].accuracy[progress.stage])
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)
    for seed in range(2):
        np.testing.assert_array_equal(kernels[6 * seed + 5], results[seed].params["kernel"])


@pytest.mark.parametrize(("cores", "groups"), [(1, [(0, 3)]), (2, [(0, 2), (2, 1)]), (8, [(0, 1), (1, 1), (2, 1)])])
def test_callback_is_told_the_mean_over_seeds_trained_together(cores, groups, monkeypatch):
    """Each group in its order; the copies that fill the last group up are not told of and do not count."""
    monkeypatch.setattr(loop, "_cores", lambda: cores)
    keys, params, several = seeds_and_streams(True)
    told, inside = [], []

    def callback(progress):
        inside.append(1)
        assert len(inside) == 1  # one thread at a time
        told.append(progress)
        inside.pop()

    results = run_seeds(
        keys, linear_probe(), optax.sgd(0.1), params, several,
        epochs=1, batch_size=4, together=True, callback=callback,
    )  # fmt: skip
    assert len(told) == 3 * len(groups)
    for first, count in groups:
        mine = [progress for progress in told if progress.seed == first]
        assert [progress[:6] for progress in mine] == [(first, count, stage, 3, 0, 1) for stage in range(3)]
        own = range(first, first + count)
        for stage, progress in enumerate(mine):
            for name in ("loss", "accuracy"):
                mean = np.mean([results[seed].history[stage][name] for seed in own])
                assert progress.metrics[name] == pytest.approx(mean, rel=1e-6)
            assert progress.examples == sum(len(several[seed].train_sets[stage].rows) for seed in own)
            expected = np.mean([results[seed].accuracy[stage] for seed in own], axis=0)
            np.testing.assert_allclose(progress.accuracy, expected, rtol=1e-12)


def test_what_one_seed_raises_ends_the_others(monkeypatch):
    """Two seeds on two threads, each of which would be told 3 * 5,000 epochs."""
    monkeypatch.setattr(loop, "_cores", lambda: 2)
    keys, params, several = seeds_and_streams(True)
    told = []

    def callback(progress):
        told.append(progress.seed)
        if progress.seed == 1:
            raise FloatingPointError("of seed 1")

    with pytest.raises(FloatingPointError, match="of seed 1"):
        run_seeds(
            keys[:2], linear_probe(), optax.sgd(0.1), params[:2], several[:2],
            epochs=5000, batch_size=4, together=True, callback=callback,
        )  # fmt: skip
    assert told.count(1) == 1 and told.count(0) < 3 * 5000


@pytest.mark.parametrize("together", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(together, monkeypatch):
    monkeypatch.setattr(loop, "_cores", lambda: 1)
    keys, params, several = seeds_and_streams(True)
    params = [*params[:1], jax.tree.map(lambda leaf: leaf * np.nan, params[1])]
    with pytest.raises(FloatingPointError, match="loss: got nan in epoch 1 of task 1, seed 1; lower the learning rate"):
        run_seeds(
            keys[:2], linear_probe(), optax.sgd(0.1), params, several[:2], epochs=2, batch_size=4, together=together
        )


def test_seeds_on_threads_end_tasks_one_at_a_time(monkeypatch):
    """Where each might factorise a matrix: two at once on two threads have been seen to wait for ever."""
    monkeypatch.setattr(loop, "_cores", lambda: 2)
    running, most = [], []

    def slow(bias):
        running.append(0)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return bias

    def end_task(key, params, state):
        return params | {"bias": jax.pure_callback(slow, params["bias"], params["bias"])}, state

    strategy = linear_probe()._replace(end_task=end_task)
    keys, params, several = seeds_and_streams(True)
    run_seeds(
        keys[:2], strategy, optax.sgd(0.1), params[:2], several[:2], epochs=1, batch_size=4, together=True,
    )  # fmt: skip
    assert len(most) == 6 and max(most) == 1


# Bad arguments


def call(**changes):
    arguments = {
        "keys": jax.random.split(jax.random.key(0), 1),
        "strategy": linear_probe(),
        "tx": optax.sgd(0.1),
        "params": [probe()],
        "streams": [make_stream()],
        "epochs": 1,
        "batch_size": 4,
    }
    return run_seeds(**(arguments | changes))


def empty_at(field, task):
    """The usual stream with no rows in one of its sets."""
    stream = make_stream()
    parts = list(getattr(stream, field))
    parts[task] = streams.Selection(np.zeros(0, np.int32), np.zeros(0, np.int32))
    return stream._replace(**{field: tuple(parts)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: got 0; pass 1 or more"),
        ({"batch_size": 0}, "batch_size: got 0; pass 1 or more"),
        ({"steps_per_call": 0}, "steps_per_call: got 0; pass 1 or more"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size: got 0; pass 1 or more"),
        ({"params": [probe()] * 2}, "keys, params, streams: got 1, 2 and 1 of them; pass one of each a seed"),
        (
            {"streams": [], "params": [], "keys": jax.random.split(jax.random.key(0), 0)},
            "streams, their number: got 0; pass 1 or more",
        ),
        ({"streams": []}, "keys, params, streams: got 1, 1 and 0 of them; pass one of each a seed"),
        (
            {"streams": [empty_at("train_sets", 1)]},
            "stream.train_sets[1]: got no examples; leave the task out or give it examples",
        ),
        (
            {"streams": [empty_at("test_sets", 2)]},
            "stream.test_sets[2]: got no examples; leave the task out or give it examples",
        ),
        (
            {"streams": [make_stream()._replace(train_sets=())]},
            "stream.train_sets: got no task; pass a stream of one task or more",
        ),
        (
            {"streams": [make_stream()._replace(test_sets=())]},
            "stream.test_sets: got no task; pass a stream of one task or more",
        ),
        (
            {"strategy": linear_probe},
            "strategy: got type function; call what makes one, as naive(network.apply)",
        ),
        ({"tx": "adam"}, "tx: got type str; pass an optimizer, as optax.adam(1e-3)"),
        ({"streams": [TRAIN]}, "stream: got type Examples; make one by continual.streams, as class_incremental"),
        ({"checkpoint": "folder"}, "checkpoint: got type str; pass continual.Checkpoint(folder)"),
        ({"keys": jnp.arange(1)}, "key: got dtype int32; pass jax.random.key(0), or another number's"),
        ({"params": [probe(classes=5)]}, "logits: got shape (4, 5); the network must have 6 outputs, one a class"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as caught:
        call(**changes)
    assert str(caught.value) == message


def test_streams_that_are_not_alike_are_refused():
    keys, params = jax.random.split(jax.random.key(0), 2), [probe()] * 2
    with pytest.raises(ValueError, match=r"streams: got streams of several kinds; make them all by the same function"):
        call(keys=keys, params=params, streams=[make_stream(), make_stream(told=True)])
    with pytest.raises(ValueError, match=r"streams: got different numbers of tasks or classes; make them alike"):
        call(keys=keys, params=params, streams=[make_stream(), make_stream(classes_per_task=3)])


def test_weakly_typed_leaves_do_not_compile_a_second_time():
    strategy = linear_probe()._replace(
        init=lambda key, params, batch: 0.0,
        begin_task=lambda key, params, state, task: (params, state + jnp.float32(1)),
    )
    params = probe() | {"scale": jnp.asarray(1.0)}  # weakly typed, as the state 0.0 is
    (result,) = call(strategy=strategy, params=[params])
    assert result.compilations == {"start": 1, "begin_task": 1, "train": 1, "evaluate": 1}
    assert float(result.strategy_state) == 3.0  # one a task


# What is done to batches


def test_prepare_is_applied_before_the_view_in_training_and_testing():
    stream = streams.permuted(jax.random.key(0), TRAIN, TEST, tasks=3)
    scale = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    scaled = [Examples(part.inputs * np.asarray(scale), part.labels) for part in (TRAIN, TEST)]
    expected, found = (
        run(KEY, linear_probe(), optax.sgd(0.1), probe(), each, epochs=2, batch_size=4)
        for each in (
            streams.permuted(jax.random.key(0), *scaled, tasks=3),
            stream._replace(prepare=lambda inputs: inputs * scale),
        )
    )
    assert_results_close(found, expected)


def test_augment_is_applied_in_training_only():
    """Inputs of zeros leave the kernel as it was; tests still see the true ones."""
    stream = make_stream()._replace(augment=lambda key, inputs: 0 * inputs)
    params = probe()
    result = run(KEY, linear_probe(), optax.sgd(0.1), params, stream, epochs=2, batch_size=4)
    np.testing.assert_array_equal(result.params["kernel"], params["kernel"])
    last = stream.test_sets[-1].rows
    answers = np.argmax(TEST.inputs[last] @ params["kernel"] + result.params["bias"], axis=1)
    np.testing.assert_allclose(result.accuracy[-1, -1], np.mean(answers == TEST.labels[last]))


def test_augment_draws_anew_in_each_step_however_many_are_in_a_call():
    stream = make_stream()._replace(augment=lambda key, inputs: inputs + jax.random.normal(key, inputs.shape))
    one, three = (
        run(KEY, linear_probe(), optax.sgd(0.1), probe(), stream, epochs=2, batch_size=4, steps_per_call=steps)
        for steps in (1, 3)
    )
    assert_results_close(three, one)
    frozen = stream._replace(augment=lambda key, inputs: inputs + jax.random.normal(jax.random.key(0), inputs.shape))
    other = run(KEY, linear_probe(), optax.sgd(0.1), probe(), frozen, epochs=2, batch_size=4)
    assert not np.allclose(other.params["kernel"], one.params["kernel"])


def test_a_second_run_of_the_same_strategy_compiles_nothing():
    strategy, tx, stream = linear_probe(), optax.sgd(0.1), make_stream()
    first, second = (run(KEY, strategy, tx, probe(), stream, epochs=1, batch_size=4) for _ in range(2))
    assert first.compilations == ONCE and second.compilations == {}
    assert_results_close(first, second, tolerance=0)
