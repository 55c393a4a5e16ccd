"""A linear softmax classifier, its gradients by hand, and small streams: what tests of strategies train and check.

Of one example x with label y, p the softmax over its eligible classes, the gradient of cross entropy is
e = p - onehot(y) in the bias and x e^T in the kernel; everything else follows from that.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from jaxcl.continual import Batch, Examples, streams

D, K = 3, 4
KEY = jax.random.key(0)
ONCE = {"start": 1, "train": 1, "evaluate": 1}  # compilations that every run has


def apply(params, inputs):
    kernel = params["kernel"]
    return inputs.reshape(len(inputs), -1).astype(kernel.dtype) @ kernel + params["bias"]


def make_params(seed=0, *, classes=K, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(random.normal(size=classes), dtype),
        "kernel": jnp.asarray(random.normal(size=(D, classes)), dtype),
    }


def make_batch(labels, *, seed=0, eligible=None, padding=0, task=0, classes=K):
    """An example a label; `eligible` classes or all; the last `padding` rows only fill up, with large values."""
    labels = np.asarray(labels, np.int32)
    inputs = np.random.default_rng([7, seed]).normal(size=(len(labels), D)).astype(np.float32)
    weights = np.ones(len(labels), np.float32)
    if padding:
        weights[-padding:] = 0
        inputs[-padding:] = 100
    allowed = np.zeros((len(labels), classes), bool)
    allowed[:, list(range(classes) if eligible is None else eligible)] = True
    return Batch(inputs, labels, weights, allowed, np.int32(task))


def flat(tree):
    """Bias and kernel as one vector in float64."""
    return np.concatenate([np.ravel(np.float64(tree["bias"])), np.ravel(np.float64(tree["kernel"]))])


def logits_by_hand(params, inputs):
    return np.float64(inputs) @ np.float64(params["kernel"]) + np.float64(params["bias"])


def chained(error, inputs):
    """Gradients in the parameters, rows [B, K + D K], from those in the logits [B, K]."""
    return np.concatenate([error, (np.float64(inputs)[:, :, None] * error[:, None]).reshape(len(error), -1)], axis=1)


def own_gradients(params, batch):
    """Each example's own gradient of cross entropy, as rows [B, K + D K]."""
    logits = np.where(batch.eligible, logits_by_hand(params, batch.inputs), -np.inf)
    return chained(softmax(logits, axis=1) - np.eye(logits.shape[1])[batch.labels], batch.inputs)


def mean_gradient(params, batch):
    return np.average(own_gradients(params, batch), axis=0, weights=batch.weights)


def wrapped(strategy, wrap):
    """A strategy with those members wrapped that a run calls with arrays."""
    members = ("gradients", "init", "begin_task", "after_update", "observe", "end_task")
    return strategy._replace(**{name: wrap(getattr(strategy, name)) for name in members})


def examples(sizes, shape, seed):
    """`sizes[c]` examples of class c, each near its class's own mean."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    means = np.random.default_rng(5).normal(size=(len(sizes), *shape))
    return Examples((means[labels] + random.normal(size=(len(labels), *shape))).astype(np.float32), labels)


def make_stream(kind, key=3):
    """Two or three tasks, of 5 to 14 examples; images [2, 2] where the task is told or inputs are permuted."""
    shape = (4,) if kind == "class" else (2, 2)
    train, test = examples([3, 7, 5, 7, 2, 6], shape, 0), examples([2, 3, 2, 3, 4, 2], shape, 1)
    if kind == "permuted":
        return streams.permuted(jax.random.key(key), train, test, tasks=2)
    make = streams.class_incremental if kind == "class" else streams.task_incremental
    return make(jax.random.key(key), train, test, classes_per_task=2)


def probe(seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(random.normal(size=6), dtype),
        "kernel": jnp.asarray(random.normal(size=(4, 6)), dtype),
    }
