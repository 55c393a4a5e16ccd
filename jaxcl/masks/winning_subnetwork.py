"""WSN, winning sub-networks (Kang et al., ICML 2022): each task keeps the weights with the highest scores.

Scores are trained with the weights: the mask is the layer's highest absolute scores, and its gradient passes straight
through to them. Later tasks may use what earlier ones kept, and never move it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.masks.contract import Bank, Masked, MaskMethod, begin_bank, hold, record, task_mask, task_own
from jaxcl.masks.ranks import kth_smallest
from jaxcl.trees import leaves_by_path, replace_leaves
from jaxcl.typing import Array, Key, PyTree, check_between


class WinningSubnetworkState(NamedTuple):
    """What the method knows beside what is trained."""

    bank: Bank


def winning_mask(scores: Array, sparsity: float) -> Array:
    """Which weights of a leaf stay, bool [...]: all but the share `sparsity` with the lowest absolute scores [...].

    As the authors have it: of n, those that are not below the k-th lowest, k = 1 + round(0.01 (100 sparsity) (n - 1)),
    so that scores that are equal to it stay too.
    """
    k = 1 + round(0.01 * (sparsity * 100) * (scores.size - 1))
    strength = jnp.abs(scores)
    return strength >= kth_smallest(strength.reshape(-1), k)


def masked_by_scores(weight: Array, scores: Array, sparsity: float) -> Array:
    """The weight [...] under its `winning_mask`, whose gradient goes straight through to all absolute scores."""
    strength = jnp.sign(scores) * scores  # the gradient of jnp.abs would be 1 at 0, where the authors' is 0
    mask = winning_mask(scores, sparsity) + strength - jax.lax.stop_gradient(strength)
    return weight * mask.astype(weight.dtype)


def winning_subnetwork(covers: Callable[[str], bool], tasks: int, *, sparsity: float) -> MaskMethod:
    """The mask method of WSN. There is no penalty; scores keep from task to task what they learned.

    Args:
        covers: whether the leaf of a path has a mask; see `begin_bank`.
        tasks: T.
        sparsity: share of each leaf's weights that a task does without, 0 to below 1.

    Raises:
        ValueError: an option out of range.
    """
    check_between("sparsity", sparsity, 0, 1 - 1e-9)

    def init(key: Key, params: PyTree) -> tuple[Masked, WinningSubnetworkState]:
        bank = begin_bank(params, covers, tasks)
        keys = jax.random.split(key, len(bank.owner))
        scores = {
            path: _kaiming_uniform(own_key, owner.shape)
            for own_key, (path, owner) in zip(keys, bank.owner.items(), strict=True)
        }
        return Masked(params, scores), WinningSubnetworkState(bank)

    def current(masked: Masked, state: WinningSubnetworkState) -> PyTree:
        weights = leaves_by_path(masked.weights)
        found = {path: masked_by_scores(weights[path], scores, sparsity) for path, scores in masked.scores.items()}
        return replace_leaves(masked.weights, found)

    def sample(key: Key, masked: Masked, state: WinningSubnetworkState) -> tuple[PyTree, Array]:
        return current(masked, state), jnp.float32(0)

    def protect(masked: Masked, updates: Masked, state: WinningSubnetworkState) -> tuple[Masked, PyTree]:
        return updates._replace(weights=hold(updates.weights, state.bank)), state

    def commit(
        key: Key, masked: Masked, state: WinningSubnetworkState, task: Array | int
    ) -> tuple[Masked, WinningSubnetworkState]:
        kept = {path: winning_mask(scores, sparsity) for path, scores in masked.scores.items()}
        return masked, WinningSubnetworkState(record(state.bank, task, kept, masked.weights))

    def select(masked: Masked, state: WinningSubnetworkState, task: Array | int) -> PyTree:
        return masked_weights(masked.weights, state.bank, task)

    return MaskMethod(init, sample, protect, commit, select, current, lambda state: state.bank, tasks)


def masked_weights(weights: PyTree, bank: Bank, task: Array | int) -> PyTree:
    """The weights that a task keeps, 0 elsewhere, and the leaves [...] that are its own."""
    leaves = leaves_by_path(weights)
    found = {path: jnp.where(task_mask(bank, path, task), leaves[path], 0) for path in bank.owner}
    return replace_leaves(weights, found | task_own(bank, task))


def _kaiming_uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """As PyTorch's layers begin, and the authors' scores: uniform within 1 / sqrt(inputs)."""
    return jax.random.uniform(key, shape, minval=-1, maxval=1) / max(1, math.prod(shape[:-1])) ** 0.5
