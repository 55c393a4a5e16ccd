"""Adapters and class means in the loop: many tasks in one compilation, nothing of the past moves, means as by NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import adapters, continual, nets
from jaxcl.continual import Examples, streams
from jaxcl.continual.strategies import (
    Adapted,
    adapted_features,
    adapted_network,
    against_means,
    answered_by,
    class_means,
    classification,
    naive,
    streaming_lda,
)
from jaxcl.nearest import normalise

CLASSES, WIDTH = 6, 8


class Body(nn.Module):
    """Two layers over a sequence, then the mean over places where there is something."""

    @nn.compact
    def __call__(self, x):
        mask = jnp.any(x != 0, axis=-1)
        for _ in range(2):
            x = jnp.tanh(nn.Dense(WIDTH)(x))
        return nets.mean_over_tokens(x, mask)


BODY = Body()
PARAMS = BODY.init(jax.random.key(0), jnp.zeros((1, 3, 4)))


def layers(function, x):
    return nets.through_layers(function, lambda: BODY.apply(PARAMS, x))


def head(params, features):
    return features @ params


OBJECTIVE = classification(layers, head)


def examples(seed, count=24):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    centres = np.random.default_rng(0).normal(size=(CLASSES, 4))
    inputs = (centres[labels][:, None] + 0.3 * rng.normal(size=(count, 3, 4))).astype(np.float32)
    inputs[::2, 2] = 0  # shorter ones
    return Examples(inputs, labels.astype(np.int32))


TRAIN, TEST = examples(1), examples(2)
THREE = streams.class_incremental(None, TRAIN, TEST, classes_per_task=2)


def everywhere(path):
    return path.endswith("kernel")


def begin(method):
    return Adapted(method.init(jax.random.key(1), PARAMS)[0], jnp.zeros((WIDTH, CLASSES)))


def run(strategy, method, stream=THREE, **options):
    options = {"epochs": 3, "batch_size": 5} | options
    return continual.run(jax.random.key(2), strategy, optax.adam(1e-2), begin(method), stream, **options)


@pytest.mark.parametrize("target", ["outputs", "down", pytest.param("inputs", marks=pytest.mark.core), None])
def test_sixty_tasks_compile_once(target):
    tasks = 60
    method = adapters.oa_adapter(everywhere, 2, tasks, orthogonal_to=target, protected=4, log_size=8)
    strategy = adapted_network(method, PARAMS, OBJECTIVE)
    stream = streams.data_sets([(TRAIN, TEST)] * tasks, classes=CLASSES)
    result = run(strategy, method, stream, epochs=1, batch_size=24)
    assert set(result.compilations.values()) == {1}
    state = result.strategy_state.of_tasks
    assert state.committed == tasks
    for own in state.bank.values():  # chance leaves a task no active rank now and then
        assert np.sum(np.any(own.down != 0, axis=(1, 2))) > 0.8 * tasks
    assert np.isfinite(result.accuracy).all()


@pytest.mark.parametrize("name", ["incremental_lora", "oa_adapter"])
def test_the_first_task_is_the_same_however_many_follow(name):
    make = {
        "incremental_lora": lambda: adapters.incremental_lora(everywhere, 2, 3),
        "oa_adapter": lambda: adapters.oa_adapter(everywhere, 2, 3),
    }[name]
    method = make()
    strategy = adapted_network(method, PARAMS, OBJECTIVE)
    first = THREE._replace(train_sets=THREE.train_sets[:1])
    banks = []
    for stream in (first, THREE):
        state = run(strategy, method, stream).strategy_state
        banks.append(getattr(state, "of_tasks", state).bank)
    for path, own in banks[0].items():
        for before, after in zip(own, banks[1][path], strict=True):
            np.testing.assert_array_equal(before[0], after[0])


def test_inputs_are_measured_without_what_fills_up():
    """By NumPy: what comes out of each layer at real tokens of real examples; 8 examples in batches of 5."""
    method = adapters.oa_adapter(everywhere, 2, 3)

    def real(inputs):
        return jnp.any(inputs != 0, axis=-1)

    strategy = adapted_network(method, PARAMS, OBJECTIVE, counted=lambda _, batch: real(batch.inputs))
    first = THREE._replace(train_sets=THREE.train_sets[:1])
    result = run(strategy, method, first, epochs=1)
    rows = THREE.train_sets[0].rows
    x = TRAIN.inputs[rows]
    kernel, bias = (np.asarray(PARAMS["params"]["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    out = (x @ kernel + bias)[np.any(x != 0, axis=-1)]
    moments = out.T @ out
    gram = result.strategy_state.of_tasks.protected["params/Dense_0/kernel"].gram
    np.testing.assert_allclose(gram, moments / np.trace(moments), atol=1e-5)


def test_a_layer_that_is_called_twice_is_measured_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(WIDTH, name="shared")
            return dense(x[:, 0]) + dense(x[:, 1])

    net = Twice()
    params = net.init(jax.random.key(0), TRAIN.inputs[:1])
    method = adapters.oa_adapter(everywhere, 2, 1, orthogonal_to="inputs")

    def loss(function, head, batch):
        out = nets.through_layers(function, lambda: net.apply(params, batch.inputs)) @ head
        value = jnp.mean(out**2)
        return value, {"loss": value}

    strategy = adapted_network(method, params, continual.Objective(loss, lambda function, head, inputs: inputs))
    adapter, _ = method.init(jax.random.key(1), params)
    adapted = Adapted(adapter, jnp.zeros((WIDTH, CLASSES)))
    batch = continual.Batch(TRAIN.inputs[:6], TRAIN.labels[:6], jnp.ones(6), jnp.ones((6, CLASSES), bool), 0)
    state = strategy.init(jax.random.key(1), adapted, batch)
    after = strategy.observe(jax.random.key(2), adapted, state, batch)
    own = params["params"]["shared"]
    x = TRAIN.inputs[:6, :2].reshape(-1, 4) @ own["kernel"] + own["bias"]
    np.testing.assert_allclose(after.measured["params/shared/kernel"], x.T @ x, rtol=1e-4, atol=1e-4)


def test_any_strategy_trains_a_plain_lora():
    method = adapters.lora(everywhere, 2)
    features = adapted_features(method, layers)
    result = run(naive(lambda params, x: head(params.head, features(params, (), x))), method, epochs=40)
    assert result.accuracy[0, 0] > 0.9
    assert all(np.any(own.up) for own in result.params.adapter.values())


# Class means


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain(params, x):
    return x.mean(axis=1) @ params


def test_class_means_are_the_means():
    """A network that does not learn: the answers are those of a nearest-class-mean rule in NumPy."""
    strategy = class_means(naive(plain), lambda params, state, x: x.mean(axis=1))
    params = jnp.zeros((4, CLASSES))
    result = continual.run(jax.random.key(0), strategy, optax.sgd(0.1), params, THREE, epochs=1, batch_size=5)
    features, tests = (unit(part.inputs.mean(axis=1)) for part in (TRAIN, TEST))
    means = np.stack([features[TRAIN.labels == k].mean(axis=0) for k in range(CLASSES)])
    answers = (tests @ unit(means).T).argmax(axis=1)
    expected = [np.mean(answers[s.rows] == TEST.labels[s.rows]) for s in THREE.test_sets]
    np.testing.assert_allclose(result.accuracy[-1], expected)
    untrained = strategy.predict(params, strategy.init(jax.random.key(0), params, _batch()), TEST.inputs, None)
    assert np.all(untrained == np.finfo(np.float32).min)


def test_a_closed_form_answers_for_features_as_it_does_when_they_are_inputs():
    params = jnp.asarray(np.random.default_rng(0).normal(size=(4, CLASSES)), jnp.float32)
    strategy = answered_by(streaming_lda(shrinkage=0.01), naive(plain), lambda params, state, x: x.mean(axis=1))
    key, options = jax.random.key(0), {"epochs": 2, "batch_size": 5}
    result = continual.run(key, strategy, optax.sgd(0.1), params, THREE, **options)
    alone = continual.run(key, naive(plain), optax.sgd(0.1), params, THREE, **options)
    np.testing.assert_array_equal(result.params, alone.params)  # it trains as it does without
    train, test = (Examples(unit(part.inputs.mean(axis=1)), part.labels) for part in (TRAIN, TEST))
    features = THREE._replace(train=train, test=test)
    expected = continual.run(key, streaming_lda(shrinkage=0.01), optax.identity(), (), features, **options)
    np.testing.assert_array_equal(result.accuracy, expected.accuracy)
    assert expected.accuracy[-1].mean() > expected.accuracy[0].mean()


@pytest.mark.parametrize("kind", ["class_means", "answered_by"])
def test_earlier_classes_stand_still_as_their_means(kind):
    inner = naive(lambda params, x: normalise(x.mean(axis=1) * params["scale"]) @ params["head"])

    def features(params, state, x):
        return x.mean(axis=1) * params["scale"]

    def imprint(params, means, which):
        return params | {"head": jnp.where(which, means.T, params["head"])}

    made = {"class_means": lambda: class_means(inner, features),
            "answered_by": lambda: answered_by(streaming_lda(), inner, features)}[kind]()  # fmt: skip
    strategy, key = against_means(made, imprint), jax.random.key(0)
    rng = np.random.default_rng(0)
    params = {"scale": jnp.asarray(rng.normal(size=4) + 3, jnp.float32),
              "head": jnp.asarray(rng.normal(size=(4, CLASSES)), jnp.float32)}  # fmt: skip
    batch = _batch()._replace(labels=jnp.asarray([0, 1, 0, 1, 1]), eligible=jnp.arange(CLASSES) < 2)
    batch = batch._replace(eligible=jnp.broadcast_to(batch.eligible, (5, CLASSES)))
    state = strategy.init(key, params, batch)
    first, _ = strategy.gradients(key, params, state, batch)
    jax.tree.map(np.testing.assert_allclose, first, inner.gradients(key, params, (), batch)[0])  # nothing was before
    state = strategy.observe(key, params, state, batch)
    params, state = strategy.end_task(key, params, state)
    now = batch._replace(labels=batch.labels + 1, eligible=jnp.roll(batch.eligible, 1, axis=1))  # classes 1 and 2
    grads, metrics = strategy.gradients(key, params, state, now)
    seen = unit(np.asarray(features(params, (), batch.inputs)))
    mean = unit(seen[np.asarray(batch.labels) == 0].mean(axis=0))

    def loss(params):
        logits = normalise(features(params, (), now.inputs)) @ jnp.concatenate(
            [mean[:, None], params["head"][:, 1:3]], 1
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, now.labels).mean()

    value, expected = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, expected)
    assert not np.any(grads["head"][:, 0])


def _batch():
    return continual.Batch(
        jnp.asarray(TRAIN.inputs[:5]), jnp.asarray(TRAIN.labels[:5]), jnp.ones(5), jnp.ones((5, CLASSES), bool),
        jnp.int32(0),
    )  # fmt: skip


def test_drift_is_made_up_for():
    """The second task turns all features by one angle: the first's means turn with them, though none of it is seen."""
    angle = 0.9
    turn = jnp.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turns = [jnp.eye(2), turn]

    def features(params, state, x):
        return x @ params

    directions = unit(np.random.default_rng(0).normal(size=(40, 2))).astype(np.float32)
    labels = jnp.asarray((directions[:, 0] > 0).astype(np.int32))
    for width, most in ((0.3, 0.1), (None, 2)):
        strategy = class_means(naive(lambda params, x: x), features, drift_width=width)
        batch = continual.Batch(jnp.asarray(directions), labels, jnp.ones(40), jnp.ones((40, 2), bool), jnp.int32(0))
        state = strategy.init(jax.random.key(0), turns[0], batch)
        for task, classes in enumerate((labels, labels * 0 + 2)):
            _, state = strategy.begin_task(jax.random.key(0), turns[max(task - 1, 0)], state, jnp.int32(task))
            seen = batch._replace(labels=classes)
            state = strategy.observe(jax.random.key(0), turns[task], state, seen)
            _, state = strategy.end_task(jax.random.key(0), turns[task], state)
        means = unit(np.asarray(state.past.sums[:2]))
        true = unit(np.stack([np.mean(directions[labels == k] @ turn, axis=0) for k in range(2)]))
        distance = np.linalg.norm(means - true, axis=1).max()
        assert distance < most
        assert width or distance > 0.5


def test_bad_drift_width():
    with pytest.raises(ValueError, match="drift_width: got 0"):
        class_means(naive(plain), lambda params, state, x: x, drift_width=0.0)


# Streams


def test_data_sets_share_labels():
    second = Examples(TRAIN.inputs[:6] + 1, TRAIN.labels[:6])
    stream = streams.data_sets([(TRAIN, TEST), (second, TEST)], classes=7)
    np.testing.assert_array_equal(stream.train.inputs[stream.train_sets[1].rows], second.inputs)
    np.testing.assert_array_equal(stream.test.labels[stream.test_sets[1].rows], TEST.labels)
    assert stream.eligible.all() and stream.eligible.shape == (2, 7) and not stream.task_known
    with pytest.raises(ValueError, match=r"tasks\[1\], train.labels"):
        streams.data_sets([(TRAIN, TEST), (second._replace(labels=second.labels + 4), TEST)], classes=7)
    with pytest.raises(ValueError, match="tasks, their number: got 0"):
        streams.data_sets([], classes=3)


def test_tasks_in_another_order():
    stream = streams.reordered(streams.trained_apart(THREE), [2, 0, 1])
    for new, old in enumerate([2, 0, 1]):
        np.testing.assert_array_equal(stream.test_sets[new].rows, THREE.test_sets[old].rows)
        assert (stream.train_sets[new].tasks == new).all()
        np.testing.assert_array_equal(np.flatnonzero(stream.trained[new]), [2 * old, 2 * old + 1])
    turned = streams.permuted(jax.random.key(0), TRAIN, TEST, tasks=2)
    swapped = streams.reordered(turned, [1, 0])
    views = [s.view(s.view_table, TRAIN.inputs[:2], jnp.full(2, task)) for s, task in ((turned, 0), (swapped, 1))]
    np.testing.assert_array_equal(*views)
    with pytest.raises(ValueError, match=r"order: got \[0, 0, 1\]"):
        streams.reordered(THREE, [0, 0, 1])


def test_training_apart_leaves_other_classes_alone():
    """Only rows of the head of the task's own classes move; at test time all classes compete."""
    stream = streams.trained_apart(THREE)
    np.testing.assert_array_equal(stream.trained, np.kron(np.eye(3), np.ones((1, 2))) > 0)
    first = stream._replace(train_sets=stream.train_sets[:1])
    params = jnp.zeros((4, CLASSES))
    result = continual.run(jax.random.key(0), naive(plain), optax.sgd(0.1), params, first, epochs=1, batch_size=5)
    moved = np.any(np.asarray(result.params) != 0, axis=0)
    np.testing.assert_array_equal(moved, [True, True, False, False, False, False])
    assert streams.joint(stream).trained is None
    assert stream.eligible.all()


def test_sites_that_the_objective_never_calls_are_refused():
    unused = {"params": PARAMS["params"] | {"embedding": {"kernel": jnp.zeros((4, 8))}}}
    method = adapters.incremental_lora(lambda path: path.endswith("kernel"), 2, 3)
    strategy = adapted_network(method, unused, OBJECTIVE)
    params = Adapted(method.init(jax.random.key(0), unused)[0], jnp.zeros((WIDTH, CLASSES)))
    with pytest.raises(ValueError, match=r"method: got one for sites \['params/embedding/kernel'\]; cover kernels of"):
        continual.run(jax.random.key(1), strategy, optax.sgd(0.1), params, THREE, epochs=1, batch_size=8)
