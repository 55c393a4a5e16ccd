"""Compilations: a program is counted when it compiles, by its name, and only inside the context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.continual.compilations import count_compilations


def program(name):
    """A new jitted function of that name, which nothing has compiled yet."""

    def add(x):
        return x + 1

    add.__name__ = name
    return jax.jit(add)


def vector(width):
    return np.zeros(width, np.float32)


def test_counts_once_a_shape_and_not_what_is_compiled_already():
    """Widths 2, 3 and again 2 and 3 are two programs; the dtype int32 is a third."""
    double = program("double_it")
    with count_compilations(["double_it"]) as counts:
        assert counts == {}
        for width, expected in [(2, 1), (3, 2), (2, 2), (3, 2)]:
            double(vector(width))
            assert counts == {"double_it": expected}
        double(np.zeros(2, np.int32))
    assert counts == {"double_it": 3}


def test_counts_two_functions_of_one_name_together():
    with count_compilations(["same_name"]) as counts:
        program("same_name")(vector(2))
        program("same_name")(vector(2))
    assert counts == {"same_name": 2}


def test_keeps_names_apart_and_ignores_others():
    """A longer name that contains a listed one is another name; so is what runs without `jit`."""
    with count_compilations(["alpha", "beta"]) as counts:
        for name in ("alpha", "beta", "alphabet", "jit(alpha", "gamma"):
            program(name)(vector(2))
        jnp.sinh(vector(7))
    assert counts == {"alpha": 1, "beta": 1}


def test_a_function_inside_another_is_part_of_the_outer_program():
    """Inlined, it never compiles by itself."""
    inner = program("inner_part")
    outer = jax.jit(lambda x: inner(x) * 2)
    with count_compilations(["inner_part"]) as counts:
        outer(vector(2))
    assert counts == {}


@pytest.mark.parametrize("wrap", [jax.vmap, jax.grad])
def test_counts_transformed_functions_by_the_name_they_are_given(wrap):
    def square(x):
        return x * x

    transformed = wrap(square)
    transformed.__name__ = "transformed_square"
    with count_compilations(["transformed_square"]) as counts:
        jax.jit(transformed)(vector(3) if wrap is jax.vmap else np.float32(3))
    assert counts == {"transformed_square": 1}


def test_ahead_of_time_compilation_counts_too():
    with count_compilations(["ahead_of_time"]) as counts:
        lowered = program("ahead_of_time").lower(vector(2))
        assert counts == {}
        lowered.compile()
    assert counts == {"ahead_of_time": 1}


def test_nothing_is_counted_after_the_context():
    """A listener that stayed registered would go on filling the counter."""
    late = program("too_late")
    with count_compilations(["too_late"]) as counts:
        late(vector(2))
    late(vector(3))
    assert counts == {"too_late": 1}


def test_an_error_inside_takes_the_listener_away_too():
    broken = program("after_error")
    with pytest.raises(RuntimeError, match="stop"), count_compilations(["after_error"]) as counts:
        raise RuntimeError("stop")
    broken(vector(2))
    assert counts == {}


def test_contexts_may_nest_and_overlap():
    """The inner one sees what compiles while it lasts, the outer one everything."""
    nested = program("nested_name")
    with count_compilations(["nested_name"]) as outer:
        nested(vector(2))
        with count_compilations(["nested_name"]) as inner:
            nested(vector(3))
        nested(vector(4))
    assert outer == {"nested_name": 3}
    assert inner == {"nested_name": 1}
