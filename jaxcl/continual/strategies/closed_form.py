"""Classifiers of frozen features in closed form: sums over the examples seen are all they keep.

Sums do not depend on the order in which examples come, so nothing is forgotten: after the last task each of these is
what it would be had all tasks come at once. They learn in one pass, the loop's after a task's training steps; the
steps themselves do nothing, so let there be one epoch of them. Params are ``()``, inputs [B, D].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.continual.strategies.contract import Batch, Metrics, Strategy
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_between


class Moments(NamedTuple):
    """Sums over the examples seen, of features x less a fixed `origin` near them, or their digits would be lost."""

    counts: Array  # [K]
    sums: Array  # [K, D], of x - origin
    products: Array  # [D, D], of (x - origin) (x - origin)^T; [0, 0] where they are not needed
    origin: Array  # [D], the mean of the first batch


class LinearClassifier(NamedTuple):
    """What a closed form keeps: sums, and what followed from them when the last task ended."""

    moments: Moments
    kernel: Array  # [D, K], of x - origin
    bias: Array  # [K]


Solve = Callable[[Moments], tuple[Array, Array]]  # kernel [D, K] and bias [K], for x - origin


def nearest_class_mean() -> Strategy:
    """The class whose mean is nearest: `argmax_k x . mu_k - |mu_k|^2 / 2`."""

    def solve(moments: Moments) -> tuple[Array, Array]:
        means = _means(moments)
        return means.T, -jnp.square(means).sum(axis=1) / 2

    return _closed_form(solve, products=False)


def streaming_lda(*, shrinkage: float = 1e-4) -> Strategy:
    """Linear discriminant analysis with a shared covariance, streamed (Hayes & Kanan 2020, "deep SLDA").

    The kernel is `P mu_k` and the bias `-mu_k^T P mu_k / 2` with `P = ((1 - shrinkage) S + shrinkage I)^-1`. S is the
    covariance within classes about the means as they are in the end; the authors' is summed up about the means as they
    were when each example came, and thus depends on the order.

    Args:
        shrinkage: from above 0 to 1; 1e-4 is published.
    """
    check_between("shrinkage", shrinkage, 1e-12, 1)

    def solve(moments: Moments) -> tuple[Array, Array]:
        means = _means(moments)
        between = _product(means.T * moments.counts, means)
        within = (moments.products - between) / jnp.maximum(moments.counts.sum(), 1)
        precise = (1 - shrinkage) * within + shrinkage * jnp.eye(len(within))
        kernel = _solve_positive(precise, means.T)
        return kernel, -(kernel * means.T).sum(axis=0) / 2

    return _closed_form(solve, products=True)


def ridge_classifier(*, strength: float = 1.0) -> Strategy:
    """Least squares to one-hot labels with a penalty on the kernel: `(X^T X + strength I)^-1 X^T Y`, about the mean.

    Features and labels have their means taken off first, so that the bias is free of the penalty.

    Args:
        strength: of the penalty, above 0; next to sums over examples, so it weighs less the more of them there are.
    """
    check_at_least("strength", strength, 1e-12)

    def solve(moments: Moments) -> tuple[Array, Array]:
        total = jnp.maximum(moments.counts.sum(), 1)
        mean, shares = moments.sums.sum(axis=0) / total, moments.counts / total
        products = moments.products - total * jnp.outer(mean, mean)
        targets = moments.sums.T - jnp.outer(mean, moments.counts)  # [D, K]
        kernel = _solve_positive(products + strength * jnp.eye(len(mean)), targets)
        return kernel, shares - _product(mean[None], kernel)[0]

    return _closed_form(solve, products=True)


def _closed_form(solve: Solve, *, products: bool) -> Strategy:
    """The strategy whose linear classifier `solve` makes of the sums; classes that never came cannot be the answer."""

    def init(key: Key, params: PyTree, batch: Batch) -> LinearClassifier:
        width, classes = _flat(batch.inputs).shape[1], batch.eligible.shape[1]
        side = width if products else 0
        moments = Moments(jnp.zeros(classes), jnp.zeros((classes, width)), jnp.zeros((side, side)), jnp.zeros(width))
        return LinearClassifier(moments, jnp.zeros((width, classes)), jnp.zeros(classes))

    def gradients(key: Key, params: PyTree, state: LinearClassifier, batch: Batch) -> tuple[PyTree, Metrics]:
        return jax.tree.map(jnp.zeros_like, params), {}

    def observe(key: Key, params: PyTree, state: LinearClassifier, batch: Batch) -> LinearClassifier:
        features = _flat(batch.inputs)
        members = jax.nn.one_hot(batch.labels, state.bias.shape[0]) * batch.weights[:, None]  # [B, K]
        counts, sums, squares, origin = state.moments
        mean = batch.weights @ features / jnp.maximum(batch.weights.sum(), 1)
        origin = jnp.where(counts.any(), origin, mean)
        features -= origin
        if products:
            squares += _product(features.T * batch.weights, features)
        moments = Moments(counts + members.sum(axis=0), sums + _product(members.T, features), squares, origin)
        return state._replace(moments=moments)

    def end_task(key: Key, params: PyTree, state: LinearClassifier) -> tuple[PyTree, LinearClassifier]:
        kernel, bias = solve(state.moments)
        seen = state.moments.counts > 0
        return params, state._replace(kernel=kernel, bias=jnp.where(seen, bias, jnp.finfo(jnp.float32).min))

    def predict(params: PyTree, state: LinearClassifier, inputs: Array, task: Array | None) -> Array:
        return _product(_flat(inputs) - state.moments.origin, state.kernel) + state.bias

    return Strategy(gradients, predict, init, observe=observe, end_task=end_task)


def _solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right`, [D, K], of a matrix [D, D] that is positive definite, but perhaps for rounding.

    Where features depend on each other that may leave eigenvalues below zero: then the least of a few multiples of the
    rounding is added to all that lets the matrix be factorised.
    """
    trace = jnp.trace(matrix)

    def attempt(more: Array) -> tuple[Array, Array]:
        return more, jax.scipy.linalg.solve(matrix + more * jnp.eye(len(matrix)), right, assume_a="pos")

    def failed(state: tuple[Array, Array]) -> Array:
        return ~jnp.isfinite(state[1]).all() & (state[0] < trace)  # not so where sums are no numbers

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return attempt(jnp.maximum(10 * state[0], jnp.finfo(matrix.dtype).eps * trace / len(matrix)))

    return lax.while_loop(failed, again, attempt(jnp.zeros((), matrix.dtype)))[1]


def _means(moments: Moments) -> Array:
    """[K, D], less the origin; zero for classes that never came."""
    return moments.sums / jnp.maximum(moments.counts, 1)[:, None]


def _flat(inputs: Array) -> Array:
    return inputs.reshape(len(inputs), -1).astype(jnp.float32)


def _product(left: Array, right: Array) -> Array:
    # Differences of large sums follow: float32 all through.
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
