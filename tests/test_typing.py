"""Typing: each check passes what is right and, for what is not, names the argument, its value and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import typing as checks


def test_bad_argument_is_argument_value_and_fix_in_that_order():
    """The form is the one its docstring promises; the numbers are free."""
    error = checks.bad_argument("width", 0, "pass 1 or more")
    assert isinstance(error, checks.ArgumentError) and isinstance(error, ValueError)
    assert str(error) == "width: got 0; pass 1 or more"


@pytest.mark.parametrize("kind", [np.zeros, jnp.zeros])
@pytest.mark.parametrize(("shape", "ranks"), [((), (0,)), ((2,), (1,)), ((2, 3), (1, 2)), ((2, 3, 4), (3, 4))])
def test_check_rank_passes_listed_ranks(kind, shape, ranks):
    checks.check_rank("x", kind(shape), *ranks)


def test_check_rank_lists_the_ranks_it_wants():
    with pytest.raises(ValueError, match=r"^images: got shape \(2, 5\); pass an array with 3 or 4 axes$"):
        checks.check_rank("images", np.zeros((2, 5)), 3, 4)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_check_width_passes_any_leading_axes(shape):
    checks.check_width("x", np.zeros(shape), 4, "the codebook")


@pytest.mark.parametrize("shape", [(), (5,), (4, 5)])
def test_check_width_names_shape_width_and_owner(shape):
    with pytest.raises(ValueError) as caught:
        checks.check_width("x", np.zeros(shape), 4, "the codebook")
    assert str(caught.value) == f"x: got shape {shape}; its last axis must be 4, the width of the codebook"


@pytest.mark.parametrize("check", [checks.check_rank, lambda name, x, _: checks.check_width(name, x, 2, "it")])
def test_shape_checks_work_on_traced_arrays(check):
    """Shapes are static, so a check inside `jit` raises while tracing."""
    traced = jax.jit(lambda x: [check("x", x, 1), x][1])
    assert traced(jnp.arange(2.0)).shape == (2,)
    with pytest.raises(ValueError, match=r"^x: got shape"):
        traced(jnp.zeros((2, 3)))


def test_check_array_refuses_what_has_no_shape():
    checks.check_array("x", np.zeros(2))
    checks.check_array("x", jnp.zeros(()))
    with pytest.raises(ValueError, match=r"^x: got type list; pass an array$"):
        checks.check_array("x", [1.0, 2.0])


@pytest.mark.parametrize("value", [2, 7, np.int32(2)])
def test_check_count_passes_integers(value):
    checks.check_count("tasks", value, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "tasks: got 1; pass 2 or more"), (2.0, "tasks: got 2.0; pass an integer, 2 or more"),
        ("64", "tasks: got '64'; pass an integer, 2 or more"), (None, "tasks: got None; pass an integer, 2 or more"),
    ],
)  # fmt: skip
def test_check_count_refuses_what_is_no_integer(value, message):
    with pytest.raises(ValueError) as caught:
        checks.check_count("tasks", value, 2)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [1, 1.0, 7, np.int64(1), float("inf")])
def test_check_at_least_passes_the_minimum_and_above(value):
    checks.check_at_least("tasks", value, 1)


@pytest.mark.parametrize("value", [0, 0.999, -3, float("nan")])
def test_check_at_least_refuses_below_and_nan(value):
    with pytest.raises(ValueError) as caught:
        checks.check_at_least("tasks", value, 1)
    assert str(caught.value) == f"tasks: got {value}; pass 1 or more"


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_check_between_includes_both_ends(value):
    checks.check_between("decay", value, 0, 1)


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf")])
def test_check_between_refuses_outside_and_nan(value):
    with pytest.raises(ValueError) as caught:
        checks.check_between("decay", value, 0, 1)
    assert str(caught.value) == f"decay: got {value}; pass a number from 0 to 1"


def test_check_choice():
    checks.check_choice("metric", "cosine", ("euclidean", "cosine"))
    with pytest.raises(ValueError, match=r"^metric: got 'manhattan'; choose one of 'euclidean', 'cosine'$"):
        checks.check_choice("metric", "manhattan", ("euclidean", "cosine"))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.uint8, bool])
def test_check_finite_passes_finite_values_of_any_dtype(kind, dtype):
    checks.check_finite("inputs", kind(np.asarray([[0, 1], [1, 0]], dtype)))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_check_finite_counts_and_locates(kind, dtype):
    """Three bad values; in row-major order the first stands at (0, 2)."""
    array = np.zeros((2, 3), dtype)
    array[0, 2], array[1, 0], array[1, 1] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError) as caught:
        checks.check_finite("inputs", kind(array))
    assert str(caught.value) == (
        "inputs: got 3 values that are NaN or infinite, the first at (0, 2); remove or repair those examples"
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_check_labels_passes_integers_in_range(dtype):
    checks.check_labels("labels", np.asarray([0, 2, 1], dtype), 3)
    checks.check_labels("labels", np.asarray([], dtype), 3)
    checks.check_labels("labels", jnp.asarray([0, 2], jnp.int32), 3)


@pytest.mark.parametrize(
    ("labels", "value", "fix"),
    [
        (np.zeros((2, 1), np.int32), r"shape \(2, 1\)", "pass an array with 1 axes"),
        (np.zeros(2, np.float32), "dtype float32", "pass integer class numbers"),
        (np.zeros(2, bool), "dtype bool", "pass integer class numbers"),
        (np.asarray([0, 3]), "values from 0 to 3", r"labels must lie in \[0, 3\)"),
        (np.asarray([2, -1]), "values from -1 to 2", r"labels must lie in \[0, 3\)"),
    ],
)
def test_check_labels_names_value_and_fix(labels, value, fix):
    with pytest.raises(ValueError, match=f"^test.labels: got {value}; {fix}"):
        checks.check_labels("test.labels", labels, 3)


def test_check_finite_knows_bfloat16():
    with pytest.raises(ValueError, match=r"features: got 1 values that are NaN or infinite, the first at \(1,\)"):
        checks.check_finite("features", jnp.array([0, jnp.nan], jnp.bfloat16))


def test_resident_are_arrays_in_memory_only(tmp_path):
    on_disk = np.lib.format.open_memmap(tmp_path / "inputs.npy", mode="w+", dtype=np.float32, shape=(2, 3))
    assert checks.is_resident(np.zeros(3)) and checks.is_resident(jnp.zeros(3))
    assert not checks.is_resident(on_disk)
