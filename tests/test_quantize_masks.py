"""What is masked out, or not finite, is as good as not there: for every quantizer, against the other vectors alone."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl import quantize as q

KEY = jax.random.key(0)
DRAWN = 100.0  # the count of a code that was replaced, and no other


def averaged(width):
    """Codes that nothing chooses sink to 0.8 in a step and are replaced, those chosen once stay at 1."""
    return q.ema_vq(7, width, dead_threshold=0.9, reset_count=DRAWN)


# All of vectors [..., 6].
QUANTIZERS = {
    "vq": lambda: q.vq(7, 6),
    "vq, cosine": lambda: q.vq(7, 6, metric="cosine"),
    "vq, rotation": lambda: q.vq(7, 6, gradient="rotation"),
    "simvq": lambda: q.simvq(7, 6),
    "simvq, cosine": lambda: q.simvq(7, 6, metric="cosine"),
    "simvq, all options": lambda: q.simvq(7, 6, code_width=3, hidden=4, train_codebook=True, gradient="rotation"),
    "ema_vq": lambda: averaged(6),
    "fsq": lambda: q.fsq([5, 4, 3, 2, 3, 4]),
    "lfq": lambda: q.lfq(6),
    "residual vq": lambda: q.residual(q.vq(7, 6), 2),
    "residual ema_vq": lambda: q.residual(averaged(6), 2),
    "grouped vq": lambda: q.grouped(q.vq(7, 3), 2),
    "grouped simvq": lambda: q.grouped(q.simvq(7, 3), 2),
    "projected vq, cosine": lambda: q.projected(q.vq(7, 3, metric="cosine"), 6, 3),
    "projected fsq": lambda: q.projected(q.fsq([5, 4, 3]), 6, 3),
    "projected lfq": lambda: q.projected(q.lfq(3), 6, 3),
    "residual projected": lambda: q.residual(q.projected(q.vq(7, 3), 6, 3), 2),
    "grouped residual": lambda: q.grouped(q.residual(q.vq(7, 3), 2), 2),
}
AVERAGED = ("ema_vq", "residual ema_vq")
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


class Step(NamedTuple):
    """What a training step makes of vectors."""

    out: q.Quantized
    lookup: jax.Array
    grad_x: jax.Array
    grad_params: object
    state: object


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Numbers that bfloat16 has, so that in either precision the vectors are the same.
X = np.asarray(jnp.asarray(normal(1, 12, 6), jnp.bfloat16), np.float32)
VALID = np.isin(np.arange(12), [0, 2, 3, 5, 6, 9, 11])  # 7 of 12
WEIGHTS = normal(2, 12, 8)


@cache
def make(name):
    """A quantizer, its params and state, drawn by NumPy."""
    quantizer, generator = QUANTIZERS[name](), np.random.default_rng(3)
    shapes = jax.eval_shape(quantizer.init, KEY)
    params, state = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    if name in AVERAGED:
        state = q.EMAState(state.codebook, np.ones_like(state.counts), state.codebook)
    return quantizer, params, state


def step(name, x, mask, weights):
    """Forward, backward and update of vectors [..., 6], weights [..., 8] of their two losses and codes."""
    quantizer, *drawn = make(name)
    params, state = jax.tree.map(jnp.asarray, drawn)

    def total(params, x):
        out = quantizer.quantize(params, state, x, mask)
        losses = weights[..., 0] * out.commitment_loss + weights[..., 1] * out.codebook_loss
        return losses.sum() + (weights[..., 2:] * out.codes).sum(), out

    (grad_params, grad_x), out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    after = quantizer.update(KEY, params, state, x, out.indices)
    return Step(out, quantizer.lookup(params, state, out.indices), grad_x, grad_params, after)


compiled = jax.jit(step, static_argnums=0)


@cache
def alone(name):
    """The step of the valid vectors [7, 6] without the others and without a mask, operation by operation."""
    with jax.disable_jit():
        return jax.device_get(step(name, jnp.asarray(X[VALID]), None, WEIGHTS[VALID]))


def arranged(*shape):
    """The 12 vectors, mask and weights on leading axes `shape`."""
    return X.reshape(*shape, 6), VALID.reshape(shape), WEIGHTS.reshape(*shape, 8)


def broken(x, mask):
    """Not a number and infinities, all over a vector or in one entry of it, where the mask does not hold."""
    x, bad = np.array(x), [np.nan, np.inf, -np.inf]
    for number, place in enumerate(np.argwhere(~mask)):
        entry = number % x.shape[-1] if number % 2 else slice(None)
        x[(*place, entry)] = bad[number % 3]
    assert (np.isfinite(x).all(axis=-1) == mask).all()
    return x


def rows_of(tree, rows):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def assert_same(found, expected, tolerance):
    jax.tree.map(lambda *leaves: assert_close(*leaves, tolerance), found, expected)


def assert_only_the_valid(name, found, mask, tolerance=1e-5):
    """`found`, the step of all vectors, is that of the valid ones, and there is nothing elsewhere."""
    expected, found = alone(name), jax.device_get(found)
    for leaf in jax.tree.leaves(found):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    np.testing.assert_array_equal(found.out.indices[mask], expected.out.indices)
    assert (expected.out.indices >= 0).all() and (found.out.indices[~mask] == q.NO_CODE).all()
    of_vectors = (found.out, found.lookup, found.grad_x)
    assert_same(rows_of(of_vectors, mask), (expected.out, expected.lookup, expected.grad_x), tolerance)
    for leaf in jax.tree.leaves(rows_of((found.out._replace(indices=()), found.lookup, found.grad_x), ~mask)):
        assert not leaf.any()
    assert_same(found.grad_params, expected.grad_params, tolerance)
    if name in AVERAGED:
        assert_same_averages(name, found.state, expected, tolerance)
    else:
        assert_same(found.state, expected.state, 0)


def assert_same_averages(name, found, expected, tolerance):
    """Equal but for the codes that were replaced, which are the same ones, by vectors that are there."""
    drawn = expected.state.counts == DRAWN
    assert drawn.any() and not drawn.all()
    np.testing.assert_array_equal(found.counts == DRAWN, drawn)
    assert_same(rows_of(found, ~drawn), rows_of(expected.state, ~drawn), tolerance)
    assert_close(found.sums[drawn], DRAWN * found.codebook[drawn])
    before, stages = make(name)[2].codebook.reshape(-1, 7, 6), expected.out.indices.reshape(7, -1).T
    left = X[VALID]
    for table, indices, codes, replaced in zip(
        before, stages, found.codebook.reshape(-1, 7, 6), drawn.reshape(-1, 7), strict=True
    ):
        sources = np.abs(codes[replaced][:, None] - left).max(axis=-1).argmin(axis=-1)
        assert_close(codes[replaced], left[sources], tolerance)
        assert len(set(sources.tolist())) == len(sources)
        left = left - table[indices]


@every_quantizer
def test_masking_is_leaving_out(name):
    """[B, T, D], compiled: a mask; the same mask with NaN and infinity where it does not hold; these without it."""
    x, mask, weights = arranged(3, 4)
    for vectors, given in ((x, mask), (broken(x, mask), mask), (broken(x, mask), np.ones_like(mask))):
        assert_only_the_valid(name, compiled(name, vectors, given, weights), mask)


@every_quantizer
def test_masking_is_leaving_out_in_half_precision(name):
    """[B, H, W, D], to the precision of bfloat16, and the params after a step are finite."""
    x, mask, weights = arranged(2, 3, 2)
    found = compiled(name, jnp.asarray(broken(x, mask), jnp.bfloat16), mask, weights)
    assert found.out.codes.dtype == found.grad_x.dtype == jnp.bfloat16
    assert_only_the_valid(name, found, mask, 0.03)
    _, params, _ = make(name)
    for param, grad in zip(jax.tree.leaves(params), jax.tree.leaves(found.grad_params), strict=True):
        assert param.dtype == grad.dtype == jnp.float32 and np.isfinite(np.asarray(param - grad)).all()


def test_masking_is_leaving_out_operation_by_operation():
    """[B, H, W, D], float32."""
    name, (x, mask, weights) = "residual ema_vq", arranged(2, 3, 2)
    with jax.disable_jit():
        found = step(name, jnp.asarray(broken(x, mask)), jnp.asarray(mask), weights)
    assert_only_the_valid(name, found, mask)


@every_quantizer
def test_usage_counts_what_is_valid(name):
    _, mask, _ = arranged(3, 4)
    expected = np.asarray(alone(name).out.indices)
    indices = np.full((3, 4, *expected.shape[1:]), q.NO_CODE)
    indices[mask] = expected
    np.testing.assert_array_equal(q.usage(jnp.asarray(indices), 2000), np.bincount(expected.ravel(), minlength=2000))


@every_quantizer
def test_bad_masks_are_named(name):
    quantizer, params, state = make(name)
    for mask in (np.ones(3, bool), np.ones((3, 4, 6), bool), np.ones((3, 4), np.int32)):
        with pytest.raises(ValueError, match=r"mask: got .*; pass \(3, 4\) bool"):
            jax.eval_shape(quantizer.quantize, params, state, np.zeros((3, 4, 6), np.float32), mask)


def test_few_vectors_and_none():
    """No more codes are replaced than there are vectors."""
    x, _, weights = arranged(3, 4)
    for count in (0, 1, 12):
        mask = (np.arange(12) < count).reshape(3, 4)
        found = jax.device_get(compiled("ema_vq", x, mask, weights))
        np.testing.assert_array_equal(found.out.indices != q.NO_CODE, mask)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert (found.state.counts == DRAWN).sum() <= count


def test_draws_serve_each_valid_vector_once_and_no_other():
    """400 keys, 5 of 9 vectors valid, 12 dead codes: 5 are served in each draw, and all 12 at some time."""
    x, valid = normal(3, 9, 2), np.isin(np.arange(9), [1, 2, 5, 7, 8])
    draws = jax.jit(
        jax.vmap(lambda *args: q.draw_replacements(*args[:3], valid=args[3]), in_axes=(0, None, None, None))
    )
    rows, replaced = map(np.asarray, draws(jax.random.split(KEY, 400), x, np.ones(12, bool), valid))
    assert (replaced.sum(axis=-1) == 5).all() and replaced.any(axis=0).all()
    sources = (rows[replaced][:, None] == x).all(axis=-1).argmax(axis=-1).reshape(400, 5)
    assert (np.sort(sources) == np.flatnonzero(valid)).all()


def test_a_projection_that_overflows_leaves_the_vector_out():
    """A finite vector whose projection is not has no code, no losses and no gradient."""
    quantizer = q.projected(q.lfq(3), 2, 3)
    down, up = ({"kernel": jnp.ones(shape), "bias": jnp.ones(shape[1])} for shape in ((2, 3), (3, 2)))
    params = {"down": down, "up": up, "quantizer": ()}

    def total(params, x):
        out = quantizer.quantize(params, (), x)
        return out.codes.sum() + (out.commitment_loss + out.codebook_loss).sum(), out

    x = np.float32([[3e38, 3e38], [1, 2]])
    grads, out = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)
    assert out.indices.tolist() == [q.NO_CODE, 7]
    np.testing.assert_array_equal(out.codes, [[0, 0], [4, 4]])
    np.testing.assert_array_equal(quantizer.lookup(params, (), out.indices), out.codes)
    assert out.commitment_loss[0] == 0 and not np.asarray(grads[1][0]).any()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((grads, out)))


# The entropies of lookup-free quantization


@jax.jit
def entropies_and_gradient(x, mask, weights):
    def total(x):
        each, average = q.lfq_entropies(x, mask, inverse_temperature=2.0)
        return (weights * each).sum() + 3 * average, (each, average)

    gradient, (each, average) = jax.grad(total, has_aux=True)(x)
    return each, average, gradient


def test_entropies_of_masked_vectors():
    """Those of the valid ones alone, also with NaN elsewhere; zero for the others."""
    x, mask, weights = 0.3 * normal(4, 3, 7, 5), np.random.default_rng(5).random((3, 7)) < 0.5, normal(6, 3, 7)
    each, average, gradient = entropies_and_gradient(x[mask], None, weights[mask])
    assert 5 < mask.sum() < 16
    for vectors, given in ((x, mask), (broken(x, mask), mask), (broken(x, mask), np.ones_like(mask))):
        found = jax.device_get(entropies_and_gradient(vectors, given, weights))
        assert_close(found[0][mask], each)
        assert_close(found[1], average)
        assert_close(found[2][mask], gradient)
        assert not found[0][~mask].any() and not found[2][~mask].any()


def test_entropies_of_no_vector():
    found = entropies_and_gradient(normal(4, 3, 7, 5), np.zeros((3, 7), bool), normal(6, 3, 7))
    assert not any(np.asarray(leaf).any() for leaf in found)


@pytest.mark.parametrize("mask", [np.ones((7,), bool), np.ones((3, 7), np.float32)])
def test_bad_masks_of_entropies_are_named(mask):
    with pytest.raises(ValueError, match=r"mask: got .*; pass \(3, 7\) bool"):
        q.lfq_entropies(jnp.zeros((3, 7, 5)), mask)
