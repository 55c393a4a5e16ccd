"""Codes placed on data and moved by k-means, codes behind a projection, and the search among codes made in passing."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, host_mesh, numerical_gradient
from jax.sharding import PartitionSpec as P

from jaxcl import quantize as q
from jaxcl.nearest import nearest_codes

KEY = jax.random.key(0)
K = 8
METRICS = ("euclidean", "cosine")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(vectors):
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def nearest(x, codebook):
    """Float64 brute force: [N] indices, the lowest of equals."""
    return ((np.float64(x)[:, None] - np.float64(codebook)) ** 2).sum(axis=-1).argmin(axis=-1)


# Placing

# All of vectors [..., 4].
QUANTIZERS = {
    "vq": lambda: q.vq(K, 4),
    "vq, cosine": lambda: q.vq(K, 4, metric="cosine"),
    "ema_vq": lambda: q.ema_vq(K, 4, initial_count=2.5),
    "residual": lambda: q.residual(q.vq(K, 4), 2),
    "grouped": lambda: q.grouped(q.ema_vq(K, 2, metric="cosine"), 2),
    "projected": lambda: q.projected(q.vq(K, 3, metric="cosine"), 4, 3),
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@cache
def make(name):
    """A quantizer, its params and state, and `place` compiled: (x, iterations) -> (params, state)."""
    quantizer = QUANTIZERS[name]()
    params, state = jax.device_get(jax.jit(quantizer.init)(KEY))

    @partial(jax.jit, static_argnums=1)
    def place(x, iterations):
        return quantizer.place(jax.random.key(1), params, state, x, iterations=iterations)

    return quantizer, params, state, lambda x, iterations=0: jax.device_get(place(x, iterations))


def codebooks(params, state):
    """Those of one of the quantizers, as a list of [K, D]."""
    held = state.codebook if isinstance(state, q.EMAState) else params
    held = held["quantizer"] if isinstance(held, dict) else held
    return list(held.reshape(-1, K, held.shape[-1]))


def placed_on(name, x, placed):
    """What each codebook was placed on: x [N, 4] scaled, projected, cut, or what the codes before it left."""
    if name == "vq, cosine":
        return [unit(x)]
    if name == "residual":
        first = codebooks(*placed)[0]
        return [x, x - first[nearest(x, first)]]
    if name == "grouped":
        return [unit(x[:, :2]), unit(x[:, 2:])]
    if name == "projected":
        down = make(name)[1]["down"]
        return [unit(x @ down["kernel"] + down["bias"])]
    return [x]


def sources(codes, vectors):
    """For each code, the row of vectors [N, D] that it is, or -1."""
    distances = np.abs(codes[:, None] - vectors).max(axis=-1)
    return np.where(distances.min(axis=-1) < 1e-5, distances.argmin(axis=-1), -1)


@every_quantizer
def test_codes_are_placed_on_distinct_vectors(name):
    """Of several axes, without those that are not finite."""
    x = normal(1, 5, 4, 4)
    x[1, 2, 3], x[4, 0], x[0, 1, 0] = np.nan, np.inf, -np.inf
    finite = np.isfinite(x).all(axis=-1)
    placed = make(name)[3](x)
    tables = codebooks(*placed)
    for stage, (codes, vectors) in enumerate(zip(tables, placed_on(name, x[finite], placed), strict=True)):
        found = sources(codes, vectors)
        assert (found >= 0).all()
        if name != "residual" or stage == 0:  # nothing is left of the vectors that became codes: those are alike
            assert len(set(found.tolist())) == K


@every_quantizer
def test_with_fewer_vectors_than_codes_the_others_stay(name):
    x = normal(2, 5, 4)
    _, params, state, place = make(name)
    placed = place(x)
    for codes, vectors, before in zip(
        codebooks(*placed), placed_on(name, x, placed), codebooks(params, state), strict=True
    ):
        stayed = (np.abs(codes - (unit(before) if name in ("vq, cosine", "projected") else before)) < 1e-6).all(axis=-1)
        assert stayed.sum() == K - 5
        assert (sources(codes[~stayed], vectors) >= 0).all()


def test_nothing_else_is_placed():
    """Averages begin anew, as after `init`; the projections are as they were."""
    _, _, _, place = make("ema_vq")
    _, state = place(normal(1, 20, 4))
    assert_close(state.counts, np.full(K, 2.5))
    assert_close(state.sums, 2.5 * state.codebook)
    _, params, _, place = make("projected")
    placed, _ = place(normal(1, 20, 4))
    for name in ("down", "up"):
        jax.tree.map(np.testing.assert_array_equal, placed[name], params[name])


def lloyd(x, codebook, iterations, metric):
    """k-means in float64; a cluster that is empty stays."""
    x, codebook = np.float64(x), np.float64(codebook)
    for _ in range(iterations):
        indices = nearest(x, codebook)
        means = [x[indices == code].mean(axis=0) if code in indices else codebook[code] for code in range(K)]
        codebook = unit(np.stack(means)) if metric == "cosine" else np.stack(means)
    return codebook


def distortion(x, codebook):
    return ((np.float64(x) - codebook[nearest(x, codebook)]) ** 2).sum()


def repeated():
    """40 vectors of which each 4 are alike, so that two codes can begin as one: the second of them is never chosen."""
    return np.repeat(normal(3, 10, 4), 4, axis=0)


@pytest.mark.parametrize("name", ["vq", "vq, cosine", "ema_vq", "grouped", "projected"])
def test_k_means_equals_plain_numpy(name):
    """From the same start, with and without empty clusters and vectors that are not finite; never for the worse."""
    _, _, _, place = make(name)
    metric = "euclidean" if name in ("vq", "ema_vq") else "cosine"
    x = np.concatenate([normal(4, 40, 4), repeated()])
    dirty = np.concatenate([x, np.full((1, 4), np.nan), np.full((1, 4), np.inf)]).astype(np.float32)
    start = codebooks(*place(dirty))
    before = [distortion(*pair) for pair in zip(placed_on(name, x, place(dirty)), start, strict=True)]
    for iterations in (1, 4):
        placed = place(dirty, iterations)
        for group, (own, vectors) in enumerate(zip(codebooks(*placed), placed_on(name, x, placed), strict=True)):
            assert_close(own, lloyd(vectors, start[group], iterations, metric))
            after = distortion(vectors, own)
            assert after <= before[group] + 1e-4
            before[group] = after


@pytest.mark.parametrize("name", ["vq", "vq, cosine"])
def test_empty_clusters_stay(name):
    """Ten vectors, four times each, and eight codes: some begin alike (by NumPy), and all but the first stay there."""
    _, _, _, place = make(name)
    x = repeated()
    start = codebooks(*place(x))[0]
    vectors = placed_on(name, x, (start, ()))[0]
    empty = np.bincount(nearest(vectors, start), minlength=K) == 0
    assert 0 < empty.sum() < K
    moved = codebooks(*place(x, 3))[0]
    assert_close(moved, lloyd(vectors, start, 3, "cosine" if "cosine" in name else "euclidean"))
    assert_close(moved[empty], start[empty])


def test_k_means_of_what_is_left():
    """After many iterations each code, of either of two in a row, is the mean of the vectors that choose it (NumPy)."""
    _, _, _, place = make("residual")
    x = normal(5, 40, 4)
    placed = place(x, 25)
    for codes, vectors in zip(codebooks(*placed), placed_on("residual", x, placed), strict=True):
        indices = nearest(vectors, codes)
        for code in set(indices.tolist()):
            assert_close(codes[code], vectors[indices == code].mean(axis=0))
        assert len(set(indices.tolist())) > K / 2


def test_outside_jit_and_in_half_precision():
    """The codes are float32 numbers all the same."""
    quantizer, params, state, place = make("vq")
    x = jnp.asarray(normal(6, 20, 4), jnp.bfloat16)
    placed, _ = quantizer.place(jax.random.key(1), params, state, x, iterations=2)
    assert placed.dtype == jnp.float32
    assert_close(placed, place(x, 2)[0])
    assert_close(placed, lloyd(np.asarray(x, np.float32), place(x)[0], 2, "euclidean"))


def test_keys_decide_which_vectors():
    """200 keys: each of 20 vectors is drawn in 8 of 20 times, 80 times give or take 5 standard deviations of 6.9."""
    x, params = normal(7, 20, 4), normal(8, K, 4)
    place = jax.vmap(lambda key, x: QUANTIZERS["vq"]().place(key, params, (), x)[0], in_axes=(0, None))
    placed = np.asarray(jax.jit(place)(jax.random.split(KEY, 200), x))
    counts = np.bincount(sources(placed.reshape(-1, 4), x), minlength=20)
    assert counts.sum() == 200 * K and (np.abs(counts - 80) < 5 * 6.9).all()


@pytest.mark.parametrize(
    "quantizer",
    [q.simvq(K, 4), q.simvq(K, 4, train_codebook=True), q.fsq([3, 4, 5, 2]), q.lfq(4), q.residual(q.simvq(K, 4), 2)],
)
def test_without_codes_of_its_own_nothing_is_placed(quantizer):
    params, state = jax.jit(quantizer.init)(KEY)
    placed = quantizer.place(KEY, params, state, jnp.asarray(normal(1, 20, 4)), iterations=2)
    jax.tree.map(np.testing.assert_array_equal, placed, (params, state))


def test_bad_arguments_of_place():
    for name in ("vq", "ema_vq", "residual"):
        quantizer, params, state, _ = make(name)
        with pytest.raises(ValueError, match="iterations: got -1; pass 0 or more"):
            quantizer.place(KEY, params, state, jnp.zeros((5, 4)), iterations=-1)
        with pytest.raises(ValueError, match=r"x: got shape \(5, 3\); its last axis must be 4"):
            quantizer.place(KEY, params, state, jnp.zeros((5, 3)))


# Behind a projection


@cache
def behind_projection(metric):
    """A quantizer of vectors [..., 5] whose codes have 3 entries; its params, by NumPy."""
    layers = {
        "down": {"kernel": normal(10, 5, 3), "bias": normal(11, 3)},
        "up": {"kernel": normal(12, 3, 5), "bias": normal(13, 5)},
    }
    return q.projected(q.vq(K, 3, metric=metric), 5, 3), layers | {"quantizer": normal(14, K, 3)}


def compared(vectors, metric):
    return unit(vectors) if metric == "cosine" else vectors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projected_equals_plain_numpy(metric, dtype):
    """Down, the nearest code, up; in bfloat16 to its precision."""
    quantizer, params = behind_projection(metric)
    x = jnp.asarray(normal(15, 3, 2, 5), dtype)
    out = jax.jit(quantizer.quantize)(params, (), x)
    low = compared(np.float64(x).reshape(6, 5) @ params["down"]["kernel"] + params["down"]["bias"], metric)
    table = compared(np.float64(params["quantizer"]), metric)
    indices = nearest(low, table)
    codes, tolerance = (
        table[indices] @ params["up"]["kernel"] + params["up"]["bias"],
        1e-5 if dtype == "float32" else 0.03,
    )
    np.testing.assert_array_equal(out.indices, indices.reshape(3, 2))
    assert out.codes.dtype == x.dtype and out.commitment_loss.dtype == out.codebook_loss.dtype == jnp.float32
    assert_close(out.codes, codes.reshape(3, 2, 5), tolerance)
    for loss in (out.commitment_loss, out.codebook_loss):
        assert_close(loss, ((low - table[indices]) ** 2).sum(axis=-1).reshape(3, 2), tolerance)
    assert_close(quantizer.lookup(params, (), out.indices), codes.reshape(3, 2, 5))


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_pass_the_projections(metric):
    """By numbers, of what straight-through gradients stand for: what is stopped is held at its value."""
    quantizer, params = behind_projection(metric)
    x, weights, factors = normal(16, 6, 5), normal(17, 6, 5), normal(18, 2, 6)

    def total(params, x):
        out = quantizer.quantize(params, (), x)
        losses = factors[0] * out.commitment_loss + factors[1] * out.codebook_loss
        return (weights * out.codes).sum() + losses.sum()

    grads, grad_x = jax.device_get(jax.jit(jax.grad(total, argnums=(0, 1)))(params, x))

    def low(params, x):
        return compared(np.float64(x) @ params["down"]["kernel"] + params["down"]["bias"], metric)

    held = low(params, x)
    indices = nearest(held, compared(params["quantizer"], metric))
    chosen = compared(np.float64(params["quantizer"]), metric)[indices]

    def stands_for(params, x):
        moved = low(params, x)
        codes = (chosen + moved - held) @ params["up"]["kernel"] + params["up"]["bias"]
        commitment = ((moved - chosen) ** 2).sum(axis=-1)
        codebook = ((held - compared(params["quantizer"], metric)[indices]) ** 2).sum(axis=-1)
        return (weights * codes).sum() + (factors[0] * commitment + factors[1] * codebook).sum()

    assert_close(grad_x, numerical_gradient(lambda x: stands_for(params, x), x), 1e-4)
    leaves, structure = jax.tree.flatten(params)
    for number, grad in enumerate(jax.tree.leaves(grads)):

        def at(leaf, number=number):
            return stands_for(jax.tree.unflatten(structure, [*leaves[:number], leaf, *leaves[number + 1 :]]), x)

        assert_close(grad, numerical_gradient(at, leaves[number]), 1e-4)
        assert np.abs(grad).max() > 1e-2


def test_how_projections_begin():
    """Uniform in one over the root of the inputs: its standard deviation is that over the root of 3."""
    params, state = jax.jit(q.projected(q.ema_vq(K, 16), 64, 16).init)(KEY)
    assert params["quantizer"] == () and state.codebook.shape == (K, 16)
    for name, inputs, outputs in (("down", 64, 16), ("up", 16, 64)):
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        assert kernel.shape == (inputs, outputs) and bias.shape == (outputs,)
        assert max(np.abs(kernel).max(), np.abs(bias).max()) <= inputs**-0.5
        assert kernel.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)
        assert bias.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.4)
        assert abs(kernel.mean()) < 5 * kernel.std() / 32  # of 1,024 numbers


def test_averages_behind_a_projection():
    """The state is that of the single one, of the projected vectors (NumPy in float64)."""
    (_, params), quantizer = behind_projection("euclidean"), q.projected(q.ema_vq(K, 3, decay=0.7), 5, 3)
    params = params | {"quantizer": ()}
    codebook, x = normal(14, K, 3), normal(15, 3, 2, 5)
    state = q.initial_averages(jnp.asarray(codebook), 1.0)
    out = jax.jit(quantizer.quantize)(params, state, x)
    low = np.float64(x).reshape(6, 5) @ params["down"]["kernel"] + params["down"]["bias"]
    indices = nearest(low, codebook)
    np.testing.assert_array_equal(out.indices, indices.reshape(3, 2))
    after = jax.jit(quantizer.update)(KEY, params, state, x, out.indices)
    sums = np.zeros((K, 3))
    np.add.at(sums, indices, low)
    counts, sums = 0.7 + 0.3 * np.bincount(indices, minlength=K), 0.7 * codebook + 0.3 * sums
    smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
    for found, expected in zip(after, (sums / smoothed[:, None], counts, sums), strict=True):
        assert_close(found, expected)


def test_projected_gives_scalar_quantizers_any_width():
    """And no vectors at all are no trouble."""
    for single in (q.fsq([5, 4, 3]), q.lfq(3), q.residual(q.lfq(3), 2)):
        quantizer = q.projected(single, 5, 3)
        params = behind_projection("euclidean")[1] | {"quantizer": ()}
        x = normal(19, 4, 5)
        out = quantizer.quantize(params, (), x)
        low = single.quantize((), (), x @ params["down"]["kernel"] + params["down"]["bias"])
        np.testing.assert_array_equal(out.indices, low.indices)
        assert_close(out.codes, np.asarray(low.codes) @ params["up"]["kernel"] + params["up"]["bias"])
        assert_close(quantizer.lookup(params, (), out.indices), out.codes)
        assert quantizer.quantize(params, (), x[:0]).codes.shape == (0, 5)


def test_bad_arguments_of_projected():
    for widths, message in (((0, 3), "width: got 0"), ((5, 0), "code_width: got 0")):
        with pytest.raises(ValueError, match=f"^{message}; pass 1 or more"):
            q.projected(q.lfq(3), *widths)
    quantizer, params = behind_projection("euclidean")
    with pytest.raises(
        ValueError, match=r"x: got shape \(2, 4\); its last axis must be 5, the width of the projection"
    ):
        quantizer.quantize(params, (), jnp.zeros((2, 4)))


# The search among codes that are made a block at a time

ROWS, KERNEL, OFFSET = normal(20, 16, 3), normal(21, 3, 4), normal(22, 4)


def transform(rows):
    """[..., 4] from [..., 3]; not linear, and not zero at zero."""
    return jnp.tanh(jnp.matmul(rows, KERNEL, precision=jax.lax.Precision.HIGHEST)) + OFFSET


def brute(x, codes, metric, eligible=True):
    x, codes = (compared(np.float64(vectors), metric) for vectors in (x, codes))
    return np.where(eligible, ((x[:, None] - codes) ** 2).sum(axis=-1), np.inf).argmin(axis=-1)


def made(rows):
    return np.tanh(np.float64(rows) @ KERNEL) + OFFSET


# Padding is of rows that are zero: a vector on what they become must not find them.
X = np.concatenate([normal(23, 19, 4), OFFSET[None]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block_size", [1, 3, 13, 64, None])
def test_search_among_transformed_codes(metric, block_size):
    """13 codes, in blocks that do and do not divide them; all may be chosen, or some."""
    rows, eligible = ROWS[:13], np.arange(13) % 3 != 1
    search = partial(nearest_codes, metric=metric, block_size=block_size, transform=transform)
    index = jax.jit(lambda x, rows, eligible: (search(x, rows), search(x, rows, eligible=eligible)))(X, rows, eligible)
    np.testing.assert_array_equal(index[0], brute(X, made(rows), metric))
    np.testing.assert_array_equal(index[1], brute(X, made(rows), metric, eligible))
    assert len(set(np.asarray(index[0]).tolist())) > 3


@pytest.mark.parametrize("metric", METRICS)
def test_search_among_transformed_codes_over_devices(metric):
    """Two codes on each of eight, the first of which may not be chosen."""
    search = partial(nearest_codes, metric=metric, transform=transform, axis_name="devices")
    mapped = jax.shard_map(
        lambda x, rows, eligible: search(x, rows, eligible=eligible),
        mesh=host_mesh(), in_specs=(P(), P("devices"), P("devices")), out_specs=P(),
    )  # fmt: skip
    eligible = np.arange(16) % 2 == 1
    np.testing.assert_array_equal(jax.jit(mapped)(X, ROWS, eligible), brute(X, made(ROWS), metric, eligible))


def test_half_precision_and_codes_that_are_not_finite():
    """A row that becomes infinite is never chosen, in bfloat16 as in float32."""
    rows = ROWS.copy()
    rows[brute(X, made(ROWS), "euclidean")[0]] = np.inf  # tanh hides it, the reciprocal does not
    finite = np.isfinite(rows).all(axis=-1)
    for dtype in ("float32", "bfloat16"):
        x = jnp.asarray(X, dtype)
        index = nearest_codes(
            x, jnp.asarray(rows), block_size=5, transform=lambda rows: transform(rows) + 0 * rows[:, :1]
        )
        np.testing.assert_array_equal(index, brute(np.float32(x), made(ROWS), "euclidean", finite))


def test_no_gradient_through_what_makes_codes():
    def total(kernel, rows, x):
        index = nearest_codes(x, rows, transform=lambda rows: rows @ kernel)
        return x[:, 0].sum() + index.sum() + (kernel.sum() + rows.sum()) * 0

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(KERNEL, ROWS, X)
    assert not np.asarray(grads[0]).any() and not np.asarray(grads[1]).any()
    np.testing.assert_array_equal(grads[2], np.eye(4)[[0] * len(X)])


def test_codes_are_never_held_all_at_once():
    """65,536 codes of 64 entries are 16 MiB: the search among all of them is seen to hold these, in blocks a tenth."""
    size, width = 65_536, 64
    kernel = normal(24, 4, width)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, width), (size, 4))]

    def temporary(block_size):
        search = partial(nearest_codes, block_size=block_size, transform=lambda rows: jnp.sin(rows @ kernel))
        return jax.jit(search).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(size) >= size * width * 4
    assert temporary(512) < size * width * 4 / 10


def test_a_simvq_step_never_holds_all_codes():
    """Nor do its loss and gradient: 65,536 codes of 64 entries from rows of 4."""
    quantizer = q.simvq(65_536, 64, code_width=4, block_size=512)
    params, state = jax.eval_shape(quantizer.init, KEY)

    def loss(params, state, x):
        out = quantizer.quantize(params, state, x)
        return (out.commitment_loss + out.codebook_loss).mean() + out.codes.sum()

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(params, state, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 65_536 * 64 * 4 / 10


def test_a_transform_to_another_width_is_named():
    with pytest.raises(ValueError, match=r"x: got shape \(20, 4\); its last axis must be 3, the width of codebook"):
        nearest_codes(X, ROWS)
    with pytest.raises(ValueError, match=r"x: got shape \(20, 4\); its last axis must be 2, the width of codebook"):
        nearest_codes(X, ROWS, transform=lambda rows: rows[:, :2])
