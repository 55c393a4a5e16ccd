"""Finite scalar quantization against recorded values of vector-quantize-pytorch and its own definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, golden

from jaxcl import quantize as q

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", ["fsq_755", "fsq_8555"])
@pytest.mark.parametrize("jitted", [False, True])
def test_recorded_values(name, jitted):
    arrays, meta = golden(name)
    quantizer = q.fsq(meta["levels"], epsilon=meta["eps"])

    def total(x):
        out = quantizer.quantize((), (), x)
        return (arrays["P"] * out.codes).sum(), out

    gradient = jax.grad(total, has_aux=True)
    grad_x, out = (compiled(gradient) if jitted else gradient)(jnp.asarray(arrays["x"]))
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.codes, arrays["quantized"])
    assert_close(grad_x, arrays["grad_x"])
    assert_close(quantizer.lookup((), (), out.indices), arrays["decoded"])
    every = quantizer.lookup((), (), jnp.arange(np.prod(meta["levels"])))
    assert_close(every, arrays["implicit_codebook"])


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 5, 5], [4, 7, 2]])
def test_every_code_is_reached_and_is_its_own(levels):
    """By the vector that is bounded to just that code; indices count the first entry fastest."""
    quantizer = q.fsq(levels)
    codes = [(np.arange(count) - count // 2) / (count // 2) for count in levels]
    expected = np.asarray([reverse[::-1] for reverse in itertools.product(*codes[::-1])])
    table = quantizer.lookup((), (), jnp.arange(np.prod(levels)))
    assert_close(table, expected)
    counts = np.asarray(levels)
    half_range, offset = (counts - 1) * 1.001 / 2, np.where(counts % 2, 0, 0.5)
    x = np.arctanh((expected * (counts // 2) + offset) / half_range) - np.arctanh(offset / half_range)
    reached = quantizer.quantize((), (), jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(reached.indices, np.arange(np.prod(levels)))
    assert_close(reached.codes, expected)
    assert reached.indices.dtype == jnp.int32
    assert not np.asarray(reached.commitment_loss).any() and not np.asarray(reached.codebook_loss).any()


@pytest.mark.parametrize(("levels", "epsilon"), [([1003, 4], 1e-3), ([16, 4], 0.1), ([2048], 1e-3)])
def test_no_vector_is_rounded_beyond_the_outermost_levels(levels, epsilon):
    quantizer = q.fsq(levels, epsilon=epsilon)
    x = jnp.asarray(list(itertools.product([-50.0, 0.0, 50.0], repeat=len(levels))))
    out = quantizer.quantize((), (), x)
    assert int(out.indices.min()) >= 0 and int(out.indices.max()) < np.prod(levels)
    assert_close(quantizer.lookup((), (), out.indices), out.codes)


def test_bfloat16_is_rounded_in_float32():
    quantizer, x = q.fsq([8, 5]), np.random.default_rng(1).normal(size=(3, 40, 2)).astype(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    out = quantizer.quantize((), (), x)
    assert out.codes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.indices, quantizer.quantize((), (), x.astype(jnp.float32)).indices)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "levels: got []; pass one number an entry"),
        ([5, 1], "levels: got 1; pass 2 or more"),
        ([2**16, 2**15], "levels: got 2147483648 codes; indices are int32"),
    ],
)
def test_bad_levels_are_named(levels, message):
    with pytest.raises(ValueError) as caught:
        q.fsq(levels)
    assert str(caught.value).startswith(message)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"x: got shape \(4, 2\); its last axis must be 3"):
        q.fsq([5, 5, 5]).quantize((), (), jnp.zeros((4, 2)))
