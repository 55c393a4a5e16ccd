"""Trees: keys, paths, banks and row updates against NumPy on the same trees, inside `jit` and out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import trees
from jaxcl.trees import Rows

pytestmark = pytest.mark.core


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


def mixed_tree():
    """Dict, list, tuple and NamedTuple nodes; float32, bfloat16 and int32 leaves of rank 0, 1 and 2."""
    kernel, narrow = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 1), np.float32)
    return {
        "layers": [Layer(kernel, np.ones(3, jnp.bfloat16)), Layer(narrow, ())],
        "step": (np.asarray(7, np.int32), np.arange(4, dtype=np.int32)),
    }


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


# Keys and paths


def test_keys_like_gives_a_distinct_key_at_each_leaf():
    key, tree = jax.random.key(3), mixed_tree()
    keys = trees.keys_like(key, tree)
    assert jax.tree.structure(keys) == jax.tree.structure(tree)
    words = [tuple(np.asarray(jax.random.key_data(leaf)).tolist()) for leaf in jax.tree.leaves(keys)]
    parent = tuple(np.asarray(jax.random.key_data(key)).tolist())
    assert len({*words, parent}) == len(jax.tree.leaves(tree)) + 1
    draws = [float(jax.random.normal(leaf)) for leaf in jax.tree.leaves(keys)]
    assert len(set(draws)) == len(draws)


def test_keys_like_depends_on_the_key_alone():
    """The same key gives the same keys, another key none of them; the leaves' values do not matter."""
    tree = mixed_tree()
    words = [
        jax.tree.map(jax.random.key_data, trees.keys_like(jax.random.key(seed), like))
        for seed, like in [(0, tree), (0, jax.tree.map(np.zeros_like, tree)), (1, tree)]
    ]
    assert_trees_equal(words[0], words[1])
    for first, second in zip(jax.tree.leaves(words[0]), jax.tree.leaves(words[2]), strict=True):
        assert not np.array_equal(first, second)


def test_keys_like_of_an_empty_tree_is_empty():
    assert trees.keys_like(jax.random.key(0), {"a": ()}) == {"a": ()}


def test_select_paths_joins_keys_by_slashes():
    """The paths that reach the predicate, written out by hand from `mixed_tree`."""
    seen = []
    trees.select_paths(mixed_tree(), lambda path: seen.append(path) or True)
    assert sorted(seen) == ["layers/0/bias", "layers/0/kernel", "layers/1/kernel", "step/0", "step/1"]


def test_select_paths_marks_matching_leaves_only():
    selected = trees.select_paths(mixed_tree(), lambda path: path.endswith("kernel"))
    assert selected == {"layers": [Layer(True, False), Layer(True, ())], "step": (False, False)}


def test_select_paths_of_a_truthy_predicate_holds_plain_bools():
    selected = trees.select_paths({"a": 1, "b": 2}, lambda path: path.count("a"))
    assert selected == {"a": True, "b": False}
    assert type(selected["a"]) is bool


def test_select_paths_without_match_lists_the_paths():
    with pytest.raises(ValueError) as caught:
        trees.select_paths({"a": {"kernel": 1}, "b": 2}, lambda path: "kernal" in path)
    assert str(caught.value) == (
        "predicate: got no match among ['a/kernel', 'b']; write one that holds for at least one path"
    )


@pytest.mark.parametrize("task", [-1, 3, np.int32(3), jnp.int32(3)])
def test_a_task_that_a_bank_has_no_room_for_is_refused(task):
    """JAX would take the last one's entry, and leave the new one out."""
    banked = trees.bank(mixed_tree(), 3)
    for use in (lambda: trees.pick(banked, task), lambda: trees.commit(banked, task, mixed_tree())):
        with pytest.raises(ValueError, match=f"^task: got {int(task)}; there is room for 3, from 0 on"):
            use()


# Task banks


def test_bank_repeats_every_leaf_along_a_new_axis():
    tree = mixed_tree()
    expected = jax.tree.map(lambda leaf: np.stack([leaf] * 3), tree)
    assert_trees_equal(trees.bank(tree, 3), expected)


@pytest.mark.parametrize("tasks", [0, -2])
def test_bank_needs_a_task(tasks):
    with pytest.raises(ValueError, match=f"^tasks: got {tasks}; pass 1 or more$"):
        trees.bank(mixed_tree(), tasks)


def numbered_bank(tasks):
    """A bank whose entry of task t is `mixed_tree` plus t."""
    return jax.tree.map(lambda leaf: np.stack([leaf + leaf.dtype.type(t) for t in range(tasks)]), mixed_tree())


@pytest.mark.parametrize("task", [0, 2, np.int32(1)])
def test_pick_takes_one_entry(task):
    expected = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(task), mixed_tree())
    assert_trees_equal(trees.pick(numbered_bank(3), task), expected)


def test_commit_replaces_one_entry_and_leaves_the_others():
    banked = numbered_bank(3)
    new = jax.tree.map(lambda leaf: leaf * 0 - 1, mixed_tree())
    after = trees.commit(banked, 1, new)
    before = [jax.tree.map(lambda leaf, task=task: leaf[task], banked) for task in range(3)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), before[0], new, before[2])
    assert_trees_equal(after, expected)


def test_bank_pick_commit_under_jit_serve_every_task_with_one_trace():
    """Each task's entry gets doubled + task; expected values by a Python loop over NumPy arrays."""
    traces = []

    @jax.jit
    def visit(banked, task):
        traces.append(task)
        entry = trees.pick(banked, task)
        return trees.commit(banked, task, jax.tree.map(lambda leaf: leaf * 2 + task, entry))

    start = {"w": jnp.asarray([[1.0, 2.0]]), "b": jnp.float32(3.0)}
    banked = jax.jit(trees.bank, static_argnums=1)(start, 4)
    for task in range(4):
        banked = visit(banked, jnp.int32(task))
    np.testing.assert_array_equal(banked["w"], [[[2.0 + task, 4.0 + task]] for task in range(4)])
    np.testing.assert_array_equal(banked["b"], [6.0 + task for task in range(4)])
    assert len(traces) == 1


def test_pick_under_vmap_picks_for_each_example():
    """`[B]` tasks from a `[T, 2]` bank: NumPy's own indexing."""
    banked, tasks = np.arange(6.0, dtype=np.float32).reshape(3, 2), np.asarray([2, 0, 0, 1])
    picked = jax.jit(jax.vmap(trees.pick, in_axes=(None, 0)))(banked, tasks)
    np.testing.assert_array_equal(picked, banked[tasks])


def test_gradient_of_pick_reaches_the_picked_entry_alone():
    """d/dbank of sum(bank[1] ** 2) is 2 bank[1] there and 0 elsewhere."""
    banked = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    gradient = jax.jit(jax.grad(lambda banked: jnp.sum(trees.pick(banked, 1) ** 2)))(banked)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0], [6.0, 8.0]])


# Sizes


def test_counts_of_scalars_and_bytes():
    """mixed_tree: 6 + 3 float32 at 4 bytes, 3 bfloat16 at 2, 1 + 4 int32 at 4."""
    assert trees.parameter_count(mixed_tree()) == 6 + 3 + 3 + 1 + 4
    assert trees.byte_count(mixed_tree()) == 9 * 4 + 3 * 2 + 5 * 4


@pytest.mark.parametrize(("dtype", "size"), [(np.int8, 1), (np.uint16, 2), (np.float64, 8), (bool, 1)])
def test_byte_count_of_numpy_leaves(dtype, size):
    assert trees.byte_count([np.zeros((2, 5), dtype)]) == 10 * size


def test_an_empty_tree_has_no_size():
    assert trees.parameter_count(()) == trees.byte_count({"a": None}) == 0


# Rows


def some_rows(batch_shape, rows, width, dtype=np.float32, seed=0):
    """Row numbers that coincide across examples and whole-number values, which add up exactly in any order."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, rows, batch_shape).astype(np.int32)
    return numbers, random.integers(-4, 5, (*batch_shape, width)).astype(dtype)


def dense(numbers, values, shape):
    """The same update as an array of the table's shape: NumPy's unbuffered add."""
    table = np.zeros((int(np.prod(shape[:-1])), shape[-1]), np.float64)
    np.add.at(table, numbers.reshape(-1), values.reshape(-1, shape[-1]).astype(np.float64))
    return table.reshape(shape)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("batch_shape", [(12,), (5, 3), (4, 3, 2)])
@pytest.mark.parametrize("shape", [(5, 2), (2, 3, 4)])
def test_add_rows_equals_the_dense_sum(shape, batch_shape, jit):
    numbers, values = some_rows(batch_shape, int(np.prod(shape[:-1])), shape[-1])
    assert len(np.unique(numbers)) < numbers.size  # some coincide, so a write in place of an add would show
    table = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    add = jax.jit(trees.add_rows, donate_argnums=0) if jit else trees.add_rows
    after = add(jnp.asarray(table), Rows(numbers, jnp.asarray(values)))
    np.testing.assert_array_equal(after, table + dense(numbers, values, shape))


def test_add_rows_under_vmap_equals_one_table_at_a_time():
    numbers, values = some_rows((3, 7), 4, 2)
    tables = np.random.default_rng(1).integers(-9, 9, (3, 4, 2)).astype(np.float32)
    after = jax.jit(jax.vmap(trees.add_rows))(jnp.asarray(tables), Rows(numbers, jnp.asarray(values)))
    expected = [t + dense(n, v, (4, 2)) for t, n, v in zip(tables, numbers, values, strict=True)]
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(
    ("dtype", "update_dtype"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16)]
)
def test_updates_keep_the_parameters_dtype(dtype, update_dtype):
    """Small whole numbers are exact in all three dtypes, so the values must be too."""
    numbers, values = some_rows((6,), 3, 2)
    params = {"table": jnp.ones((3, 2), dtype), "bias": jnp.ones(2, dtype)}
    rows = Rows(numbers, values.astype(update_dtype))
    after = jax.jit(trees.apply_updates)(params, {"table": rows, "bias": np.asarray([2.0, -3.0], update_dtype)})
    assert after["table"].dtype == after["bias"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(after["table"], np.float64), 1 + dense(numbers, values, (3, 2)))
    np.testing.assert_array_equal(np.asarray(after["bias"], np.float64), [3.0, -2.0])


@pytest.mark.parametrize("jit", [False, True])
def test_apply_updates_on_a_mixed_tree_equals_optax_on_dense_updates(jit):
    numbers, values = some_rows((4, 3), 6, 4)
    params = {
        "values": jnp.arange(24.0).reshape(2, 3, 4),
        "head": [Layer(np.ones((4, 2), np.float32), np.zeros(2, np.float32))],
    }
    others = [Layer(np.full((4, 2), 0.5, np.float32), np.asarray([1.0, -1.0], np.float32))]
    sparse = {"values": Rows(numbers, jnp.asarray(values)), "head": others}
    full = {"values": dense(numbers, values, (2, 3, 4)).astype(np.float32), "head": others}
    apply = jax.jit(trees.apply_updates) if jit else trees.apply_updates
    assert_trees_equal(apply(params, sparse), optax.apply_updates(params, full))
    assert_trees_equal(apply(params, full), optax.apply_updates(params, full))


def test_is_rows_stops_a_map_at_rows():
    tree = {"values": Rows(jnp.zeros(1, jnp.int32), jnp.zeros((1, 2))), "bias": jnp.zeros(2)}
    assert [trees.is_rows(leaf) for leaf in jax.tree.leaves(tree, is_leaf=trees.is_rows)] == [False, True]
    assert not trees.is_rows((1, 2))
