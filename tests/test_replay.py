"""The memory against a sequential reservoir in Python, and ER, DER++ and A-GEM against gradients by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, both_ways, plain
from scipy.special import log_softmax
from scipy.stats import chi2
from softmax import (
    KEY,
    ONCE,
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

from jaxcl.continual import Batch, a_gem, der_plus_plus, er, naive, run, run_seeds
from jaxcl.continual.strategies import does_nothing
from jaxcl.continual.strategies.replay import empty_memory, recall, remember


def numbered(start, count, *, weights=None):
    """Examples that say their number in everything that is kept of them."""
    numbers = np.arange(start, start + count)
    eligible = (numbers[:, None] >> np.arange(10)) % 2 == 1
    weights = np.ones(count) if weights is None else np.asarray(weights, float)
    return Batch(np.float32(numbers)[:, None], np.int32(numbers), np.float32(weights), eligible, np.int32(0))


def own_losses(params, batch):
    """Each example's own cross entropy [B]."""
    logits = np.where(batch.eligible, logits_by_hand(params, batch.inputs), -np.inf)
    return -log_softmax(logits, axis=1)[np.arange(len(logits)), batch.labels]


# The memory


def assert_memory_holds(memory, expected):
    """`expected` is the number in each slot, or None for an empty one."""
    numbers = np.asarray([-1 if number is None else number for number in expected])
    filled = numbers >= 0
    for kept in (memory.inputs[:, 0], memory.labels, np.asarray(memory.eligible) @ (1 << np.arange(10))):
        np.testing.assert_array_equal(np.asarray(kept)[filled], numbers[filled])
        assert not np.asarray(kept)[~filled].any()


def algorithm_r(slots, seen, batch, drawn):
    """Vitter's algorithm R, one example after another, on the same draws."""
    for number, weight, place in zip(batch.labels.tolist(), batch.weights, drawn, strict=True):
        if not weight:
            continue
        if seen < len(slots):
            slots[seen] = number
        elif place < len(slots):
            slots[place] = number
        seen += 1
    return seen


@pytest.mark.parametrize("size", [1, 3, 8, 40])
@both_ways
def test_remember_is_algorithm_r(wrap, size):
    """12 batches of 6, some rows of which have weight 0, into memories smaller and larger than a batch and than all.

    Each draw must be uniform over the n + 1 places that its example may take: the same call gives the same draw here.
    """
    memory, slots, seen, start = empty_memory(numbered(0, 6), size, logits=True), [None] * size, 0, 1
    patterns = [[1] * 6, [1, 0, 1, 1, 0, 0], [0] * 6, [0, 1, 1, 1, 1, 1]]
    for step in range(12):
        batch = numbered(start, 6, weights=patterns[step % 4])
        key = jax.random.fold_in(KEY, step)
        places = np.maximum(seen + np.cumsum(batch.weights > 0), 1).astype(np.int32)
        drawn = np.asarray(jax.random.randint(key, (6,), 0, places))
        seen = algorithm_r(slots, seen, batch, drawn)
        memory = wrap(remember)(key, memory, batch, jnp.float32(batch.eligible))
        assert int(memory.seen) == seen
        assert_memory_holds(memory, slots)
        np.testing.assert_array_equal(memory.logits, memory.eligible)
        start += 6
    assert seen == 3 * (6 + 3 + 0 + 5)
    assert memory.seen.dtype == jnp.int32


def test_a_memory_keeps_its_types_under_x64():
    with jax.enable_x64(True):
        memory = empty_memory(numbered(0, 6), 4, logits=False)
        after = jax.eval_shape(remember, KEY, memory, numbered(1, 6))
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, memory)


def test_of_several_examples_on_one_slot_the_last_stays():
    """A memory of one slot and a batch of 64: the last example whose draw is 0 is in it."""
    for seed in range(20):
        key, batch = jax.random.key(seed), numbered(1, 64)
        drawn = np.asarray(jax.random.randint(key, (64,), 0, np.arange(1, 65)))
        memory = jax.jit(remember)(key, empty_memory(batch, 1, logits=False), batch)
        assert int(memory.labels[0]) == 1 + np.flatnonzero(drawn == 0).max()
    assert memory.logits.shape == (1, 0)


def remember_all(key, memory, batches):
    for step, batch in enumerate(batches):
        memory = remember(jax.random.fold_in(key, step), memory, batch)
    return memory


@pytest.mark.parametrize("cuts", [[20], [5, 5, 5, 5], [3, 11, 6]])
def test_the_memory_is_a_uniform_sample(cuts):
    """4 of 20 examples, under 4,000 keys: each is kept in a fifth of them.

    A memory holds m = 4 distinct ones of n = 20, so Pearson's statistic times (n - 1) / (n - m) is chi-square with
    n - 1 degrees of freedom.
    """
    starts = np.cumsum([0, *cuts[:-1]])
    batches = [numbered(start, cut) for start, cut in zip(starts, cuts, strict=True)]
    memory = empty_memory(batches[0], 4, logits=False)
    keys = jax.random.split(jax.random.key(11), 4000)
    kept = jax.jit(jax.vmap(lambda key: remember_all(key, memory, batches).labels))(keys)
    assert all(len(set(row)) == 4 for row in np.asarray(kept[:100]).tolist())
    counts = np.bincount(np.ravel(kept), minlength=20)
    expected = 4000 * 4 / 20
    statistic = ((counts - expected) ** 2 / expected).sum() * 19 / 16
    assert chi2.ppf(1e-4, 19) < statistic < chi2.ppf(1 - 1e-4, 19)


def test_recall_of_an_empty_memory_has_no_weight():
    batch, logits = jax.jit(recall, static_argnums=2)(
        KEY, empty_memory(numbered(0, 6), 3, logits=True), 5, jnp.int32(2)
    )
    assert batch.weights.tolist() == [0] * 5
    assert batch.inputs.shape == (5, 1)
    assert logits.shape == (5, 10)
    assert int(batch.task) == 2


@pytest.mark.parametrize(("size", "seen"), [(8, 3), (4, 4), (3, 50)])
@both_ways
def test_recall_is_uniform_over_what_is_there(wrap, size, seen):
    memory = remember_all(KEY, empty_memory(numbered(1, 1), size, logits=True), [numbered(1, seen)])
    memory = memory._replace(logits=jnp.float32(memory.eligible))
    filled = min(size, seen)
    batch, logits = wrap(lambda key: recall(key, memory, 3000, jnp.int32(0)))(jax.random.key(2))
    assert batch.weights.tolist() == [1] * 3000
    labels = np.asarray(batch.labels)
    np.testing.assert_array_equal(batch.inputs[:, 0], labels)
    np.testing.assert_array_equal(logits, batch.eligible)
    np.testing.assert_array_equal(np.asarray(batch.eligible) @ (1 << np.arange(10)), labels)
    counts = np.asarray([(labels == number).sum() for number in np.asarray(memory.labels)[:filled]])
    assert counts.sum() == 3000
    expected = 3000 / filled
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, filled - 1)


# The losses. Memories here hold one example, or several that are equal, so that a draw is known.


def past(*, count=2):
    """Some equal examples of class 3, of which class 1 was not eligible."""
    batch = make_batch([3] * count, seed=5, eligible=[0, 2, 3])
    return batch._replace(inputs=np.tile(batch.inputs[:1], (count, 1)))


def after_a_step(strategy, params, batch):
    state = strategy.init(KEY, params, batch)
    updates, state = strategy.after_update(KEY, params, state, batch, make_params(8), make_params(9))
    np.testing.assert_array_equal(flat(updates), flat(make_params(9)))
    return state


@both_ways
def test_er_joins_batch_and_memory_in_one_mean(wrap):
    """5 real examples and 3 replayed ones: each counts an eighth. Metrics speak of the batch alone."""
    params, batch = make_params(), make_batch([0, 1, 2, 3, 0, 1, 1], padding=2)
    strategy = wrapped(er(apply, memory_size=4, memory_batch_size=3), wrap)
    grads, metrics = strategy.gradients(KEY, params, after_a_step(strategy, params, past()), batch)
    losses, own = own_losses(params, batch), own_gradients(params, batch)
    old = own_gradients(params, past(count=3))
    assert_close(flat(grads), (own[:5].sum(axis=0) + old.sum(axis=0)) / 8)
    assert sorted(metrics) == ["accuracy", "loss"]
    assert float(metrics["loss"]) == pytest.approx(losses[:5].mean(), rel=1e-5)
    right = logits_by_hand(params, batch.inputs)[:5].argmax(axis=1) == batch.labels[:5]
    assert float(metrics["accuracy"]) == pytest.approx(right.mean())


STRATEGIES = {
    "er": lambda **sizes: er(apply, **({"memory_size": 5, "memory_batch_size": 3} | sizes)),
    "der_plus_plus": lambda **sizes: der_plus_plus(
        apply, **({"memory_size": 5, "memory_batch_size": 3, "logits_strength": 0.3, "labels_strength": 0.7} | sizes)
    ),
    "a_gem": lambda **sizes: a_gem(apply, **({"memory_size": 5, "memory_batch_size": 3} | sizes)),
}


@pytest.mark.parametrize("name", STRATEGIES)
@both_ways
def test_with_an_empty_memory_it_is_naive(wrap, name):
    params, batch = make_params(), make_batch([0, 1, 2, 3, 0], eligible=[0, 1, 2, 3], padding=1)
    strategy = wrapped(STRATEGIES[name](), wrap)
    grads, metrics = strategy.gradients(KEY, params, strategy.init(KEY, params, batch), batch)
    assert_close(flat(grads), mean_gradient(params, batch), 1e-6)
    for metric, value in naive(apply).gradients(KEY, params, (), batch)[1].items():
        assert float(metrics[metric]) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("name", ["er", "der_plus_plus"])
def test_a_batch_is_in_the_memory_after_its_step_only(name):
    """`gradients` has the state of before; `after_update` adds the batch's real examples."""
    params, batch = make_params(), make_batch([0, 1, 2, 3], padding=1)
    strategy = wrapped(STRATEGIES[name](), jax.jit)
    state = after_a_step(strategy, params, batch)
    assert int(state.seen) == 3
    np.testing.assert_array_equal(state.inputs[:3], batch.inputs[:3])
    np.testing.assert_array_equal(state.labels, [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(state.eligible[:3], batch.eligible[:3])
    assert not np.asarray(state.inputs[3:]).any()
    assert does_nothing(STRATEGIES[name](), "observe")


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 2.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
@both_ways
def test_der_plus_plus_adds_both_terms(wrap, alpha, beta):
    """alpha * mean over the K classes of (z - z_then)^2, whose gradient in z is 2 (z - z_then) / K, and beta * cross
    entropy over the classes that were eligible then. What is remembered are the logits before the update."""
    then, params, batch = make_params(1), make_params(), make_batch([0, 1, 2, 3, 0, 1, 1], padding=2)
    strategy = der_plus_plus(apply, memory_size=4, memory_batch_size=3, logits_strength=alpha, labels_strength=beta)
    strategy, old = wrapped(strategy, wrap), past()
    state = after_a_step(strategy, then, old)
    assert_close(state.logits[:2], logits_by_hand(then, old.inputs), 1e-6)
    grads, metrics = strategy.gradients(KEY, params, state, batch)
    moved = logits_by_hand(params, old.inputs) - logits_by_hand(then, old.inputs)
    expected = mean_gradient(params, batch) + beta * mean_gradient(params, old)
    assert_close(flat(grads), expected + alpha * chained(2 * moved / K, old.inputs).mean(axis=0))
    assert float(metrics["loss"]) == pytest.approx(own_losses(params, batch)[:5].mean(), rel=1e-5)


def test_der_plus_plus_draws_twice():
    """With many examples remembered, the logits' part and the labels' part are not of the same draw: with weights 1
    and 0, 0 and 1, and 1 and 1 the parts add up, and some class of the second draw is not in the first."""
    old, params, batch = make_batch(np.arange(40) % K, seed=3), make_params(), make_batch([0, 1])

    def extra(alpha, beta):
        strategy = der_plus_plus(
            apply, memory_size=40, memory_batch_size=1, logits_strength=alpha, labels_strength=beta
        )  # fmt: skip
        strategy = wrapped(strategy, jax.jit)
        state = after_a_step(strategy, make_params(1), old)
        return flat(strategy.gradients(KEY, params, state, batch)[0]) - mean_gradient(params, batch)

    of_logits, of_labels = extra(1.0, 0.0), extra(0.0, 1.0)
    assert_close(extra(1.0, 1.0), of_logits + of_labels)
    losses = own_gradients(params, old)
    moved = logits_by_hand(params, old.inputs) - logits_by_hand(make_params(1), old.inputs)
    first = np.abs(chained(2 * moved / K, old.inputs) - of_logits).max(axis=1).argmin()
    second = np.abs(losses - of_labels).max(axis=1).argmin()
    assert_close(of_logits, chained(2 * moved / K, old.inputs)[first])
    assert_close(of_labels, losses[second])
    assert first != second


# A-GEM


def a_gem_with(old, wrap=plain):
    """A-GEM whose memory holds the examples of one batch."""
    strategy = wrapped(a_gem(apply, memory_size=8, memory_batch_size=3), wrap)
    return strategy, strategy.observe(KEY, make_params(), strategy.init(KEY, make_params(), old), old)


@both_ways
def test_a_gem_takes_off_what_goes_against_the_memory(wrap):
    """The same input under another label: where gradients disagree, g - (g.r / r.r) r, and nothing along r remains.
    Under the same label they agree, and g stays as it is, bit for bit."""
    params, old = make_params(), past()
    strategy, state = a_gem_with(old, wrap)
    disagree, agree = old._replace(labels=np.int32([2, 2])), old
    reference = mean_gradient(params, old)
    g = mean_gradient(params, disagree)
    assert g @ reference < -0.1
    grads, metrics = strategy.gradients(KEY, params, state, disagree)
    assert_close(flat(grads), g - (g @ reference) / (reference @ reference) * reference)
    assert flat(grads) @ reference == pytest.approx(0, abs=1e-5)
    assert float(metrics["projected"]) == 1
    assert float(metrics["loss"]) == pytest.approx(own_losses(params, disagree).mean(), rel=1e-5)

    assert mean_gradient(params, agree) @ reference > 0.1
    grads, metrics = strategy.gradients(KEY, params, state, agree)
    np.testing.assert_array_equal(flat(grads), flat(wrap(naive(apply).gradients)(KEY, params, (), agree)[0]))
    assert float(metrics["projected"]) == 0


def test_a_gem_leaves_an_orthogonal_gradient():
    """Other inputs at right angles and no bias gradient in common: batch and memory share no eligible class."""
    old = make_batch([0, 1], seed=1, eligible=[0, 1])
    strategy, state = a_gem_with(old)
    batch = make_batch([2, 3, 3], seed=2, eligible=[2, 3])
    grads, metrics = strategy.gradients(KEY, make_params(), state, batch)
    assert_close(flat(grads), mean_gradient(make_params(), batch), 1e-6)
    assert float(metrics["projected"]) == 0


def test_a_gem_survives_a_reference_gradient_of_nothing():
    """One eligible class: the memory's loss and gradient are exactly zero."""
    strategy, state = a_gem_with(make_batch([1, 1], eligible=[1]))
    batch = make_batch([0, 2, 3])
    grads, metrics = strategy.gradients(KEY, make_params(), state, batch)
    assert_close(flat(grads), mean_gradient(make_params(), batch), 1e-6)
    assert float(metrics["projected"]) == 0


def test_a_gem_remembers_earlier_tasks_only():
    """Steps leave the memory alone; the pass over a task that is over fills it."""
    strategy = a_gem(apply, memory_size=8, memory_batch_size=3)
    assert does_nothing(strategy, "after_update")
    batch = make_batch([0, 1, 2], padding=1)
    state = strategy.observe(KEY, make_params(), strategy.init(KEY, make_params(), batch), batch)
    assert int(state.seen) == 2
    np.testing.assert_array_equal(state.inputs[:2], batch.inputs[:2])


# Whole runs


PROGRAMS = {"er": {}, "der_plus_plus": {}, "a_gem": {"observe": 1}}


def assert_results_close(left, right, tolerance=1e-4):
    np.testing.assert_array_equal(left.accuracy, right.accuracy)
    for ours, theirs in zip(left.history, right.history, strict=True):
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=tolerance, atol=tolerance)
    ours, theirs = ((result.params, result.strategy_state) for result in (left, right))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def assert_memory_is_of(stream, memory, seen):
    """Every slot holds an example of the stream as one of its tasks shows it, with its label and eligible classes."""
    assert int(memory.seen) == seen
    shown = {}
    for rows, tasks in stream.train_sets:
        inputs = stream.view(stream.view_table, jnp.asarray(stream.train.inputs[rows]), jnp.asarray(tasks))
        for row, task, image in zip(rows, tasks, np.asarray(inputs), strict=True):
            shown[image.tobytes()] = (stream.train.labels[row], stream.eligible[task].tolist())
    for image, label, eligible in zip(*(np.asarray(leaf) for leaf in memory[:3]), strict=True):
        assert shown[image.tobytes()] == (label, eligible.tolist())


@pytest.mark.parametrize(
    ("name", "kind"), [("er", "class"), ("der_plus_plus", "permuted"), ("a_gem", "class"), ("a_gem", "task")]
)
def test_runs_compile_once_and_do_not_depend_on_how_steps_and_seeds_are_grouped(name, kind, one_core):
    """Two seeds whose stages differ in length: in turn by one step or 64 a call, together by three."""
    several, strategy = [make_stream(kind, key) for key in (3, 4)], STRATEGIES[name]()
    keys, params = jax.random.split(KEY, 2), [probe(0), probe(1)]
    options, steps = {"epochs": 2, "batch_size": 4}, 1 if kind == "class" else 64
    in_turn = run_seeds(keys, strategy, optax.adam(0.05), params, several, steps_per_call=steps, **options)
    together = run_seeds(
        keys, strategy, optax.adam(0.05), params, several, steps_per_call=3, together=True, **options
    )  # fmt: skip
    for stream, one, other in zip(several, in_turn, together, strict=True):
        assert one.compilations == other.compilations == ONCE | PROGRAMS[name]
        assert np.isfinite([value for entry in one.history for value in entry.values()]).all()
        assert_results_close(one, other)
        each = sum(len(part.rows) for part in stream.train_sets)
        assert_memory_is_of(stream, one.strategy_state, each if name == "a_gem" else 2 * each)
        if name == "a_gem":
            assert [entry["projected"] for entry in one.history if entry["stage"] == 0] == [0, 0]
            # Heads that share no parameter never disagree.
            assert any(entry["projected"] for entry in one.history) == (kind != "task")


@pytest.mark.parametrize("name", STRATEGIES)
def test_bfloat16_parameters(name):
    """Gradients keep the parameters' type, so that neither momentum nor a program's types change on the way."""
    result = run(
        KEY, STRATEGIES[name](), optax.sgd(0.05, momentum=0.5), probe(dtype=jnp.bfloat16), make_stream("class"),
        epochs=2, batch_size=4, steps_per_call=3,
    )  # fmt: skip
    assert result.params["kernel"].dtype == jnp.bfloat16
    assert result.compilations == ONCE | PROGRAMS[name]
    assert np.isfinite([value for entry in result.history for value in entry.values()]).all()


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("argument", ["memory_size", "memory_batch_size"])
def test_sizes_are_one_or_more(name, argument):
    with pytest.raises(ValueError) as caught:
        STRATEGIES[name](**{argument: 0})
    assert str(caught.value) == f"{argument}: got 0; pass 1 or more"


@pytest.mark.parametrize("argument", ["logits_strength", "labels_strength"])
def test_strengths_are_not_negative(argument):
    with pytest.raises(ValueError) as caught:
        STRATEGIES["der_plus_plus"](**{argument: -0.5})
    assert str(caught.value) == f"{argument}: got -0.5; pass 0 or more"
