"""Progressive compression: a posterior over the values of a layout, coded block by block with training in between.

    values -> tree_of_values -> the network's loss -> gradients -> optimizer -> variables
                                          ... and now and then encode_next, whose blocks are fixed from then on

What is left to train makes up for what coded blocks came to (Havasi, Peharz and Hernandez-Lobato 2018, algorithm 2).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import gaussian, threefry
from jaxcl.coding.coders import Coder, Encoded
from jaxcl.coding.layout import Layout, places, tree_of_values
from jaxcl.coding.storage import Message, storable, values
from jaxcl.gaussian import Gaussian
from jaxcl.trees import leaves_by_path
from jaxcl.typing import Array, ArrayLike, Key, PyTree, bad_argument, check_at_least, check_count

_SMALLEST_SCALE = 1e-2  # of a prior, in `init`: leaves of zeros, as biases are, have none of their own


class Variables(NamedTuple):
    """What an optimizer trains."""

    raw_mean: Array  # [M, W]
    raw_spread: Array  # [M, W], shares of `mean_kl`, log scales of `mean_var`
    log_prior_scale: Array  # [leaves], of priors with mean 0


class _Gaussians(Protocol):
    def __call__(self, variables: Variables, times: ArrayLike | float = 1.0) -> tuple[Gaussian, Gaussian]: ...


class Posterior(NamedTuple):
    """A parameterization of the posterior over the values of a layout."""

    init: Callable[[Key, PyTree], Variables]  # (key, params): priors get the scales of these; the key is consumed
    gaussians: _Gaussians  # (variables, times=1) -> posterior and prior, leaves [M, W]; `times` multiplies the KL of a
    # parameterization that holds it by itself
    budget: float | None = None  # bits to which a penalty has to bring each block; None if they hold by themselves


def mean_kl_posterior(layout: Layout, kl: float) -> Posterior:
    """Mean-KL (`gaussian.mean_kl`): each block spends `kl` bits, whatever the variables.

    Raises:
        ValueError: no bits; in `init`, parameters of another layout.
    """
    check_at_least("kl", kl, 1e-6)
    leaf_of = places(layout).leaf

    def gaussians(variables: Variables, times: ArrayLike | float = 1.0) -> tuple[Gaussian, Gaussian]:
        prior = _prior(variables, leaf_of)
        return gaussian.mean_kl(variables.raw_mean, variables.raw_spread, times * kl * math.log(2), prior), prior

    return Posterior(partial(_first_variables, layout, 0.0), gaussians)


def mean_var_posterior(layout: Layout, kl: float) -> Posterior:
    """Mean-Var, MIRACLE's own: means and log scales in units of the prior; a penalty brings a block's KL to `kl` bits.

    Raises:
        ValueError: no bits; in `init`, parameters of another layout.
    """
    check_at_least("kl", kl, 1e-6)
    leaf_of = places(layout).leaf

    def gaussians(variables: Variables, times: ArrayLike | float = 1.0) -> tuple[Gaussian, Gaussian]:
        prior = _prior(variables, leaf_of)
        unit = gaussian.mean_var(variables.raw_mean, variables.raw_spread)
        return Gaussian(unit.mean * prior.scale, unit.scale * prior.scale), prior

    return Posterior(partial(_first_variables, layout, -2.0), gaussians, kl)


def _prior(variables: Variables, leaf_of: np.ndarray) -> Gaussian:
    scale = jnp.exp(variables.log_prior_scale)[leaf_of]
    return Gaussian(jnp.zeros_like(scale), scale)


def _first_variables(layout: Layout, spread: float, key: Key, params: PyTree) -> Variables:
    given = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    if given != (wanted := {leaf.path: leaf.shape for leaf in layout.leaves}):
        raise bad_argument("params", f"leaves {given}", f"pass those of the layout: {wanted}")
    shape = layout.blocks, layout.width
    # In float32, as files have them, whatever the parameters are trained in.
    scales = jnp.stack([jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32)))) for leaf in jax.tree.leaves(params)])
    return Variables(
        0.5 * threefry.standard_normal(key, shape), jnp.full(shape, spread, jnp.float32),
        jnp.log(jnp.maximum(scales, _SMALLEST_SCALE)),
    )  # fmt: skip


class Progress(NamedTuple):
    """What is coded of M blocks: the first so many."""

    coded: Array  # [] int32
    indices: Array  # [M] uint32, of those that are
    values: Array  # [M, W], as they will be decoded
    kl: Array  # [M], what each spent when it was coded, in bits


def nothing_coded(layout: Layout) -> Progress:
    """The progress [M, W] of a compression that begins."""
    blocks, width = layout.blocks, layout.width
    values, kl = jnp.zeros((blocks, width), jnp.float32), jnp.zeros(blocks, jnp.float32)
    return Progress(jnp.zeros((), jnp.int32), jnp.zeros(blocks, jnp.uint32), values, kl)


def sample_values(key: Key, q: Gaussian, progress: Progress) -> Array:
    """Values [M, W]: of coded blocks as they are, of the others a draw from the posterior. The key is consumed."""
    coded = jnp.arange(len(progress.values)) < progress.coded
    return jnp.where(coded[:, None], progress.values, gaussian.sample(key, q))


def with_storable_priors(variables: Variables) -> Variables:
    """Variables [M, W] whose priors have scales that a file can hold: with these, coding begins."""
    return variables._replace(log_prior_scale=jnp.log(storable(jnp.exp(variables.log_prior_scale))))


class TrainState(NamedTuple):
    """What a step changes."""

    variables: Variables
    opt_state: PyTree
    log_penalty: Array  # [M], the logarithm of what a nat of each block counts in the loss; only for a budget
    step: Array  # [] int32, how many were taken


class Told(NamedTuple):
    """What a step tells."""

    loss: Array  # [], without the penalty
    kl: Array  # [], in bits, of the blocks that are not coded, in the mean


class Trainer(NamedTuple):
    """Training of a posterior while it is coded."""

    init: Callable[[Key, PyTree], TrainState]  # (key, params) -> state; the key is consumed
    step: Callable[[Key, TrainState, Progress, PyTree], tuple[TrainState, Told]]  # (key, state, progress, batch)


def trainer(
    layout: Layout, posterior: Posterior, tx: optax.GradientTransformation, loss: Callable[[PyTree, PyTree], Array],
    *, penalty: float = 1e-5, penalty_rate: float = 2e-3, budget_schedule: optax.Schedule | None = None,
) -> Trainer:  # fmt: skip
    """Steps by one draw of the posterior each; once a block is coded priors stand still: candidates come of them.

    A posterior with a budget gets MIRACLE's penalty: what a nat of a block counts grows with each step in which the
    block is above the budget, and shrinks with the others (Havasi et al. 2018, section 3.3).

    Args:
        layout: of the values.
        posterior: of their parameterization.
        tx: optimizer of `Variables`.
        loss: (params, batch) -> [], the mean over a batch, in nats.
        penalty: what a nat counts at first.
        penalty_rate: by what share of itself that changes in a step.
        budget_schedule: (steps taken) -> how many times its KL a block has in this step, where the parameterization
            holds it; to be 1 before anything is coded. A deep network of small budgets does not begin to learn: with
            noise as large as the means no signal comes through. It does with a larger one, which then falls. None is 1
            in all steps.

    Raises:
        ValueError: a penalty that is not above 0.
    """
    check_at_least("penalty", penalty, 1e-30)
    of_weights = places(layout).of_weights
    blocks = jnp.arange(layout.blocks)

    def init(key: Key, params: PyTree) -> TrainState:
        variables = posterior.init(key, params)
        log_penalty = jnp.full(layout.blocks, math.log(penalty), jnp.float32)
        return TrainState(variables, tx.init(variables), log_penalty, jnp.int32(0))

    def step(key: Key, state: TrainState, progress: Progress, batch: PyTree) -> tuple[TrainState, Told]:
        waiting = blocks >= progress.coded
        times = 1.0 if budget_schedule is None else budget_schedule(state.step)

        def objective(variables: Variables) -> tuple[Array, tuple[Array, Array]]:
            q, p = posterior.gaussians(variables, times)
            found = loss(tree_of_values(of_weights, sample_values(key, q, progress)), batch)
            nats = jnp.where(waiting, gaussian.kl(q, p).sum(axis=1), 0)
            weighted = jnp.sum(jnp.exp(state.log_penalty) * nats) if posterior.budget is not None else 0
            return found + weighted, (found, nats)

        gradients, (found, nats) = jax.grad(objective, has_aux=True)(state.variables)
        updates, opt_state = tx.update(gradients, state.opt_state, state.variables)
        updates = updates._replace(log_prior_scale=jnp.where(progress.coded > 0, 0, updates.log_prior_scale))
        bits = nats / math.log(2)
        log_penalty = state.log_penalty
        if posterior.budget is not None:
            log_penalty += penalty_rate * jnp.where(bits > posterior.budget, 1, -1)
        told = Told(found, bits.sum() / jnp.maximum(waiting.sum(), 1))
        return TrainState(optax.apply_updates(state.variables, updates), opt_state, log_penalty, state.step + 1), told

    return Trainer(init, step)


def encode_next(
    key: Key, coder: Coder, layout: Layout, posterior: Posterior, variables: Variables, progress: Progress, count: int
) -> tuple[Progress, Encoded]:  # fmt: skip
    """Codes the next blocks; what they stand for is decoded as any receiver will decode it.

    Args:
        key: the sender's own randomness; consumed.
        coder: `mrc`, `orc` or `astar`, the same for all blocks.
        layout: of the values.
        posterior: of the variables.
        variables: [M, W], as `with_storable_priors` gives them.
        progress: [M, W], so far.
        count: how many blocks; calls with the same count share a compilation.

    Returns:
        The progress, and what the coder says of the blocks [count]; where fewer were left, the last one comes again.

    Raises:
        ValueError: a count below 1, or no block is left.
        FloatingPointError: posteriors that are not finite.
    """
    start = int(progress.coded)
    check_count("count", count, 1)
    if start == layout.blocks:
        raise bad_argument("progress", f"all {start} blocks coded", "save its message")
    end = min(start + count, layout.blocks)
    blocks = np.minimum(start + np.arange(count), layout.blocks - 1)
    q, p = (Gaussian(of.mean[blocks], of.scale[blocks]) for of in posterior.gaussians(variables))
    encoded = coder.encode(key, layout.seed, blocks, q, p)
    spent = gaussian.kl(q, p).sum(axis=1) / math.log(2)
    if not np.isfinite(spent).all():
        raise FloatingPointError(f"variables: a KL of {spent} bits; training went wrong before: look at its losses")
    indices, decoded, kl = map(np.array, progress[1:])  # on the host, where no slice is compiled
    indices[blocks], kl[blocks] = encoded.indices, spent
    progress = Progress(jnp.asarray(end, jnp.int32), jnp.asarray(indices), progress.values, jnp.asarray(kl))
    decoded[blocks] = values(message(coder, layout, variables, progress), blocks)
    return progress._replace(values=jnp.asarray(decoded)), encoded


def message(coder: Coder, layout: Layout, variables: Variables, progress: Progress) -> Message:
    """What a file holds of the variables [M, W] and the progress [M, W]; blocks that are not coded have the index 0."""
    scales = storable(np.exp(np.asarray(variables.log_prior_scale)))
    return Message(layout, scales, coder.bits, np.asarray(progress.indices), float(progress.kl.mean()))
