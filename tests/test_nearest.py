"""Nearest-code search against a brute force of its own: NumPy, float64, a stable sort of all distances."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, host_mesh, numerical_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as P

from jaxcl import nearest
from jaxcl.nearest import nearest_codes, nearest_k_codes, normalise, squared_distances
from jaxcl.quantize import usage

pytestmark = pytest.mark.core

METRICS = ("euclidean", "cosine")
# Blocks of 11 codes: single ones, a ragged last one, all, more than there are, the default.
FORMS = [("euclidean", 1), ("euclidean", 4), ("euclidean", 11), ("euclidean", 64), ("euclidean", None), ("cosine", 4)]


def both(x, codebook, k=4, eligible=None, **options):
    """The index of the nearest code and those of the k nearest, from one program."""
    options = {"eligible": eligible, **options}
    return nearest_codes(x, codebook, **options), nearest_k_codes(x, codebook, k, **options)


find = compiled(both, static_argnames=("k", "metric", "block_size"))


def assert_found(found, expected):
    """Asserts that what `find` returned is int32, `expected` [..., k] and its first column."""
    index, indices = found
    assert index.dtype == indices.dtype == jnp.int32
    np.testing.assert_array_equal(index, expected[..., 0])
    np.testing.assert_array_equal(indices, expected)


def unit(vectors):
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def distances(x, codebook, metric="euclidean", eligible=None):
    """Float64 `|x - c|^2`, or 1 less the cosine, [..., K]; infinite for codes that may not be chosen."""
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    allowed = np.isfinite(codebook).all(axis=-1) & (True if eligible is None else np.asarray(eligible))
    codebook = np.where(allowed[:, None], codebook, 0)
    if metric == "cosine":
        return np.where(allowed, 1 - unit(x) @ unit(codebook).T, np.inf)
    return np.where(allowed, ((x[..., None, :] - codebook) ** 2).sum(axis=-1), np.inf)


def brute_k(x, codebook, k, metric="euclidean", eligible=None):
    """The k nearest, [..., k]: equals, and so those that may not be chosen, by index."""
    return np.argsort(distances(x, codebook, metric, eligible), axis=-1, kind="stable")[..., :k]


def brute(x, codebook, metric="euclidean", eligible=None):
    return brute_k(x, codebook, 1, metric, eligible)[..., 0]


def smallest_gap(x, codebook, metric):
    """How far the nearest decision of a search is from flipping."""
    return np.diff(np.sort(distances(x, codebook, metric), axis=-1), axis=-1).min()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(seed, *shape, low=-3, high=4):
    """Whole numbers so small that every float32 and bfloat16 operation of a search on them is exact."""
    return np.random.default_rng(seed).integers(low, high, size=shape).astype(np.float32)


# Against brute force


@pytest.fixture(scope="module")
def vectors():
    """x [2, 3, 2, 5] and 11 codes, none of the distances between them alike to float32's precision."""
    x, codebook = normal(0, 2, 3, 2, 5), normal(1, 11, 5)
    assert min(smallest_gap(x, codebook, metric) for metric in METRICS) > 1e-4
    return x, codebook


@pytest.mark.parametrize(("metric", "block_size"), FORMS)
def test_search_in_blocks_equals_brute_force(vectors, metric, block_size):
    x, codebook = vectors
    assert_found(find(x, codebook, metric=metric, block_size=block_size), brute_k(x, codebook, 4, metric))


def test_search_outside_jit_equals_brute_force(vectors):
    x, codebook = map(jnp.asarray, vectors)
    np.testing.assert_array_equal(nearest_codes(x, codebook), brute(*vectors))
    np.testing.assert_array_equal(nearest_k_codes(x, codebook, 4), brute_k(*vectors, 4))


def test_more_codes_than_a_block_holds(vectors):
    x, codebook = vectors
    assert_found(find(x, codebook, k=11, block_size=4), brute_k(x, codebook, 11))


@pytest.mark.parametrize("shape", [(5,), (0, 5)])
def test_any_leading_axes(vectors, shape):
    x, codebook = vectors[0].reshape(-1)[: int(np.prod(shape))].reshape(shape), vectors[1]
    assert_found(find(x, codebook, k=2, block_size=4), brute_k(x, codebook, 2))


def test_a_single_code_is_the_nearest():
    assert_found(find(normal(2, 4, 3), normal(3, 1, 3), k=1, block_size=3), np.zeros((4, 1)))


def test_vmap_over_codebooks():
    x, codebooks = normal(4, 3, 6, 5), normal(5, 3, 7, 5)
    found = jax.jit(jax.vmap(partial(both, block_size=3)))(x, codebooks)
    assert_found(found, np.stack([brute_k(*pair, 4) for pair in zip(x, codebooks, strict=True)]))


def test_vmap_of_one_batch_over_codebooks():
    x, codebooks = normal(4, 6, 5), normal(5, 3, 7, 5)
    index = jax.jit(jax.vmap(nearest_codes, in_axes=(None, 0)))(x, codebooks)
    np.testing.assert_array_equal(index, [brute(x, codebook) for codebook in codebooks])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_whole_numbers_equal_brute_force(data):
    """Arithmetic is exact, so that ties are ties: every index must be that of the stable sort."""
    width, block_size = data.draw(st.sampled_from([(1, 2), (2, 2), (2, None)]))
    whole = st.integers(-2, 2).map(float)
    x, codebook = (data.draw(arrays(np.float32, (rows, width), elements=whole)) for rows in (3, 5))
    eligible = data.draw(arrays(bool, 5))
    found = find(x, codebook, k=2, eligible=eligible, block_size=block_size)
    assert_found(found, brute_k(x, codebook, 2, eligible=eligible))


# Dtypes


@pytest.mark.parametrize(
    ("metric", "dtypes"),
    [
        ("euclidean", ("float32", "bfloat16")),
        ("cosine", ("bfloat16", "bfloat16")),
    ],
)
def test_half_precision_inputs(metric, dtypes):
    """The expected indices are those of the rounded inputs, searched in float64."""
    x, codebook = jnp.asarray(normal(18, 6, 5), dtypes[0]), jnp.asarray(normal(17, 7, 5), dtypes[1])
    assert smallest_gap(x, codebook, metric) > 1e-4
    assert_found(find(x, codebook, metric=metric, block_size=4), brute_k(x, codebook, 4, metric))


def test_bfloat16_inputs_are_compared_in_float32():
    """257 is no bfloat16 number: products of 256 and 257 would be alike, and the first code the nearest."""
    x = jnp.asarray([[16, 1]], jnp.bfloat16)
    codebook = jnp.asarray([[16, 0], [16, 1]], jnp.bfloat16)
    products = np.asarray(x @ codebook.T)  # rounded to bfloat16
    assert products.tolist() == [[256, 256]]
    assert_found(find(x, codebook, k=2, block_size=1), np.asarray([[1, 0]]))
    # The compiler may keep more precision than it is asked for, so look at what it is asked for.
    program = str(jax.make_jaxpr(partial(both, k=2, block_size=1))(x, codebook))
    assert program.count("dot_general") == program.count("preferred_element_type=float32") > 0


# Ties


@pytest.mark.parametrize(("block_size", "dtype"), [(2, "float32"), (None, "bfloat16")])
def test_ties_go_to_the_lowest_index(block_size, dtype):
    """Duplicates in one block, in different blocks and in a ragged last one; zeros and midpoints among the vectors."""
    codebook = np.asarray([[2, 0], [0, 2], [2, 0], [-2, 0], [0, 2], [0, 2], [2, 0]], np.float32)
    x = np.asarray([[3, 0], [0, 3], [0, 0], [1, 1], [-1, 1], [-3, 0], [1, -1]], np.float32)
    x, codebook = jnp.asarray(x, dtype), jnp.asarray(codebook, dtype)
    index, indices = find(x, codebook, k=3, block_size=block_size)
    np.testing.assert_array_equal(index, [0, 1, 0, 0, 1, 3, 0])  # by hand
    np.testing.assert_array_equal(indices[:3], [[0, 2, 6], [1, 4, 5], [0, 1, 2]])  # by hand
    np.testing.assert_array_equal(indices, brute_k(x, codebook, 3))


def test_ties_of_both_signs_of_zero():
    """The vectors are as far from 0 as from -2 or 2, but the scores are zeros of either sign."""
    x, codebook = np.float32([[-1], [1], [0]]), np.float32([[0], [-2], [2], [-2], [2]])
    found = find(x, codebook, k=2, eligible=np.ones(5, bool), block_size=2)
    assert_found(found, np.asarray([[0, 1], [0, 2], [0, 1]]))


def test_cosine_ignores_lengths_and_ties_go_to_the_lowest_index():
    """Codes that are powers of two times each other have one direction, bit for bit; the cosine with zero is 0."""
    codebook = np.asarray([[4, 8], [-2, 2], [1, 2], [-1, 1], [2, 4], [0, 0]], np.float32)
    x = np.asarray([[1, 2], [-3, 3], [1, -1]], np.float32)
    expected = np.asarray([[0, 2, 4, 1], [1, 3, 0, 2], [5, 0, 2, 4]])  # by hand; the last: 0, three times -0.32, -1
    assert_found(find(x, codebook, metric="cosine", block_size=4), expected)


def test_zero_vectors(vectors):
    """The shortest code is nearest to zero; zero has no direction, its cosine with every code is 0: the first wins."""
    x, codebook = np.zeros_like(vectors[0]), vectors[1]
    by_length = np.linalg.norm(codebook.astype(np.float64), axis=-1).argsort(kind="stable")
    for metric, order in (("euclidean", by_length), ("cosine", np.arange(11))):
        found = find(x, codebook, metric=metric, block_size=4)
        assert_found(found, np.broadcast_to(order[:4], (2, 3, 2, 4)))


# Which codes may be chosen


@pytest.mark.parametrize(("metric", "block_size"), [("euclidean", 4), ("euclidean", None)])
def test_only_eligible_codes_are_chosen(vectors, metric, block_size):
    x, codebook = vectors
    eligible = np.isin(np.arange(11), [1, 5, 6, 10])
    found = find(x, codebook, eligible=eligible, metric=metric, block_size=block_size)
    assert_found(found, brute_k(x, codebook, 4, metric, eligible))


@pytest.mark.parametrize("block_size", [4, None])
def test_fewer_eligible_codes_than_asked_for(vectors, block_size):
    """The eligible ones first, then the others by index, none of them twice."""
    x, codebook = vectors
    eligible = np.isin(np.arange(11), [2, 9])
    indices = np.asarray(find(x, codebook, eligible=eligible, metric="euclidean", block_size=block_size)[1])
    assert (np.sort(indices[..., :2]) == [2, 9]).all()
    assert (indices[..., 2:] == [0, 1]).all()


@pytest.mark.parametrize("block_size", [4, None])
def test_no_eligible_code(vectors, block_size):
    x, codebook = vectors
    found = find(x, codebook, eligible=np.zeros(11, bool), metric="euclidean", block_size=block_size)
    assert_found(found, np.broadcast_to(np.arange(4), (2, 3, 2, 4)))


# NaN and infinity


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("block_size", [1, 4, None])
def test_a_vector_with_nan_gets_index_zero_and_leaves_the_others_alone(vectors, block_size, sign):
    """NaN of either sign bit: x86 makes negative ones of inf - inf."""
    x, codebook = vectors[0].copy(), vectors[1]
    x[0, 1, 1, 2] = x[1, 2, 0] = np.copysign(np.float32(np.nan), sign)
    broken = np.isnan(x).any(axis=-1)
    expected = brute_k(vectors[0], codebook, 4)
    index, indices = map(np.asarray, find(x, codebook, metric="euclidean", block_size=block_size))
    np.testing.assert_array_equal(index, np.where(broken, 0, expected[..., 0]))
    np.testing.assert_array_equal(indices[~broken], expected[~broken])
    assert (indices[broken, 0] == 0).all()
    assert all(len(set(row)) == 4 and set(row) <= set(range(11)) for row in indices[broken].tolist())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_are_not_finite_are_never_chosen(vectors, metric, bad):
    """Two of them, in two blocks; a vector equal to the finite part of one is no exception."""
    x, codebook = vectors[0].copy(), vectors[1].copy()
    x[0, 0, 0] = codebook[1]
    codebook[1, 4] = codebook[6] = bad
    for block_size in (4, None):
        found = find(x, codebook, metric=metric, block_size=block_size)
        assert_found(found, brute_k(x, codebook, 4, metric))
        assert not np.isin(found[1], [1, 6]).any()


@pytest.mark.parametrize("block_size", [2, None])
def test_no_finite_code(block_size):
    codebook = np.full((5, 2), np.nan, np.float32)
    found = find(normal(7, 3, 2), codebook, k=2, eligible=np.ones(5, bool), block_size=block_size)
    assert_found(found, np.tile(np.arange(2), (3, 1)))


def test_an_infinite_vector_gets_the_same_index_in_any_blocks():
    """It is as far from every code, so by the rule of ties the index is 0; the other vectors are found as ever."""
    x, codebook = np.float32([[np.inf, 1], [1, -np.inf], [2, 2]]), np.float32([[0, 1], [1, 0], [2, 1], [3, -1], [2, 2]])
    found = [find(x, codebook, k=2, eligible=np.ones(5, bool), block_size=size)[0].tolist() for size in (2, None)]
    assert found == [[0, 0, 4]] * 2


# Gradients


@pytest.mark.parametrize("metric", METRICS)
def test_no_gradient_through_the_search(vectors, metric):
    """The looked up rows' gradient is the count of vectors that chose them (NumPy); that of x is exactly zero."""
    x, codebook = vectors[0].reshape(-1, 5), vectors[1]

    def total(x, codebook):
        return codebook[nearest_codes(x, codebook, metric=metric)].sum()

    to_x, to_codebook = jax.jit(jax.grad(total, argnums=(0, 1)))(x, codebook)
    counts = np.bincount(brute(x, codebook, metric), minlength=11)
    assert (np.asarray(to_x) == 0).all()
    np.testing.assert_array_equal(to_codebook, np.repeat(counts[:, None], 5, axis=1))


def test_no_gradient_through_the_search_for_several(vectors):
    x, codebook = vectors[0].reshape(-1, 5), jnp.asarray(vectors[1])
    to_x = jax.jit(jax.grad(lambda x: codebook[nearest_k_codes(x, codebook, 2)].sum() + x.sum()))(x)
    assert (np.asarray(to_x) == 1).all()


# Distances and lengths


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_squared_distances(dtype):
    """NumPy in float64 on the rounded inputs, every vector with every code by broadcasting."""
    x, codes = jnp.asarray(normal(8, 3, 1, 4), dtype), jnp.asarray(normal(9, 5, 4), dtype)
    expected = ((np.asarray(x, np.float64) - np.asarray(codes, np.float64)) ** 2).sum(axis=-1)
    actual = jax.jit(squared_distances)(x, codes)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected)


def test_squared_distances_gradient():
    """By hand: `2 (x - c)` and its negative."""
    x, codes = normal(8, 3, 4), normal(9, 3, 4)
    gradient = jax.jit(jax.grad(lambda x, codes: squared_distances(x, codes).sum(), argnums=(0, 1)))
    to_x, to_codes = gradient(x, codes)
    assert_close(to_x, 2 * (x - codes))
    assert_close(to_codes, 2 * (codes - x))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_normalise(dtype, tolerance):
    """NumPy in float64; the tolerance is half a unit in the last place of numbers near 1, a little more in float32."""
    x = jnp.asarray(normal(10, 2, 3, 4), dtype)
    actual = jax.jit(normalise)(x)
    assert actual.dtype == x.dtype
    assert_close(actual, unit(np.asarray(x, np.float64)), tolerance)


def test_normalise_divides_short_vectors_by_epsilon():
    """By hand: lengths 0 and 5e-7 are divided by 1e-6, or by the epsilon given; length 5 by itself."""
    x = np.asarray([[0, 0], [3e-7, 4e-7], [3, 4]], np.float32)
    assert_close(normalise(x), [[0, 0], [0.3, 0.4], [0.6, 0.8]], 1e-6)
    assert_close(normalise(x, epsilon=10.0), [[0, 0], [3e-8, 4e-8], [0.3, 0.4]], 1e-6)


def test_normalise_gradient():
    """Central differences in NumPy; at zero, where a vector is only divided by epsilon, 1 / epsilon by hand."""
    x, weights = normal(11, 3, 4), normal(12, 3, 4)
    expected = numerical_gradient(lambda x: (weights * unit(x)).sum(), x)
    gradient = jax.jit(jax.grad(lambda x, epsilon: (weights * normalise(x, epsilon)).sum()))
    assert_close(gradient(x, 1e-6), expected)
    assert_close(gradient(np.zeros((3, 4), np.float32), 0.5), weights / 0.5)


# Memory


def temporary_bytes(function, n, size, width):
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, width), (size, width)))
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_scores_of_all_codes_are_never_held():
    """128 MiB of scores of 512 vectors and 65,536 codes, which the plain product is seen to hold; at most an eighth."""
    n, size, width = 512, 65_536, 16
    scores = n * size * 4
    assert temporary_bytes(lambda x, c: jnp.argmax(x @ c.T - (c * c).sum(-1) / 2, axis=-1), n, size, width) >= scores
    assert temporary_bytes(nearest_codes, n, size, width) < scores / 8
    assert temporary_bytes(partial(nearest_k_codes, k=4), n, size, width) < scores / 8


# The codebook split over devices


def jit_vmap(function, **axes):
    return jax.jit(jax.vmap(function, **axes))


@pytest.fixture(scope="module")
def split():
    """Whole numbers with many ties: 40 vectors, 16 codes of which each occurs on several of 8 devices."""
    x, codebook = integers(13, 40, 2, low=-2, high=3), integers(14, 16, 2, low=-1, high=2)
    codebook[15] = codebook[0]
    sorted_distances = np.sort(distances(x, codebook), axis=-1)
    assert (sorted_distances[:, 0] == sorted_distances[:, 1]).mean() > 0.5
    return x, codebook


@pytest.mark.parametrize(("block_size", "out_specs"), [(1, P("devices")), (None, P())])
def test_shard_map_over_codes(split, block_size, out_specs):
    """One device's answer: on each of the eight, and known to be the same on all."""
    x, codebook = split

    def search(x, codebook):
        return nearest_codes(x, codebook, block_size=block_size, axis_name="devices")[None]

    specs = {"in_specs": (P(), P("devices")), "out_specs": out_specs}
    index = jax.jit(jax.shard_map(search, mesh=host_mesh(), **specs))(x, codebook)
    np.testing.assert_array_equal(index, np.tile(brute(x, codebook), (len(index), 1)))
    assert len(index) == (1 if out_specs == P() else 8)


@pytest.mark.parametrize("search", [nearest_codes, partial(nearest_k_codes, k=3)])
def test_shard_map_over_vectors(split, search):
    """Each device searches the whole codebook for its own vectors."""
    x, codebook = split
    specs = {"in_specs": (P("devices"), P()), "out_specs": P("devices")}
    index = jax.jit(jax.shard_map(search, mesh=host_mesh(), **specs))(x, codebook)
    expected = brute_k(x, codebook, 3)
    np.testing.assert_array_equal(index, expected[:, 0] if index.ndim == 1 else expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("transform", [jax.pmap, jit_vmap])
def test_named_axis_over_codes(split, vectors, transform, metric):
    x, codebook = split if metric == "euclidean" else (vectors[0].reshape(-1, 5), normal(15, 16, 5))
    search = partial(nearest_codes, axis_name="devices", metric=metric)
    index = transform(search, axis_name="devices", in_axes=(None, 0))(x, codebook.reshape(8, 2, -1))
    np.testing.assert_array_equal(index, np.tile(brute(x, codebook, metric), (8, 1)))


def test_eligible_codes_over_devices(split):
    """Each device has its share of the mask; with no eligible code on any of them the index is 0."""
    x, codebook = split

    def search(x, codebook, eligible):
        return nearest_codes(x, codebook, eligible=eligible, axis_name="devices")

    mapped = jit_vmap(search, axis_name="devices", in_axes=(None, 0, 0))
    for chosen in ([15], [6, 9], []):
        eligible = np.isin(np.arange(16), chosen)
        index = mapped(x, codebook.reshape(8, 2, 2), eligible.reshape(8, 2))
        np.testing.assert_array_equal(index, np.tile(brute(x, codebook, eligible=eligible), (8, 1)))


def test_a_vector_with_nan_over_devices(split):
    x, codebook = split[0].copy(), split[1]
    expected = brute(x, codebook)
    x[5], expected[5] = np.nan, 0
    search = partial(nearest_codes, axis_name="devices")
    index = jit_vmap(search, axis_name="devices", in_axes=(None, 0))(x, codebook.reshape(8, 2, 2))
    np.testing.assert_array_equal(index, np.tile(expected, (8, 1)))


@pytest.mark.parametrize("shards", [1, 8])
def test_backends_that_take_all_codes_as_one_block(split, monkeypatch, shards):
    """As where no size of block is set (TPU): ties, ineligible codes and a vector with NaN end as they do in blocks."""
    monkeypatch.setattr(nearest, "_cpu_block", lambda vectors: None)
    x, codebook, eligible = split[0].copy(), split[1], np.arange(16) != 4
    expected = brute(x, codebook, eligible=eligible)
    x[5], expected[5] = np.nan, 0

    def search(x, codebook, eligible):
        return nearest_codes(x, codebook, eligible=eligible, axis_name="devices")

    mapped = jit_vmap(search, axis_name="devices", in_axes=(None, 0, 0))
    index = mapped(x, codebook.reshape(shards, -1, 2), eligible.reshape(shards, -1))
    np.testing.assert_array_equal(index, np.tile(expected, (shards, 1)))


# Bad arguments


@pytest.mark.parametrize("search", [nearest_codes, partial(nearest_k_codes, k=1)])
@pytest.mark.parametrize(
    ("x", "codebook", "options", "message"),
    [
        ((3, 4), (4,), {}, r"codebook: got shape \(4,\); .*2 axes"),
        ((3, 4), (2, 5, 4), {}, r"codebook: got shape \(2, 5, 4\); .*2 axes"),
        ((), (5, 4), {}, r"x: got shape \(\); .*last axis must be 4.*codebook"),
        ((2, 3), (5, 4), {}, r"x: got shape \(2, 3\); .*last axis must be 4.*codebook"),
        ((3, 4), (0, 4), {}, r"codebook.*: got 0; pass 1 or more"),
        ((3, 4), (5, 4), {"block_size": 0}, r"block_size: got 0; pass 1 or more"),
        ((3, 4), (5, 4), {"block_size": -2}, r"block_size: got -2; pass 1 or more"),
        ((3, 4), (5, 4), {"metric": "manhattan"}, r"metric: got 'manhattan'; choose one of 'euclidean', 'cosine'"),
        ((3, 4), (5, 4), {"eligible": np.ones(4, bool)}, r"eligible: got shape \(4,\); .*5"),
        ((3, 4), (5, 4), {"eligible": np.ones((5, 1), bool)}, r"eligible: got shape \(5, 1\); "),
    ],
)
def test_bad_arguments(search, x, codebook, options, message):
    with pytest.raises(ValueError, match=message):
        search(np.zeros(x, np.float32), np.ones(codebook, np.float32), **options)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_bad_k(k):
    with pytest.raises(ValueError, match=rf"k: got {k}; .*1 to 5"):
        nearest_k_codes(np.zeros((3, 4), np.float32), np.ones((5, 4), np.float32), k)


# A thousand cases


def whole_numbers(generator, cases, rows, width):
    """[cases, rows, width]: from -2 to 2, so that ties, duplicates and zeros abound and float32 makes no error."""
    return generator.integers(-2, 3, size=(cases, rows, width))


def whole_directions(generator, cases, rows, width):
    """[cases, rows, 4]: as many -1 and 1 as make lengths 0, 1 and 2, so that normalising makes no error either."""
    signs = generator.choice([-1, 1], size=(cases, rows, width))
    single = np.eye(4, dtype=int)[generator.integers(0, 4, size=(cases, rows))]
    kind = generator.choice([0, 1, 2], size=(cases, rows, 1), p=[0.1, 0.4, 0.5])
    return np.select([kind == 1, kind == 2], [signs * single, signs], 0)


@pytest.mark.parametrize(
    ("cases", "codes", "block_size", "metric", "dtype"),
    [
        (100, 1, None, "euclidean", "float32"),
        (150, 7, 3, "euclidean", "float32"),
        (100, 53, 24, "euclidean", "float32"),  # several blocks of several groups, a ragged last one
        (150, 16, None, "euclidean", "bfloat16"),
        (150, 17, 5, "euclidean", "bfloat16"),
        (200, 13, 4, "cosine", "float32"),
        (150, 9, 9, "cosine", "bfloat16"),
    ],
)
def test_search_is_exact(cases, codes, block_size, metric, dtype):
    """By brute force in float64, where, as in the search, every number is exact: ties are ties. Counts by bincount."""
    generator, width = np.random.default_rng(codes), 4 if metric == "cosine" else 3
    draw = whole_numbers if metric == "euclidean" else whole_directions
    x, codebooks = (draw(generator, cases, rows, width).astype(np.float32) for rows in (6, codes))

    def search(x, codebook):
        index = nearest_codes(x, codebook, metric=metric, block_size=block_size)
        return index, usage(index, codes)

    found, counts = jit_vmap(search)(jnp.asarray(x, dtype), jnp.asarray(codebooks, dtype))
    every = [distances(*case, metric) for case in zip(x, codebooks, strict=True)]
    expected = [each.argmin(axis=-1) for each in every]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(counts, [np.bincount(index, minlength=codes) for index in expected])
    if codes > 1:
        least = np.sort(every, axis=-1)
        assert (least[..., 0] == least[..., 1]).mean() > 0.1  # ties
        assert (x == 0).all(axis=-1).any() and (codebooks == 0).all(axis=-1).any()
