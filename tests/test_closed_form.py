"""Classifiers in closed form against NumPy and scikit-learn, and that the order of tasks does not matter to them."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import continual
from jaxcl.continual import Examples, streams

CLASSES, WIDTH = 4, 6


def examples(seed, count=203):
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    mixing = np.random.default_rng(7).normal(size=(WIDTH, WIDTH))
    means = np.random.default_rng(8).normal(size=(CLASSES, WIDTH))
    return Examples((3 + means[labels] + rng.normal(size=(count, WIDTH)) @ mixing).astype(np.float32), labels)


TRAIN, TEST = examples(0), examples(1)


def trained(strategy, stream, **options):
    options = {"epochs": 1, "batch_size": 32} | options
    return continual.run(jax.random.key(0), strategy, optax.identity(), (), stream, **options)


def in_turn(key=None):
    return streams.class_incremental(key, TRAIN, TEST, classes_per_task=1)


def answers(strategy, result, inputs=TEST.inputs):
    return np.argmax(strategy.predict((), result.strategy_state, inputs, None), axis=1)


def class_means():
    return np.stack([TRAIN.inputs[TRAIN.labels == label].astype(np.float64).mean(axis=0) for label in range(CLASSES)])


def between_classes(kernel):
    """What of a kernel [D, K] decides between classes, whatever the origin that features are counted from."""
    return np.asarray(kernel) - np.mean(kernel, axis=1, keepdims=True)


def test_the_nearest_class_mean():
    strategy = continual.nearest_class_mean()
    result = trained(strategy, in_turn())
    distances = ((TEST.inputs[:, None] - class_means()) ** 2).sum(axis=2)
    np.testing.assert_array_equal(answers(strategy, result), distances.argmin(axis=1))


@pytest.mark.parametrize("shrinkage", [1e-4, 0.3, 1.0])
def test_streaming_lda(shrinkage):
    strategy = continual.streaming_lda(shrinkage=shrinkage)
    result = trained(strategy, in_turn())
    means = class_means()
    centred = TRAIN.inputs.astype(np.float64) - means[TRAIN.labels]
    covariance = centred.T @ centred / len(centred)
    precision = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * np.eye(WIDTH))
    difference = TEST.inputs[:, None] - means
    distances = np.einsum("nkd,de,nke->nk", difference, precision, difference)
    np.testing.assert_array_equal(answers(strategy, result), distances.argmin(axis=1))
    assert_close(between_classes(result.strategy_state.kernel), between_classes(precision @ means.T), 1e-4)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_the_ridge_classifier(strength):
    from sklearn.linear_model import Ridge

    strategy = continual.ridge_classifier(strength=strength)
    result = trained(strategy, in_turn())
    theirs = Ridge(alpha=strength).fit(TRAIN.inputs.astype(np.float64), np.eye(CLASSES)[TRAIN.labels])
    assert_close(strategy.predict((), result.strategy_state, TEST.inputs, None), theirs.predict(TEST.inputs), 1e-4)


METHODS = [continual.nearest_class_mean, continual.streaming_lda, continual.ridge_classifier]


@pytest.mark.parametrize("make", METHODS)
def test_tasks_in_any_order_come_to_the_same_as_all_at_once(make):
    strategy = make()
    one = trained(strategy, in_turn())
    other = trained(strategy, in_turn(jax.random.key(3)), batch_size=7)
    joint = trained(strategy, streams.joint(in_turn()))
    for result in (other, joint):
        kernels = (between_classes(of.strategy_state.kernel) for of in (result, one))
        assert_close(*kernels, 1e-3)
        assert_close(result.strategy_state.moments.counts, one.strategy_state.moments.counts, 0)
    assert one.accuracy[-1].mean() > 0.5
    assert one.parameters == 0 and all(count == 1 for count in one.compilations.values())


@pytest.mark.parametrize("make", METHODS)
def test_features_far_from_zero_lose_no_digits(make):
    """A constant beside a thousand times smaller features, as networks with biases have; shifts change no answer."""

    def far(examples):
        constant = np.full((len(examples.labels), 1), 1000, np.float32)
        return examples._replace(inputs=np.concatenate([examples.inputs + np.float32(1000), constant], axis=1))

    near = trained(make(), in_turn())
    stream = streams.class_incremental(None, far(TRAIN), far(TEST), classes_per_task=1)
    result = trained(make(), stream)
    np.testing.assert_allclose(result.accuracy, near.accuracy, atol=0.01)


@pytest.mark.parametrize("make", METHODS)
def test_classes_that_never_came_are_no_answer(make):
    strategy = make()
    first = streams.class_incremental(None, TRAIN, TEST, classes_per_task=2)
    result = trained(strategy, first._replace(train_sets=first.train_sets[:1], test_sets=first.test_sets[:1]))
    assert answers(strategy, result).max() == 1


@pytest.mark.parametrize("make", METHODS)
def test_seeds_together(make):
    keys = jax.random.split(jax.random.key(0), 2)
    tasks = [in_turn(key) for key in keys]
    together = continual.run_seeds(
        keys, make(), optax.identity(), [(), ()], tasks, epochs=1, batch_size=32, together=True
    )
    for result, stream in zip(together, tasks, strict=True):
        np.testing.assert_allclose(result.accuracy, trained(make(), stream).accuracy, atol=0.02)


@pytest.mark.parametrize("make", [continual.streaming_lda, continual.ridge_classifier])
def test_features_that_depend_on_each_other_are_told_apart(make):
    """Sixty dimensions made of six: sums in float32 leave eigenvalues below zero, far beyond any penalty."""
    wide = np.random.default_rng(3).normal(size=(WIDTH, 60)).astype(np.float32) * 300
    train, test = (part._replace(inputs=part.inputs @ wide) for part in (TRAIN, TEST))
    strategy = make()
    result = trained(strategy, streams.class_incremental(None, train, test, classes_per_task=1))
    right = np.mean(answers(strategy, result, test.inputs) == TEST.labels)
    expected = np.mean(answers(strategy, trained(strategy, in_turn())) == TEST.labels)
    assert right > expected - 0.03 > 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(continual.streaming_lda, shrinkage=0.0), "shrinkage: got 0.0"),
        (partial(continual.streaming_lda, shrinkage=1.5), "shrinkage: got 1.5"),
        (partial(continual.ridge_classifier, strength=0.0), "strength: got 0.0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
