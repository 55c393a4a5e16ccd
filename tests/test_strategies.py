"""Strategies: what the defaults leave alone, and losses and gradients against hand formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, host_mesh
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax

from jaxcl.continual import Batch, Strategy, cross_entropy, gradients_of, in_microbatches, linear_probe, naive

B, D, K = 6, 4, 5


def make_batch(seed=0, *, masked=False, ragged=False, shape=(D,)):
    """B examples. `masked`: three or four of the K classes may be the answer; `ragged`: two rows only fill up."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, B).astype(np.int32)
    eligible = np.ones((B, K), bool)
    if masked:
        eligible[np.arange(B), (labels + 1) % K] = False
        eligible[::2][np.arange(B // 2), (labels[::2] + 3) % K] = False
    weights = np.ones(B, np.float32)
    if ragged:
        weights[-2:] = 0
    return Batch(random.normal(size=(B, *shape)).astype(np.float32), labels, weights, eligible, np.int32(0))


def make_logits(seed=1, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=(B, K))).astype(np.float32)


def reference(logits, batch, smoothing=0.0):
    """Loss, accuracy and the gradient in the logits, one row at a time over its eligible classes in float64.

    With targets t that sum to 1, the gradient of -sum t log softmax(z) is softmax(z) - t.
    """
    loss, right, gradient = 0.0, 0.0, np.zeros((B, K))
    total = batch.weights.sum()
    for row, (z, label, weight) in enumerate(zip(np.float64(logits), batch.labels, batch.weights, strict=True)):
        classes = np.flatnonzero(batch.eligible[row])
        target = np.where(classes == label, 1 - smoothing, 0.0) + smoothing / len(classes)
        logs = log_softmax(z[classes])
        loss -= weight / total * (target * logs).sum()
        right += weight / total * (classes[np.argmax(z[classes])] == label)
        gradient[row, classes] = weight / total * (np.exp(logs) - target)
    return loss, right, gradient


# Defaults


def test_defaults_do_nothing():
    """Only `gradients` and `predict` are given; the others hand back the very objects they were handed."""
    strategy = Strategy(gradients=None, predict=None)
    key, params, state, batch = object(), object(), object(), object()
    grads, updates = object(), object()
    assert strategy.init(key, params, batch) == ()
    assert strategy.begin_task(key, params, state, 3) == (params, state)
    assert strategy.refresh(key, params, state, batch) == (params, state)
    assert strategy.observe(key, params, state, batch) is state
    assert strategy.end_task(key, params, state) == (params, state)
    assert strategy.after_update(key, params, state, batch, grads, updates) == (updates, state)
    assert strategy.refresh_every == 0


@pytest.mark.parametrize("make", [lambda: naive(lambda params, x: x), linear_probe])
def test_baselines_add_nothing_to_the_defaults(make):
    strategy = make()
    changed = [name for name, default in Strategy._field_defaults.items() if getattr(strategy, name) is not default]
    assert changed == []


def test_gradients_of_differentiates_in_params_alone_and_passes_everything_on():
    """loss = state * sum(weights) * a^2 + noise * b: d/da = 2 a state sum(weights), d/db = noise."""

    def loss(key, params, state, batch):
        noise = jax.random.normal(key)
        value = state * batch.weights.sum() * params["a"] ** 2 + noise * params["b"]
        return value, {"loss": value, "noise": noise}

    key, params, batch = jax.random.key(5), {"a": 3.0, "b": 2.0}, make_batch(ragged=True)
    grads, metrics = gradients_of(loss)(key, params, 0.5, batch)
    noise = float(jax.random.normal(key))
    assert float(grads["a"]) == pytest.approx(2 * 3.0 * 0.5 * 4)
    assert float(grads["b"]) == pytest.approx(noise)
    assert float(metrics["noise"]) == pytest.approx(noise)
    assert float(metrics["loss"]) == pytest.approx(0.5 * 4 * 9 + 2 * noise, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_gradients_in_microbatches_are_those_of_the_batch(count):
    def loss(key, params, state, batch):
        value, metrics = cross_entropy(jnp.tanh(batch.inputs @ params["w"]), batch)
        return value + state * jnp.sum(params["w"] ** 2), metrics

    batch, key, params = make_batch(masked=True, ragged=True), jax.random.key(0), {"w": jnp.ones((D, K))}
    whole = Strategy(gradients_of(loss), lambda params, state, inputs, task: inputs @ params["w"])
    parts = in_microbatches(whole, count)
    assert parts._replace(gradients=whole.gradients) == whole
    expected = whole.gradients(key, params, 0.1, batch)
    jax.tree.map(assert_close, jax.jit(parts.gradients)(key, params, 0.1, batch), expected)


def test_devices_keep_their_examples_in_microbatches():
    whole = Strategy(
        gradients_of(lambda key, params, state, batch: cross_entropy(jnp.tanh(batch.inputs @ params), batch)),
        lambda *arguments: None,
    )
    several = [make_batch(seed, masked=True, ragged=True) for seed in range(8)]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one._replace(task=()) for one in several))
    split = jax.device_put(batch, NamedSharding(host_mesh(), PartitionSpec("devices")))
    key, params, task = jax.random.key(0), jnp.ones((D, K)), jnp.int32(0)
    step = jax.jit(in_microbatches(whole, 3).gradients).lower(key, params, (), split._replace(task=task)).compile()
    assert not any(f"{moved}(" in step.as_text() for moved in ("all-gather", "all-to-all", "collective-permute"))
    found = step(key, params, (), split._replace(task=task))
    jax.tree.map(assert_close, found, whole.gradients(key, params, (), batch._replace(task=task)))


def test_microbatches_must_be_parts_of_the_batch_and_draw_for_themselves():
    strategy = Strategy(lambda key, params, state, batch: (jax.random.normal(key), {}), lambda *arguments: None)
    with pytest.raises(ValueError, match=r"count: got 0"):
        in_microbatches(strategy, 0)
    with pytest.raises(ValueError, match=r"count: got 4; pass a divisor of the batch size, 6"):
        in_microbatches(strategy, 4).gradients(jax.random.key(0), 0.0, (), make_batch())
    found, _ = in_microbatches(strategy, 3).gradients(jax.random.key(0), 0.0, (), make_batch())
    draws = [jax.random.normal(key) for key in jax.random.split(jax.random.key(0), 3)]
    assert float(found) == pytest.approx(float(np.mean(draws)), rel=1e-5)


# Cross entropy

VARIANTS = [(masked, ragged, smoothing) for masked in (0, 1) for ragged in (0, 1) for smoothing in (0.0, 0.1, 1.0)]


@pytest.mark.parametrize(("masked", "ragged", "smoothing"), VARIANTS)
def test_cross_entropy_equals_numpy(masked, ragged, smoothing):
    batch, logits = make_batch(masked=masked, ragged=ragged), make_logits()
    loss, metrics = cross_entropy(jnp.asarray(logits), batch, label_smoothing=smoothing)
    expected_loss, expected_accuracy, _ = reference(logits, batch, smoothing)
    assert sorted(metrics) == ["accuracy", "loss"]
    assert float(loss) == float(metrics["loss"]) == pytest.approx(expected_loss, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(expected_accuracy, rel=1e-6)


@jax.jit
def logit_gradient(logits, batch, smoothing):
    return jax.grad(lambda z: cross_entropy(z, batch, label_smoothing=smoothing)[0])(logits)


@pytest.mark.parametrize(("masked", "ragged", "smoothing"), VARIANTS)
def test_gradient_in_the_logits_equals_numpy_and_is_exactly_zero_where_nothing_counts(masked, ragged, smoothing):
    batch, logits = make_batch(masked=masked, ragged=ragged), make_logits()
    gradient = np.asarray(logit_gradient(logits, batch, smoothing))
    np.testing.assert_allclose(gradient, reference(logits, batch, smoothing)[2], atol=1e-6)
    assert (gradient[~batch.eligible] == 0).all()
    assert (gradient[batch.weights == 0] == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_logits_stay_finite(scale):
    batch, logits = make_batch(masked=True), make_logits(scale=scale)
    loss, _ = cross_entropy(jnp.asarray(logits), batch, label_smoothing=0.1)
    assert float(loss) == pytest.approx(reference(logits, batch, 0.1)[0], rel=1e-5)
    assert np.isfinite(logit_gradient(logits, batch, 0.1)).all()


def test_logits_of_ineligible_classes_do_not_matter():
    """Not even NaN or infinity, which an untrained head may give."""
    batch, logits = make_batch(masked=True), make_logits()
    loss, _ = cross_entropy(jnp.asarray(logits), batch, label_smoothing=0.1)
    for poison in (1e9, np.inf, np.nan):
        poisoned = np.where(batch.eligible, logits, poison).astype(np.float32)
        assert float(cross_entropy(jnp.asarray(poisoned), batch, label_smoothing=0.1)[0]) == float(loss)
        np.testing.assert_array_equal(logit_gradient(poisoned, batch, 0.1), logit_gradient(logits, batch, 0.1))


def test_a_batch_that_only_fills_up_has_no_loss_and_no_gradient():
    batch = make_batch()._replace(weights=np.zeros(B, np.float32))
    loss, metrics = cross_entropy(jnp.asarray(make_logits()), batch)
    assert float(loss) == float(metrics["accuracy"]) == 0.0
    np.testing.assert_array_equal(logit_gradient(make_logits(), batch, 0.0), np.zeros((B, K)))


def test_bfloat16_logits_are_summed_in_float32():
    """The reference works on the rounded logits, so only the arithmetic after rounding is compared."""
    batch, logits = make_batch(), jnp.asarray(make_logits(), jnp.bfloat16)
    loss, _ = cross_entropy(logits, batch, label_smoothing=0.1)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(reference(np.asarray(logits, np.float64), batch, 0.1)[0], rel=1e-5)


def test_vmap_over_batches_equals_one_at_a_time():
    batches = [make_batch(seed, masked=True, ragged=seed == 1) for seed in range(3)]
    logits = np.stack([make_logits(seed) for seed in range(3)])
    stacked = Batch(*(np.stack(field) for field in zip(*batches, strict=True)))
    losses, metrics = jax.jit(jax.vmap(cross_entropy))(logits, stacked)
    expected = [reference(z, batch)[:2] for z, batch in zip(logits, batches, strict=True)]
    np.testing.assert_allclose(np.stack([losses, metrics["accuracy"]], axis=1), expected, rtol=1e-5)


# Baselines


def probe_params(width=D, seed=2):
    random = np.random.default_rng(seed)
    return {
        "kernel": random.normal(size=(width, K)).astype(np.float32),
        "bias": random.normal(size=K).astype(np.float32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(D,), (2, 2)])
def test_linear_probe_gradient_is_features_times_error(shape, smoothing):
    """z = x W + b, so with e = dL/dz from `reference`: dL/dW = x^T e and dL/db = sum e. Features are flattened."""
    params, batch = probe_params(), make_batch(masked=True, ragged=True, shape=shape)
    features = np.float64(batch.inputs).reshape(B, D)
    logits = features @ params["kernel"] + params["bias"]
    loss, accuracy, error = reference(logits, batch, smoothing)
    strategy = linear_probe(label_smoothing=smoothing)
    grads, metrics = jax.jit(strategy.gradients)(jax.random.key(0), params, (), batch)
    assert sorted(grads) == ["bias", "kernel"]
    np.testing.assert_allclose(grads["kernel"], features.T @ error, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], error.sum(axis=0), atol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    np.testing.assert_allclose(strategy.predict(params, (), jnp.asarray(batch.inputs), None), logits, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_naive_gradient_of_a_two_layer_network_by_back_propagation(smoothing):
    """h = tanh(x V), z = h W, e = dL/dz: dL/dW = h^T e, dL/dV = x^T (e W^T * (1 - h^2))."""
    random = np.random.default_rng(3)
    params = {
        "first": random.normal(size=(D, 3)).astype(np.float32),
        "second": random.normal(size=(3, K)).astype(np.float32),
    }
    batch = make_batch(masked=True, ragged=True)
    hidden = np.tanh(np.float64(batch.inputs) @ params["first"])
    logits = hidden @ params["second"]
    error = reference(logits, batch, smoothing)[2]

    strategy = naive(lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], label_smoothing=smoothing)
    grads, _ = jax.jit(strategy.gradients)(jax.random.key(0), params, (), batch)
    np.testing.assert_allclose(grads["second"], hidden.T @ error, atol=1e-5)
    back = (error @ params["second"].T) * (1 - hidden**2)
    np.testing.assert_allclose(grads["first"], np.float64(batch.inputs).T @ back, atol=1e-5)
    np.testing.assert_allclose(strategy.predict(params, (), batch.inputs, None), logits, atol=1e-5)


def test_baselines_answer_alike_whether_or_not_they_are_told_the_task():
    params, batch = probe_params(), make_batch()
    logits = [linear_probe().predict(params, (), jnp.asarray(batch.inputs), task) for task in (None, jnp.int32(1))]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("make", [lambda **options: naive(lambda params, inputs: inputs, **options), linear_probe])
def test_label_smoothing_is_a_share(make):
    with pytest.raises(ValueError, match=r"label_smoothing: got 1.5; pass a number from 0 to 1"):
        make(label_smoothing=1.5)
