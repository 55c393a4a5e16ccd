"""Pytree helpers: a key a leaf, path predicates, task banks, and updates that touch only some rows of a table."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.typing import Array, Key, PyTree, bad_argument


def keys_like(key: Key, tree: PyTree) -> PyTree:
    """A tree with the structure of `tree` and an independent key at each leaf. The key is consumed."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def select_paths(tree: PyTree, predicate: Callable[[str], bool], *, argument: str = "predicate") -> PyTree:
    """A tree with the structure of `tree` and, at each leaf, whether `predicate` holds for its path.

    A path is the leaf's keys joined by "/", as in ``"params/Dense_0/kernel"``.

    Raises:
        ValueError: no path matches, which is nearly always a misspelt predicate; it is called `argument`.
    """
    selected = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(predicate(jax.tree_util.keystr(path, simple=True, separator="/"))), tree
    )
    if not any(jax.tree.leaves(selected)):
        raise bad_argument(
            argument, f"no match among {list(leaves_by_path(tree))}", "write one that holds for at least one path"
        )
    return selected


def leaves_by_path(tree: PyTree) -> dict[str, Array]:
    """The leaves of `tree`, of any shape, by path, as in `select_paths`; in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def replace_leaves(tree: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """`tree` with other leaves, of any shape, at some paths.

    Raises:
        ValueError: a path that the tree has not.
    """
    now = leaves_by_path(tree)
    if unknown := leaves.keys() - now.keys():
        raise bad_argument("leaves", f"paths {sorted(unknown)}", f"choose from {sorted(now)}")
    return jax.tree.unflatten(jax.tree.structure(tree), list((now | dict(leaves)).values()))


def bank(tree: PyTree, tasks: int) -> PyTree:
    """Task bank: `tasks` copies of `tree` stacked on a new leading axis, so each leaf [...] becomes [T, ...]."""
    if tasks < 1:
        raise bad_argument("tasks", tasks, "pass 1 or more")
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], tasks, axis=0), tree)


def pick(banked: PyTree, task: Array | int) -> PyTree:
    """The entry of `task` (a traced int32 scalar is fine) in a bank whose leaves are [T, ...]; leaves [...].

    Raises:
        ValueError: a concrete task that the bank has no room for.
    """
    _check_task(banked, task)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, task, keepdims=False), banked)


def commit(banked: PyTree, task: Array | int, tree: PyTree) -> PyTree:
    """The bank (leaves [T, ...]) with the entry of `task` replaced by `tree` (leaves [...]).

    Raises:
        ValueError: a concrete task that the bank has no room for.
    """
    _check_task(banked, task)
    return jax.tree.map(lambda leaf, new: jnp.asarray(leaf).at[task].set(new), banked, tree)


def _check_task(banked: PyTree, task: Array | int) -> None:
    """Raises ValueError for a task out of range, which JAX would take for another one, or leave out."""
    for leaf in jax.tree.leaves(banked)[:1]:
        if not isinstance(task, jax.core.Tracer) and not 0 <= int(task) < len(leaf):
            fix = f"there is room for {len(leaf)}, from 0 on: make the method for more tasks"
            raise bad_argument("task", int(task), fix)


def first_not_finite(counts: PyTree) -> str | None:
    """The path of the first leaf, in the order of the tree, with a count above zero, and how many; None if all are 0.

    Args:
        counts: concrete integers [], such as the numbers of values that are NaN or infinite at each stage of a step.
    """
    for path, count in jax.tree_util.tree_leaves_with_path(jax.device_get(counts)):
        if count:
            return f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({int(count)} values)"
    return None


def parameter_count(tree: PyTree) -> int:
    """Number of scalars in all leaves of `tree`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_count(tree: PyTree) -> int:
    """Bytes of all leaves of `tree` at their own dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Rows(NamedTuple):
    """A gradient or an update that is zero outside some rows of a table [..., V].

    A row's number counts the table's leading axes flattened. Rows that one example contributes are distinct; those of
    different examples may coincide, and then they add up.
    """

    numbers: Array  # [B, ...] int32
    values: Array  # [B, ..., V]


def is_rows(node: object) -> bool:
    """Whether `node` is a `Rows`: the `is_leaf` for maps over trees that may hold some."""
    return isinstance(node, Rows)


def add_rows(table: Array, rows: Rows) -> Array:
    """`table` [..., V] plus `rows`: in place under `jit` with a donated table, at the cost of the rows alone."""
    flat = jnp.asarray(table).reshape(-1, table.shape[-1])
    return flat.at[rows.numbers].add(rows.values.astype(table.dtype), mode="promise_in_bounds").reshape(table.shape)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates` that also takes `Rows` in place of a leaf of `updates`."""

    def apply(param: Array, update: Array | Rows) -> Array:
        if isinstance(update, Rows):
            return add_rows(param, update)
        return (param + update).astype(param.dtype)

    return jax.tree.map(apply, params, updates)
