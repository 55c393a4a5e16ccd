"""What a mask method is, and the bank of what each task keeps: a bit a masked weight, and all other parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.trees import commit, leaves_by_path, pick, replace_leaves, select_paths
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_between

FREE = 255  # in place of a task's number: no task has claimed the weight
Named = dict[str, Array]  # leaves by their paths


class Masked(NamedTuple):
    """What is trained; each field may have an optimizer of its own (`separate_rates`)."""

    weights: PyTree  # the network's parameters
    scores: PyTree  # what decides which of them a task keeps, by path; () where the weights themselves do


class Bank(NamedTuple):
    """What is kept of each task. A weight never moves again once a task has claimed it."""

    masks: Named  # by path of a masked leaf, [T, ceil(n / 8)] uint8, a bit for each of its n weights
    owner: Named  # by path of a masked leaf, of its shape, uint8: the first task that kept the weight, or FREE
    own: Named  # by path of any other leaf, [T, ...]: biases, normalisation and heads, a set a task
    scales: dict[str, PyTree]  # by path of a masked leaf, [T, ...]: what its weights are multiplied by; {} for nothing


class _Protect(Protocol):
    def __call__(self, masked: Masked, updates: Masked, state: PyTree) -> tuple[Masked, PyTree]: ...


class MaskMethod(NamedTuple):
    """A way to give each task a sub-network of one network, as pure functions.

    What `select` gives for a task is the same to the last bit for ever after that task was committed.
    """

    init: Callable[[Key, PyTree], tuple[Masked, PyTree]]  # (key, params) -> (what is trained, state)
    sample: Callable[[Key, Masked, PyTree], tuple[PyTree, Array]]
    # (key, masked, state) -> (params as a training step has them, penalty [] in nats)
    protect: _Protect  # (masked, updates, state) -> (updates, state), after the optimizer: committed weights stay
    commit: Callable[[Key, Masked, PyTree, Array | int], tuple[Masked, PyTree]]
    # (key, masked, state, task) -> (masked, state), at a task's end: tasks once each, and in the order of their numbers
    select: Callable[[Masked, PyTree, Array | int], PyTree]  # (masked, state, task) -> params as the task has them
    current: Callable[[Masked, PyTree], PyTree]
    # (masked, state) -> params as the task would keep them if it ended now, but for the rounding of scales
    bank: Callable[[PyTree], Bank]  # (state) -> what is kept
    tasks: int  # T, how many the bank has room for


def begin_bank(params: PyTree, covers: Callable[[str], bool], tasks: int) -> Bank:
    """The bank before the first task, where no mask [T, ceil(n / 8)] has a bit.

    Args:
        params: the network's parameters.
        covers: whether the leaf of a path has a mask; each task keeps all others as they are.
        tasks: T, 1 to 255.

    Raises:
        ValueError: no leaf has a mask, one that has one is not of floats, or too many tasks.
    """
    check_between("tasks", tasks, 1, FREE)
    select_paths(params, covers, argument="covers")  # which tells of predicates that no path matches
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    for path, leaf in leaves.items():
        if covers(path) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise bad_argument("covers", f"{path} of {leaf.dtype}", "only leaves of floats have masks")
    chosen = {path: leaf for path, leaf in leaves.items() if covers(path)}
    return Bank(
        {path: jnp.zeros((tasks, -(-leaf.size // 8)), jnp.uint8) for path, leaf in chosen.items()},
        {path: jnp.full(leaf.shape, FREE, jnp.uint8) for path, leaf in chosen.items()},
        {path: jnp.zeros((tasks, *leaf.shape), leaf.dtype) for path, leaf in leaves.items() if path not in chosen},
        {},
    )


def is_free(bank: Bank) -> Named:
    """Whether no task has claimed a weight, by path, bool of the leaves' shapes."""
    return {path: owner == FREE for path, owner in bank.owner.items()}


def record(
    bank: Bank, task: Array | int, kept: Mapping[str, Array], params: PyTree, scales: Mapping[str, PyTree] | None = None
) -> Bank:
    """The bank with what a task keeps; free weights among those are its from now on.

    Args:
        bank: consumed.
        task: its number, from 0.
        kept: by path of a masked leaf, bool [...] of its shape.
        params: whose unmasked leaves are kept.
        scales: by path of a masked leaf, an entry of `Bank.scales`, for a bank that has them.
    """
    leaves = leaves_by_path(params)
    number = jnp.asarray(task, jnp.uint8)
    return Bank(
        commit(bank.masks, task, {path: jnp.packbits(kept[path]) for path in bank.masks}),
        {path: jnp.where(kept[path] & (owner == FREE), number, owner) for path, owner in bank.owner.items()},
        commit(bank.own, task, {path: leaves[path] for path in bank.own}),
        commit(bank.scales, task, dict(scales or {})),
    )


def task_mask(bank: Bank, path: str, task: Array | int) -> Array:
    """The mask of a task, bool of the leaf's shape [...]."""
    owner = bank.owner[path]
    return jnp.unpackbits(pick(bank.masks[path], task), count=owner.size).reshape(owner.shape).astype(bool)


def unpacked_masks(bank: Bank, tasks: int) -> dict[str, np.ndarray]:
    """The masks of the first tasks on the host: by path, bool [T, n]."""
    return {
        path: np.unpackbits(np.asarray(masks[:tasks]), axis=1, count=bank.owner[path].size).astype(bool)
        for path, masks in bank.masks.items()
    }


def task_own(bank: Bank, task: Array | int) -> Named:
    """The leaves that a task keeps as they are, by path, [...] each."""
    own: Named = pick(bank.own, task)
    return own


def hold(updates: PyTree, bank: Bank) -> PyTree:
    """Updates of the weights [...], 0 where a task has claimed them."""
    leaves = leaves_by_path(updates)
    return replace_leaves(updates, {path: jnp.where(free, leaves[path], 0) for path, free in is_free(bank).items()})


def separate_rates(
    weights: optax.GradientTransformation, scores: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimizer for each field of `Masked`; scores want a rate far above that of the weights."""
    of_field = {"weights": weights, "scores": scores}
    return optax.multi_transform(of_field, Masked(*of_field))
