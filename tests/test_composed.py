"""Residual and grouped quantizers against recorded values and against the single quantizer called by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, golden

from jaxcl import quantize as q
from jaxcl.trees import pick

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("jitted", [False, True])
def test_recorded_residual_codes(jitted):
    """ResidualVQ of vector-quantize-pytorch 1.32 in evaluation (goldens/README)."""
    arrays, meta = golden("residual_vq")
    quantizer = q.residual(q.vq(meta["codebook_size"], meta["dim"]), meta["num_quantizers"])
    params = jnp.asarray(arrays["codebooks"])
    out = (compiled(quantizer.quantize) if jitted else quantizer.quantize)(params, (), jnp.asarray(arrays["x"]))
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.codes, arrays["quantized"])
    assert_close(quantizer.lookup(params, (), out.indices), arrays["output_from_indices"])


def small(name):
    """Quantizers of vectors [..., 3]; their params and states begin at random."""
    return {
        "vq": lambda: q.vq(7, 3),
        "rotated": lambda: q.vq(7, 3, gradient="rotation"),
        "simvq": lambda: q.simvq(7, 3, hidden=4),
        "ema_vq": lambda: q.ema_vq(7, 3, dead_threshold=1.1),
        "fsq": lambda: q.fsq([5, 4, 3]),
    }[name]()


@pytest.mark.parametrize("name", ["vq", "rotated", "simvq", "ema_vq", "fsq"])
def test_residual_is_the_single_one_on_what_is_left(name):
    single, depth, x = small(name), 3, normal(1, 5, 4, 3)
    composed = q.residual(single, depth)
    params, state = composed.init(KEY)
    out = jax.jit(composed.quantize)(params, state, x)
    left, total, commitment, codebook, after = x, 0, 0, 0, []
    for stage, key in enumerate(jax.random.split(KEY, depth)):
        own = pick(params, stage), pick(state, stage)
        each = single.quantize(*own, left)
        np.testing.assert_array_equal(out.indices[..., stage], each.indices)
        after.append(single.update(key, *own, left, each.indices))
        total, left = total + each.codes, left - single.lookup(*own, each.indices)
        commitment, codebook = commitment + each.commitment_loss, codebook + each.codebook_loss
    assert_close(out.codes, total)
    assert_close(out.commitment_loss, commitment)
    assert_close(out.codebook_loss, codebook)
    assert_close(composed.lookup(params, state, out.indices), total)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)
    jax.tree.map(assert_close, composed.update(KEY, params, state, x, out.indices), stacked)


@pytest.mark.parametrize("name", ["vq", "rotated", "simvq"])
def test_residual_gradients(name):
    """The sum of codes passes the first choice only; every commitment loss moves x by the whole of its own."""
    single, x, weights = small(name), normal(2, 6, 3), normal(3, 6, 3)
    composed = q.residual(single, 3)
    params, state = composed.init(KEY)
    first = pick(params, 0), pick(state, 0)
    of_codes = jax.grad(lambda x: (weights * composed.quantize(params, state, x).codes).sum())(x)
    assert_close(of_codes, jax.grad(lambda x: (weights * single.quantize(*first, x).codes).sum())(x))
    if name != "rotated":
        assert_close(of_codes, weights)
    of_loss = jax.grad(lambda x: composed.quantize(params, state, x).commitment_loss.sum())(x)
    out, left, expected = composed.quantize(params, state, x), x, 0
    for stage in range(3):
        left = left - single.lookup(pick(params, stage), pick(state, stage), out.indices[..., stage])
        expected = expected + 2 * left
    assert_close(of_loss, expected)


def test_every_projection_of_a_residual_quantizer_learns_from_the_sum():
    """As that of the single one on what is left, of which no gradient is."""
    single, x, weights = q.projected(q.fsq([5, 4]), 3, 2), normal(2, 6, 3), normal(3, 6, 3)
    composed = q.residual(single, 3)
    params, state = composed.init(KEY)
    found = jax.grad(lambda params: (weights * composed.quantize(params, state, x).codes).sum())(params)
    left = x
    for stage in range(3):
        own = pick(params, stage), pick(state, stage)
        expected = jax.grad(lambda of, own=own, left=left: (weights * single.quantize(of, own[1], left).codes).sum())(
            own[0]
        )
        jax.tree.map(assert_close, pick(found, stage), expected)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
        left = left - single.quantize(*own, left).codes


@pytest.mark.parametrize("name", ["vq", "simvq", "ema_vq", "fsq"])
def test_grouped_is_the_single_one_on_each_part(name):
    single, groups, x = small(name), 2, normal(4, 5, 4, 6)
    composed = q.grouped(single, groups)
    params, state = composed.init(KEY)
    out = jax.jit(composed.quantize)(params, state, x)
    assert out.codes.shape == x.shape and out.indices.shape == (5, 4, groups)
    commitment, after = 0, []
    for group, key in enumerate(jax.random.split(KEY, groups)):
        own, part = (pick(params, group), pick(state, group)), x[..., 3 * group : 3 * group + 3]
        each = single.quantize(*own, part)
        np.testing.assert_array_equal(out.indices[..., group], each.indices)
        assert_close(out.codes[..., 3 * group : 3 * group + 3], each.codes)
        commitment = commitment + each.commitment_loss
        after.append(single.update(key, *own, part, each.indices))
    assert_close(out.commitment_loss, commitment)
    assert_close(composed.lookup(params, state, out.indices), out.codes)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)
    jax.tree.map(assert_close, composed.update(KEY, params, state, x, out.indices), stacked)


def test_compositions_compose():
    """Residual over groups and groups of residuals: indices gain an axis each, and losses still move everything."""
    x = normal(5, 8, 6)
    for composed, shape in (
        (q.residual(q.grouped(q.simvq(7, 3), 2), 4), (8, 2, 4)),
        (q.grouped(q.residual(q.simvq(7, 3), 4), 2), (8, 4, 2)),
    ):
        params, state = composed.init(KEY)
        out = composed.quantize(params, state, x)
        assert out.indices.shape == shape
        assert_close(composed.lookup(params, state, out.indices), out.codes)
        grads = jax.grad(lambda params: composed.quantize(params, state, x).codebook_loss.sum())(params)  # noqa: B023
        assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(grads))


def test_bad_arguments_are_named():
    single = q.vq(7, 3)
    for make, name in ((q.residual, "depth"), (q.grouped, "groups")):
        with pytest.raises(ValueError, match=f"{name}: got 0; pass 1 or more"):
            make(single, 0)
        composed = make(single, 2)
        params, state = composed.init(KEY)
        with pytest.raises(ValueError, match=r"indices: got shape \(4, 3\); pass a last axis of 2"):
            composed.lookup(params, state, jnp.zeros((4, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"x: got shape \(4, 5\); pass a last axis that 2 groups divide evenly"):
        q.grouped(single, 2).quantize(params, state, jnp.zeros((4, 5)))
