"""PackNet (Mallya & Lazebnik, CVPR 2018): train, prune by magnitude, train what is left, and so on with what is free.

A task uses all weights that earlier ones kept, as they are, and the largest of the free ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.masks.contract import Bank, Masked, MaskMethod, Named, begin_bank, hold, is_free, record
from jaxcl.masks.ranks import kth_smallest
from jaxcl.masks.winning_subnetwork import masked_weights
from jaxcl.trees import leaves_by_path, replace_leaves
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_between, check_count


class PackNetState(NamedTuple):
    """What the method knows beside what is trained."""

    bank: Bank
    chosen: Named  # by path, bool of the leaves' shapes: free weights that this task still uses
    steps: Array  # [] int32, of this task
    task: Array  # [] int32


def packnet(
    covers: Callable[[str], bool], tasks: int, *, share: float | Sequence[float], prune_after: int
) -> MaskMethod:
    """The mask method of PackNet.

    Args:
        covers: whether the leaf of a path has a mask; see `begin_bank`.
        tasks: T.
        share: of the free weights of each leaf that a task keeps, above 0 to 1; or one for each task.
        prune_after: steps of a task after which it prunes; what steps come then train what is left. A task that has
            fewer prunes at its end.

    Raises:
        ValueError: an option out of range.
    """
    shares = [float(share)] * tasks if isinstance(share, int | float) else [float(part) for part in share]
    if len(shares) != tasks:
        raise bad_argument("share", f"{len(shares)} of them", f"pass one, or one for each of {tasks} tasks")
    for part in shares:
        check_between("share", part, 1e-9, 1)
    check_count("prune_after", prune_after, 1)

    def init(key: Key, params: PyTree) -> tuple[Masked, PackNetState]:
        bank = begin_bank(params, covers, tasks)
        return Masked(params, ()), PackNetState(bank, is_free(bank), jnp.int32(0), jnp.int32(0))

    def current(masked: Masked, state: PackNetState) -> PyTree:
        weights, free = leaves_by_path(masked.weights), is_free(state.bank)
        found = {path: jnp.where(state.chosen[path] | ~free[path], weights[path], 0) for path in free}
        return replace_leaves(masked.weights, found)

    def sample(key: Key, masked: Masked, state: PackNetState) -> tuple[PyTree, Array]:
        return current(masked, state), jnp.float32(0)

    def prune(masked: Masked, state: PackNetState) -> Named:
        """The largest of the free weights, but for those at 0, of which there may be many."""
        weights, part = leaves_by_path(masked.weights), jnp.asarray(shares)[state.task]
        chosen = {}
        for path, free in is_free(state.bank).items():
            strength = jnp.where(free, jnp.abs(weights[path]), jnp.inf).reshape(-1)
            count = free.sum()
            keep = jnp.minimum(jnp.ceil(part * count).astype(jnp.int32), count)
            large = strength >= kth_smallest(strength, count - keep + 1)
            chosen[path] = free & (large & (strength > 0)).reshape(free.shape)
        return chosen

    def protect(masked: Masked, updates: Masked, state: PackNetState) -> tuple[Masked, PackNetState]:
        steps = state.steps + 1
        chosen = jax.lax.cond(steps == prune_after, prune, lambda masked, state: state.chosen, masked, state)
        return updates._replace(weights=hold(updates.weights, state.bank)), state._replace(chosen=chosen, steps=steps)

    def commit(key: Key, masked: Masked, state: PackNetState, task: Array | int) -> tuple[Masked, PackNetState]:
        late = jax.lax.cond(state.steps < prune_after, prune, lambda masked, state: state.chosen, masked, state)
        kept = {path: late[path] | ~free for path, free in is_free(state.bank).items()}
        bank = record(state.bank, task, kept, masked.weights)
        following = jnp.minimum(jnp.int32(task) + 1, tasks - 1)
        weights = leaves_by_path(masked.weights)
        # What was pruned begins the next task at 0, where the others of its layer make it differ from its like.
        pruned = {path: jnp.where(kept[path], weights[path], 0) for path in kept}
        masked = masked._replace(weights=replace_leaves(masked.weights, pruned))
        return masked, PackNetState(bank, is_free(bank), jnp.int32(0), following)

    def select(masked: Masked, state: PackNetState, task: Array | int) -> PyTree:
        return masked_weights(masked.weights, state.bank, task)

    return MaskMethod(init, sample, protect, commit, select, current, lambda state: state.bank, tasks)
