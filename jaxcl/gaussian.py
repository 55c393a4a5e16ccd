"""Diagonal Gaussians over parameter trees: their KL divergence, samples, and two ways to parameterize posteriors.

`mean_var` learns means and scales freely, and what the posterior costs has to be held down by a penalty. `mean_kl`
(Lin, Flamich and Hernandez-Lobato 2023) learns means and how a budget of nats is shared, and the scales follow: its KL
is the budget, whatever the parameters, so that no penalty is needed and training minimises the loss alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import threefry
from jaxcl.trees import keys_like
from jaxcl.typing import Array, ArrayLike, Key, PyTree

_NEWTON_STEPS = 5  # from the first guess below, for float64; float32 needs three


class Gaussian(NamedTuple):
    """Independent normal variables: a posterior over parameters, or a prior."""

    mean: PyTree  # leaves [...]
    scale: PyTree  # standard deviations > 0, leaves [...]


def sample(key: Key, q: Gaussian) -> PyTree:
    """A draw of all variables, leaves [...]. The key is consumed."""

    def draw(own: Key, mean: Array, scale: Array) -> Array:
        return mean + scale * threefry.standard_normal(own, jnp.shape(mean)).astype(jnp.result_type(mean))

    return jax.tree.map(draw, keys_like(key, q.mean), q.mean, q.scale)


def sample_outputs(key: Key, layer: Callable[[PyTree, Array], Array], q: Gaussian, inputs: Array) -> Array:
    """Outputs [B, ...] of a layer whose weights each example draws for itself: local reparameterization.

    Outputs are drawn, not weights (Kingma, Salimans and Welling 2015, arXiv 1506.02557): with the mean of the layer at
    means, and the variance of the layer at variances on squared inputs. That is exact for one output where the layer
    is a sum of products of inputs and weights, as dense layers and convolutions are, with a bias or not. Gradients have
    far less noise than with `layer(sample(key, q), inputs)`, whose one draw serves the whole batch; but outputs of a
    convolution at different pixels are drawn apart, where one kernel would have given them all. Not for weights that
    share values, whose products are not independent.

    Args:
        key: consumed.
        layer: (params, inputs [B, ...]) -> outputs [B, ...].
        q: of its params.
        inputs: [B, ...].
    """
    mean = layer(q.mean, inputs)
    variance = layer(jax.tree.map(jnp.square, q.scale), jnp.square(inputs))
    # The smallest number keeps the gradient of the root finite where inputs are all 0.
    spread = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
    return mean + spread * threefry.standard_normal(key, mean.shape).astype(mean.dtype)


def kl(q: Gaussian, p: Gaussian) -> PyTree:
    """KL(q | p) of each variable in nats, unreduced: leaves [...].

    It keeps its relative precision where q is all but p, down to where the two scales differ in their last bits.
    """

    def of_leaf(q_mean: Array, q_scale: Array, p_mean: Array, p_scale: Array) -> Array:
        # Scales that are close have an exact difference, where their quotient is rounded.
        beyond = (q_scale - p_scale) / p_scale
        close = jnp.abs(beyond) < 0.5
        log_ratio = jnp.where(close, jnp.log1p(jnp.where(close, beyond, 0)), jnp.log(q_scale / p_scale))
        return 0.5 * (((q_mean - p_mean) / p_scale) ** 2 + _excess(-2 * log_ratio))

    return jax.tree.map(of_leaf, *q, *p)


def mean_var(mean: PyTree, log_scale: PyTree) -> Gaussian:
    """Means and scales exp(log_scale), each learned for itself; leaves [...]. The parameterization of MIRACLE."""
    return Gaussian(mean, jax.tree.map(jnp.exp, log_scale))


def mean_kl(raw_mean: PyTree, raw_share: PyTree, budget: PyTree, prior: Gaussian) -> Gaussian:
    """The posterior whose KL from the prior is a given budget, for any parameters (arXiv 2307.07816, section 3).

    A block of weights shares its budget by softmax; of what weight w gets, kappa_w, its mean takes the part
    tanh(raw_mean)^2 and its scale the rest: mean = prior mean + prior scale sqrt(2 kappa_w) tanh(raw_mean), and the
    scale is the one below the prior's whose KL is kappa_w. There is no public code of the authors to differ from.
    Gradients with respect to all four arguments are finite, also where a share or a slack vanishes. Narrower types are
    worked on in float32, whose smallest scale is that of some 88 nats for one weight: beyond it, it is 0.

    Args:
        raw_mean: leaves [..., W]: blocks of W weights.
        raw_share: of the softmax over W, leaves [..., W].
        budget: nats of a block, > 0, leaves [...] or scalars.
        prior: leaves that broadcast against [..., W].

    Returns:
        Leaves [..., W].
    """

    def of_leaf(
        raw_mean: Array, raw_share: Array, budget: Array, prior_mean: Array, prior_scale: Array
    ) -> tuple[Array, Array]:
        kind = jnp.promote_types(jnp.result_type(raw_mean, raw_share), jnp.float32)
        raw_mean, raw_share = raw_mean.astype(kind), raw_share.astype(kind)
        twice = jnp.log(2 * jnp.asarray(budget, kind))[..., None]
        log_twice_kappa = twice + jax.nn.log_softmax(raw_share, axis=-1)
        mean = prior_mean + prior_scale * jnp.exp(log_twice_kappa / 2) * jnp.tanh(raw_mean)
        scale = prior_scale * _ratio_of_log_slack(log_twice_kappa - 2 * _log_cosh(raw_mean))
        return mean, scale

    both = jax.tree.map(of_leaf, raw_mean, raw_share, budget, *prior)
    return Gaussian(*jax.tree.transpose(jax.tree.structure(raw_mean), jax.tree.structure((0, 0)), both))


def mean_kl_scale(kappa: ArrayLike, delta: ArrayLike) -> Array:
    """Sigma / rho <= 1 at which a normal variable delta prior scales off the prior's mean has KL kappa; both [...].

    It is exp(-u / 2), with u >= 0 and exp(-u) + u - 1 = 2 kappa - delta^2; in terms of Lambert's W (arXiv 2307.07816,
    equation 6), u = 1 + 2 kappa - delta^2 + W0(-exp(delta^2 - 2 kappa - 1)). Derivatives follow from the implicit
    function theorem. In float32 it is good to 1e-6, up to the edge, where delta^2 comes to 2 kappa: that difference is
    taken without rounding.

    Returns:
        [...], 1 at the edge and NaN beyond it, where no scale has so small a KL.
    """
    kind = jnp.promote_types(jnp.result_type(kappa, delta), jnp.float32)
    return _scale_within(jnp.asarray(kappa, kind), jnp.asarray(delta, kind))


@jax.custom_jvp
def _scale_within(kappa: Array, delta: Array) -> Array:
    slack, rest = _slack(kappa, delta)
    return jnp.where(slack < 0, jnp.nan, _ratio(slack, rest))


@_scale_within.defjvp
def _scale_within_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (kappa, delta), (kappa_dot, delta_dot) = primals, tangents
    ratio = _scale_within(kappa, delta)
    slope = ratio / -jnp.expm1(-_solve(_slack(kappa, delta)[0]))
    return ratio, slope * (delta * delta_dot - kappa_dot)


def _slack(kappa: Array, delta: Array) -> tuple[Array, Array]:
    """2 kappa - delta^2 as the sum of a number and what was rounded off it."""
    bits = jnp.finfo(delta.dtype)
    head = jax.lax.reduce_precision(delta, exponent_bits=bits.nexp, mantissa_bits=(bits.nmant - 1) // 2)
    tail = delta - head
    total, rest = 2 * kappa, jnp.zeros_like(kappa)
    for term in (-head * head, -2 * head * tail, -tail * tail):  # each of them exact
        total, rounded = _exact_sum(total, term)
        rest = rest + rounded
    return _exact_sum(total, rest)


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """A + b as the rounded sum and what was rounded off (Knuth's two-sum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@jax.custom_jvp
def _ratio_of_log_slack(log_slack: Array) -> Array:
    """Sigma / rho where 2 kappa - delta^2 = exp(log_slack); its derivative is finite everywhere."""
    return _ratio(jnp.exp(log_slack), jnp.zeros_like(log_slack))


@_ratio_of_log_slack.defjvp
def _ratio_of_log_slack_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    slack = jnp.exp(primals[0])
    ratio = _ratio_of_log_slack(primals[0])
    u = jnp.maximum(_solve(slack), jnp.finfo(slack.dtype).tiny)
    return ratio, -0.5 * ratio * slack / -jnp.expm1(-u) * tangents[0]


def _ratio(slack: Array, rest: Array) -> Array:
    """exp(-u / 2) where exp(-u) + u - 1 = slack + rest.

    With u written as slack + rest + 1 - exp(-u) nothing is lost, where it is large, in rounding it. The second factor
    is not an exp, because XLA would turn the product of two into the exp of a rounded sum.
    """
    return jnp.exp(-slack / 2) * (1 + jnp.expm1((jnp.expm1(-_solve(slack)) - rest) / 2))


def _solve(slack: Array) -> Array:
    """U >= 0 with exp(-u) + u - 1 = slack >= 0, which is convex and increasing in u: by Newton's method."""
    root = jnp.sqrt(2 * slack)
    u = jnp.where(slack < 2, root * (1 + root / 6), slack + 1)
    for _ in range(_NEWTON_STEPS):
        u = u - (_excess(u) - slack) / jnp.maximum(-jnp.expm1(-u), jnp.finfo(u.dtype).tiny)
    return u


def _excess(u: Array) -> Array:
    """exp(-u) + u - 1, by its series where the terms would cancel."""
    small = jnp.clip(u, -1, 1)
    series = jnp.zeros_like(u)
    for power in range(18, 1, -1):  # sum of (-u)^k / k!, by Horner's rule
        series = 1 / math.factorial(power) - small * series
    return jnp.where(jnp.abs(u) < 1, small**2 * series, jnp.expm1(-u) + u)


def _log_cosh(x: Array) -> Array:
    magnitude = jnp.abs(x)
    return magnitude + jnp.log1p(jnp.exp(-2 * magnitude)) - math.log(2)
