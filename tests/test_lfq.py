"""Lookup-free quantization and its entropies against recorded values and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, golden, numerical_gradient
from scipy.special import softmax

from jaxcl import quantize as q
from jaxcl.quantize import scalar

pytestmark = pytest.mark.core


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", ["lfq", "lfq_b"])
@pytest.mark.parametrize("jitted", [False, True])
def test_recorded_values(name, jitted):
    """vector-quantize-pytorch 1.32: what it differentiates is `sum(P * codes) + loss` (goldens/README)."""
    arrays, meta = golden(name)
    quantizer, x = q.lfq(meta["dim"]), jnp.asarray(arrays["x"])

    def total(x, weights):
        out = quantizer.quantize((), (), x)
        each, average = q.lfq_entropies(x, inverse_temperature=meta["inv_temperature"], floor=1e-5)
        commitment = out.commitment_loss.mean() / meta["dim"]
        entropy = each.mean() - meta["diversity_gamma_used"] * average
        loss = meta["entropy_loss_weight_used"] * entropy + meta["commitment_loss_weight_used"] * commitment
        return (weights * out.codes).sum() + loss, (out, loss, each.mean(), average, commitment)

    gradient = jax.grad(total, has_aux=True)
    gradient = compiled(gradient) if jitted else gradient
    grad_x, (out, loss, each, average, commitment) = gradient(x, arrays["P"])
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.codes, arrays["quantized"])
    assert_close(each, arrays["per_sample_entropy"])
    assert_close(average, arrays["batch_entropy"])
    assert_close(loss, arrays["aux_loss"])
    assert_close(grad_x, arrays["grad_x"])
    assert_close(gradient(x, jnp.zeros_like(x))[0], arrays["grad_x_aux_only"])
    if meta["commitment_loss_weight_used"]:
        assert_close(commitment, arrays["commitment"])
    assert_close(quantizer.lookup((), (), jnp.arange(2 ** meta["dim"])), arrays["codebook"])


def entropies(x, scale, inverse_temperature):
    """By the definition, in float64, over all codes."""
    width = x.shape[-1]
    codes = scale * (2.0 * (np.arange(2**width)[:, None] // 2 ** np.arange(width - 1, -1, -1) % 2) - 1)
    p = softmax(2 * inverse_temperature * np.float64(x).reshape(-1, width) @ codes.T, axis=-1)

    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)

    return entropy(p).reshape(x.shape[:-1]), entropy(p.mean(axis=0))


@pytest.mark.parametrize("block", [1, 8, 4096])
def test_entropies_do_not_depend_on_how_many_codes_are_held_at_a_time(block, monkeypatch):
    monkeypatch.setattr(scalar, "_BLOCK", block)
    x = 0.3 * normal(0, 2, 3, 6)
    expected = entropies(x, 0.5, 2.0)
    for ours, theirs in zip(q.lfq_entropies(x, scale=0.5, inverse_temperature=2.0), expected, strict=True):
        assert_close(ours, theirs)
    gradient = jax.grad(lambda x: sum(map(jnp.sum, q.lfq_entropies(x, scale=0.5, inverse_temperature=2.0))))(x)
    by_numbers = numerical_gradient(lambda x: sum(map(np.sum, entropies(x, 0.5, 2.0))), x)
    assert_close(gradient, by_numbers, 1e-4)


def test_no_array_of_all_probabilities_exists():
    """64 vectors and 2**18 codes: 64 MiB of probabilities; the program with its gradient needs a small part of that."""
    step = jax.jit(jax.grad(lambda x: q.lfq_entropies(x)[1]))
    memory = step.lower(jax.ShapeDtypeStruct((64, 18), jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 2**20


def test_zero_is_below_and_codes_are_looked_up_again():
    quantizer = q.lfq(3, scale=0.5)
    out = quantizer.quantize((), (), jnp.asarray([[0.0, 2.0, -1.0], [-3.0, 1e-9, 1.0]], jnp.bfloat16))
    assert out.indices.tolist() == [0b010, 0b011] and out.codes.dtype == jnp.bfloat16
    x = normal(1, 100, 3)
    out = quantizer.quantize((), (), x)
    assert_close(quantizer.lookup((), (), out.indices), out.codes)
    assert_close(out.commitment_loss, ((x - out.codes) ** 2).sum(axis=-1))
    assert not np.asarray(out.codebook_loss).any()


def test_bad_arguments_are_named():
    for width in (0, 31):
        with pytest.raises(ValueError, match=f"width: got {width}"):
            q.lfq(width)
    with pytest.raises(ValueError, match="scale: got 0"):
        q.lfq(3, scale=0)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 2\); its last axis must be 3"):
        q.lfq(3).quantize((), (), jnp.zeros((4, 2)))
