"""Codebooks split over one axis of a mesh and batches over the other: all as on one device with the whole of both."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcl import quantize as q

KEY = jax.random.key(0)
K = 16  # and no other axis is so long: by this, axes of codes are told
DRAWN = 100.0  # the count of a code that was replaced, and no other


def averaged(axis, **options):
    """So much smoothing that the count of all codes tells."""
    return q.ema_vq(K, 6, epsilon=0.5, dead_threshold=1.1, reset_count=DRAWN, codebook_axis=axis, **options)


# All of vectors [..., 6]; given the axis that codebooks are split over, or None.
QUANTIZERS = {
    "vq": lambda axis: q.vq(K, 6, codebook_axis=axis),
    "vq, cosine": lambda axis: q.vq(K, 6, metric="cosine", gradient="rotation", codebook_axis=axis),
    "simvq": lambda axis: q.simvq(K, 6, hidden=5, block_size=3, codebook_axis=axis),
    "simvq, trained codebook": lambda axis: q.simvq(K, 6, code_width=4, train_codebook=True, codebook_axis=axis),
    "ema_vq": averaged,
    "residual vq": lambda axis: q.residual(q.vq(K, 6, codebook_axis=axis), 2),
    "residual ema_vq": lambda axis: q.residual(averaged(axis, metric="cosine"), 2),
    "grouped simvq": lambda axis: q.grouped(q.simvq(K, 3, codebook_axis=axis), 2),
    "projected vq": lambda axis: q.projected(q.vq(K, 3, codebook_axis=axis), 6, 3),
}
AVERAGED = ("ema_vq", "residual ema_vq")
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@cache
def mesh():
    return jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "codes"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, WEIGHTS, MASK = normal(1, 4, 12, 6), normal(2, 4, 12, 8), np.arange(48).reshape(4, 12) % 6 != 3
X[1, 2], X[3, 0, 4] = np.nan, np.inf


@cache
def drawn(name):
    """Params and state, by NumPy; codes as long as vectors, so that many are chosen."""
    generator = np.random.default_rng(3)

    def draw(leaf):
        scale = 1 if K in leaf.shape else leaf.shape[0] ** -0.5
        return (scale * generator.normal(size=leaf.shape)).astype(np.float32)

    params, state = jax.tree.map(draw, jax.eval_shape(QUANTIZERS[name](None).init, KEY))
    if name in AVERAGED:
        state = q.EMAState(state.codebook, np.ones_like(state.counts), state.codebook)
    return params, state


def split_codes(tree):
    """The specs of params or state: axes of length K over "codes", all else whole."""
    return jax.tree.map(lambda leaf: P(*["codes" if size == K else None for size in leaf.shape]), tree)


class Step(NamedTuple):
    """What a training step makes of vectors, and the codes placed on them."""

    loss: jax.Array
    out: q.Quantized
    lookup: jax.Array
    grad_params: object
    grad_x: jax.Array
    state: object
    placed: object


def step(quantizer, params, state, x, mask, weights, axis_name=None):
    """As a user writes it, for one device or, with the name of the batch's axis, for each of several."""

    def loss(params, x):
        out = quantizer.quantize(params, state, x, mask)
        losses = weights[..., 0] * out.commitment_loss + weights[..., 1] * out.codebook_loss
        total, count = (losses + (weights[..., 2:] * out.codes).sum(axis=-1)).sum(), mask.sum()
        if axis_name is not None:
            total, count = lax.psum((total, count), axis_name)
        return total / count, out

    (value, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    after = quantizer.update(KEY, params, state, x, out.indices, axis_name=axis_name)
    placed = quantizer.place(KEY, params, state, x, iterations=2, axis_name=axis_name)
    return Step(value, out, quantizer.lookup(params, state, out.indices), *gradients, after, placed)


@cache
def on_one_device(name):
    run = jax.jit(partial(step, QUANTIZERS[name](None)))
    return jax.device_get(run(*drawn(name), X, MASK, WEIGHTS))


def specs(name):
    """Those of the step's results: nothing of vectors depends on where codes are, by what shard_map can tell."""
    params, state = map(split_codes, drawn(name))
    return Step(P(), P("data"), P("data"), params, P("data"), state, (params, state))


@cache
def on_eight_devices(name):
    placed = specs(name).placed
    mapped = jax.shard_map(
        partial(step, QUANTIZERS[name]("codes"), axis_name="data"),
        mesh=mesh(), in_specs=(*placed, P("data"), P("data"), P("data")), out_specs=specs(name),
    )  # fmt: skip
    return jax.jit(mapped)(*drawn(name), X, MASK, WEIGHTS)


def assert_same(found, expected):
    jax.tree.map(assert_close, found, expected)


@every_quantizer
def test_a_step_equals_one_device(name):
    """Choices, codes, losses, gradients, averages and replacements; NaN, infinity and a mask among the vectors."""
    found, expected = on_eight_devices(name), on_one_device(name)
    np.testing.assert_array_equal(found.out.indices, expected.out.indices)
    chosen = expected.out.indices[expected.out.indices != q.NO_CODE]
    assert 0 < chosen.size < expected.out.indices.size
    assert len(set((chosen // 4).tolist())) >= 3  # codes of several devices are chosen
    assert_same(found._replace(placed=()), expected._replace(placed=()))
    if name in AVERAGED:
        drawn_on = (expected.state.counts == DRAWN).reshape(-1, 4, 4).any(axis=-1)
        assert drawn_on.sum() >= 3 and not (expected.state.counts == DRAWN).all()
    for leaf in jax.tree.leaves((expected.grad_params, expected.grad_x)):
        assert np.abs(leaf).max() > 1e-3


@every_quantizer
def test_codes_and_their_gradients_stay_split(name):
    """A quarter on each of the four, whole on the two that share the batch."""
    found = on_eight_devices(name)
    for tree in (found.grad_params, found.state, found.placed):
        for leaf in jax.tree.leaves(tree):
            quarters = [4 if size == K else size for size in leaf.shape]
            assert {shard.data.shape for shard in leaf.addressable_shards} == {tuple(quarters)}


@every_quantizer
def test_codes_are_placed_as_on_one_device(name):
    found, expected = on_eight_devices(name).placed, on_one_device(name).placed
    assert_same(found, expected)
    if not name.startswith(("simvq", "grouped simvq")):
        before = jax.tree.leaves(drawn(name))
        assert any(np.abs(b - e).max() > 0.1 for b, e in zip(before, jax.tree.leaves(expected), strict=True))


def on_mesh(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize(("vectors", "share"), [(24, 0.7), (8, 1.0), (24, 0.0)])
def test_draws_equal_one_device(vectors, share):
    """Some codes dead, all of them (more than there are vectors), none."""
    x, generator = normal(4, vectors, 3), np.random.default_rng(5)
    dead, valid = generator.random(K) < share, generator.random(vectors) < 0.8
    expected_rows, expected = map(np.asarray, q.draw_replacements(KEY, x, dead, valid=valid))
    draw = on_mesh(
        lambda x, dead, valid: q.draw_replacements(
            KEY, x, dead, valid=valid, axis_name="data", codebook_axis="codes"
        ),
        (P("data"), P("codes"), P("data")), P("codes"),
    )  # fmt: skip
    rows, replaced = map(np.asarray, draw(x, dead, valid))
    np.testing.assert_array_equal(replaced, expected)
    assert replaced.sum() == min(dead.sum(), valid.sum())
    np.testing.assert_array_equal(rows[replaced], expected_rows[replaced])
    sources = (rows[replaced][:, None] == x).all(axis=-1)
    assert (sources.sum(axis=-1) == 1).all() and (sources.sum(axis=0) <= valid).all()


def test_draws_over_one_of_the_axes_equal_one_device():
    x, dead = normal(6, 24, 3), np.arange(K) % 3 != 1
    expected_rows, expected = map(np.asarray, q.draw_replacements(KEY, x, dead))
    for options, in_specs, out_specs in (
        ({"axis_name": "data"}, (P("data"), P()), P()),
        ({"codebook_axis": "codes"}, (P(), P("codes")), P("codes")),
        ({"axis_name": ("data", "codes")}, (P(("data", "codes")), P()), P()),
    ):
        draw = on_mesh(partial(q.draw_replacements, KEY, **options), in_specs, out_specs)
        rows, replaced = map(np.asarray, draw(x, dead))
        np.testing.assert_array_equal(replaced, expected)
        np.testing.assert_array_equal(rows[replaced], expected_rows[replaced])


def test_usage_counts_codes_of_all_devices():
    """Indices count codes over all devices, so counts are whole, added up over the batch's axis."""
    indices = on_one_device("vq").out.indices
    counts = on_mesh(partial(q.usage, codebook_size=K, axis_name="data"), P("data"), P())(indices)
    np.testing.assert_array_equal(counts, np.bincount(indices[indices >= 0], minlength=K))


def test_unsplit_codebooks_over_a_split_batch():
    """No codebook axis: the quantizers without a codebook, and one with it, whole on each device."""
    for quantizer in (q.fsq([5, 4, 3, 2, 3, 4]), q.lfq(6), q.residual(q.fsq([3] * 6), 2)):
        expected = quantizer.quantize((), (), X, MASK)
        found = on_mesh(partial(quantizer.quantize, (), ()), (P("data"), P("data")), P("data"))(X, MASK)
        np.testing.assert_array_equal(found.indices, expected.indices)
        assert_same(found, expected)
    expected = q.lfq_entropies(jnp.asarray(X), MASK, inverse_temperature=1.0)[0]
    entropies = partial(q.lfq_entropies, inverse_temperature=1.0)
    each = on_mesh(lambda x, mask: entropies(x, mask)[0], (P("data"), P("data")), P("data"))(X, MASK)
    assert_close(each, expected)
