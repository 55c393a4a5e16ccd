"""The key-value bottleneck's pure functions: keys, look-up, reading, counting, voting and the sparse optimizer.

Recorded values come from the authors' PyTorch code on small inputs: files goldens/dkvb_*.npz, whose `meta` holds the
sizes. Their axes are [batch, codebook, topk, position, ...], jaxcl's [batch, position, codebook, topk, ...]. Their
distances are negative squared ones.

In an evaluation that leaves unused pairs out, the authors give such a pair the smallest (negative) distance found
anywhere in the call; jaxcl never lets it win. In the recorded cases the two agree, for every codebook has at least
topk used pairs, none of them the farthest of the whole call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import both_ways, golden, host_mesh, plain, steps_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl import bottleneck as bn
from jaxcl import nearest, quantize, trees
from jaxcl.continual.compilations import count_compilations

TRAINED = ["dkvb_train_top1", "dkvb_train_top3", "dkvb_clip_active"]


def assert_close(actual, expected, tolerance=1e-5):
    """Each entry to `tolerance`, relative to the entry itself or to 1 where it is smaller."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def assert_same(actual, expected):
    """Trees equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@functools.cache
def chunked(name, **options):
    """A bottleneck of a file's sizes whose heads are the recorded ones, laid side by side in the feature."""
    _, meta = golden(name)
    codebooks, width = meta["num_codebooks"], meta["dim_keys"]
    sizes = {"codebooks": codebooks, "pairs": meta["num_pairs"], "key_width": width, "projection": "chunk"}
    return bn.discrete_key_value_bottleneck(codebooks * width, meta["dim_values"], **sizes, **options)


def features_of(heads):
    """[B, P, C * W] from recorded heads [B, C, P, W]."""
    return heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1)


def theirs(fetched):
    """[B, C, k, P, ...] from [B, P, C, k, ...]."""
    return np.moveaxis(np.asarray(fetched), 1, 3)


def fetched_keys(codebook, indices):
    """Keys [..., C, k, W] of codebooks [C, J, W] at indices [..., C, k], by NumPy."""
    return np.asarray(codebook)[np.arange(len(codebook))[:, None], np.asarray(indices)]


def frozen(keys, usage=None, projection=None):
    """A state before any data, with these keys [C, J, W]; NumPy throughout, so that nothing compiles."""
    keys = np.asarray(keys, np.float32)
    averages = quantize.EMAState(keys, np.zeros(keys.shape[:2], np.float32), np.zeros_like(keys))
    usage = np.zeros(keys.shape[:2], np.int32) if usage is None else usage.astype(np.int32)
    return bn.KeyState(projection, averages, np.ones_like(usage, bool), usage)


@functools.cache
def random_bottleneck(seed=0, **options):
    """A small one with random projections, its parameters and state, and features [12, 6] to look up.

    Made once for the same arguments, so that tests share its compiled functions.
    """
    sizes = {"codebooks": 3, "pairs": 7, "key_width": 4} | options
    made = bn.discrete_key_value_bottleneck(6, 5, **sizes)
    normal = np.random.default_rng(seed).standard_normal
    state = frozen(normal((3, sizes["pairs"], 4), np.float32), projection=normal((3, 6, 4), np.float32))
    params = {"values": jnp.asarray(normal((3, sizes["pairs"], 5), np.float32))}
    return made, params, state, normal((12, 6), np.float32)


def heads_by_numpy(state, features):
    """[C, N, W] in float64."""
    flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    return np.stack([flat @ np.asarray(matrix, np.float64) for matrix in state.projection])


def nearest_by_numpy(state, features, top_k, eligible=None):
    """Indices [..., C, top_k] of the nearest keys by sorting all float64 distances."""
    gaps = heads_by_numpy(state, features)[:, :, None] - np.asarray(state.keys.codebook, np.float64)[:, None]
    distances = (gaps**2).sum(axis=-1)
    if eligible is not None:
        distances = np.where(np.asarray(eligible)[:, None], distances, np.inf)
    order = np.argsort(distances, axis=-1, kind="stable")[..., :top_k]
    return order.swapaxes(0, 1).reshape(*features.shape[:-1], len(order), top_k)


# Goldens: key fitting


def check_retrieval(made, params, state, features, recorded, names, wrap, used_only=False):
    """Indices exactly, values, keys and negative squared distances, under their names in the file."""
    lookup = wrap(made.lookup, static_argnames="used_only")
    indices = lookup(params, state, features, used_only=used_only)
    np.testing.assert_array_equal(theirs(indices)[..., None], recorded[names["indices"]])
    assert_close(theirs(wrap(made.read)(params, indices)), recorded[names["values"]])
    codebook = state.keys.codebook
    keys = fetched_keys(codebook, indices)
    assert_close(theirs(keys), recorded[names["keys"]])
    heads = features.reshape(*features.shape[:-1], len(codebook), 1, -1)
    distances = wrap(nearest.squared_distances)(heads, jnp.asarray(keys))
    assert_close(theirs(-distances)[..., None], recorded[names["distances"]])
    return indices


def used_before(state, indices):
    """How often the pairs were fetched before, in the files' axes."""
    return theirs(fetched_keys(np.asarray(state.usage)[..., None], indices))


@pytest.mark.core
@both_ways
@pytest.mark.parametrize("name", ["dkvb_ema", "dkvb_ema_deadcode"])
def test_key_fitting_is_the_authors(name, wrap):
    """Three recorded steps (the first in plain calls), before any replacement and after it.

    Replaced keys are drawn at random: the recorded draw is put in place of jaxcl's.
    """
    recorded, meta = golden(name)
    heads = recorded["x"].shape[1] * recorded["x"].shape[3]
    share = meta["threshold_ema_dead_code"] * meta["num_pairs"] / heads
    made = chunked(name, decay=meta["decay"], dead_share=share, averages="authors")
    initial = (recorded[f"init_{field}"] for field in ("keys", "cluster_size", "keys_avg"))
    state = frozen(recorded["init_keys"])._replace(keys=quantize.EMAState(*initial))
    params = {"values": jnp.asarray(recorded["values"])}
    for step in steps_of(wrap):
        features = features_of(recorded["x"][step])
        names = {field: f"out_{field}_{step}" for field in ("values", "keys")}
        names |= {field: f"{field}_{step}" for field in ("indices", "distances")}
        check_retrieval(made, params, state, features, recorded, names, wrap)
        state = wrap(made.fit_keys)(jax.random.key(step), params, state, features)
        expired = recorded.get(f"expired_{step}", np.zeros(state.usage.shape)).astype(bool)
        assert_close(state.keys.counts, recorded[f"cluster_size_{step}"])
        assert_close(state.keys.sums, recorded[f"keys_avg_{step}"])
        codebook = np.asarray(state.keys.codebook)
        assert_close(codebook[~expired], recorded[f"keys_{step}"][~expired])
        if share:
            check_replaced(codebook, expired, recorded["x"][step])
            drawn = np.where(expired[..., None], recorded[f"replacement_candidates_{step}"], codebook)
            assert_close(drawn, recorded[f"keys_{step}"])
            state = state._replace(keys=state.keys._replace(codebook=drawn))


def check_replaced(codebook, expired, heads):
    """Expired keys are heads [B, C, P, W] of this batch, some at least, and no two the same."""
    assert expired.any()
    for codebook_number, dead in enumerate(expired):
        rows = np.asarray(codebook[codebook_number])[dead]
        batch = heads[:, codebook_number].reshape(-1, rows.shape[-1])
        assert all((batch == row).all(axis=1).any() for row in rows)
        assert len(np.unique(rows, axis=0)) == len(rows)


# Goldens: retrieval, counting, evaluation


@pytest.mark.core
@both_ways
@pytest.mark.parametrize("name", TRAINED)
def test_retrieval_and_counts_are_the_authors(name, wrap):
    """Three recorded batches with the recorded values: pairs, values, keys, distances and counts before and after."""
    recorded, meta = golden(name)
    made = chunked(name, top_k=meta["topk"])
    state, values = frozen(recorded["keys"]), recorded["init_values"]
    for step in steps_of(wrap):
        names = {field: f"retrieved_{field}_{step}" for field in ("values", "keys")}
        names |= {field: f"{field}_{step}" for field in ("indices", "distances")}
        features = features_of(recorded["x"][step])
        indices = check_retrieval(made, {"values": jnp.asarray(values)}, state, features, recorded, names, wrap)
        np.testing.assert_array_equal(used_before(state, indices), recorded[f"counts_{step}"])
        state = wrap(made.count_usage)(state, indices)
        np.testing.assert_array_equal(state.usage, recorded[f"counter_{step}"])
        values = recorded[f"values_{step}"]


@pytest.mark.core
@both_ways
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("used_only", [True, False])
def test_evaluation_is_the_authors(name, used_only, wrap):
    """Recorded after training, with unused pairs left out and with all of them; see this file's head on the floor."""
    recorded, meta = golden(name)
    made = chunked(name, top_k=meta["topk"])
    state = frozen(recorded["keys"], recorded["counter_2"])
    params = {"values": jnp.asarray(recorded["values_2"])}
    features = features_of(recorded["x_eval"])
    assert_close(1 - quantize.utilisation(state.usage).mean(), recorded["fraction_unused"])
    if used_only:
        names = {field: f"eval_{field}" for field in ("indices", "values", "keys", "distances")}
        indices = check_retrieval(made, params, state, features, recorded, names, wrap, used_only=True)
        np.testing.assert_array_equal(used_before(state, indices), recorded["eval_counts"])
        votes = wrap(bn.vote)(made.read(params, indices)).mean(axis=1)
        assert_close(votes, recorded["eval_logits"])
    else:
        indices = wrap(made.lookup)(params, state, features)
        np.testing.assert_array_equal(theirs(indices)[..., None], recorded["eval_indices_unmasked"])
        np.testing.assert_array_equal(used_before(state, indices), recorded["eval_counts_unmasked"])
        heads = features.reshape(*features.shape[:-1], meta["num_codebooks"], 1, -1)
        distances = nearest.squared_distances(heads, jnp.asarray(fetched_keys(recorded["keys"], indices)))
        assert_close(theirs(-distances)[..., None], recorded["eval_distances_unmasked"])


# Goldens: splitters


@pytest.mark.core
@both_ways
@pytest.mark.parametrize("projection", ["random", "chunk"])
def test_heads_are_the_authors(projection, wrap):
    """With one pair and no memory, a step of key fitting on one feature moves each key onto that feature's head.

    Jitted, all recorded features at once; in plain calls, the first.
    """
    recorded, meta = golden("dkvb_splitters")
    x = recorded["x" if projection == "random" else "x_chunk"]
    expected = recorded["out_random" if projection == "random" else "out_chunk"].swapaxes(1, 2)  # [B, P, C, W]
    made = bn.discrete_key_value_bottleneck(
        x.shape[-1], 1, codebooks=meta["num_codebooks"], pairs=1, key_width=meta["dim_keys"], projection=projection,
        decay=0.0, dead_share=0.0,
    )  # fmt: skip
    state = frozen(np.zeros((3, 1, 4)), projection=recorded["rand_proj"] if projection == "random" else None)

    def heads(feature):
        return made.fit_keys(jax.random.key(1), None, state, feature).keys.codebook[:, 0]

    if wrap is plain:
        assert_close(heads(jnp.asarray(x[0, 0])), expected[0, 0])
    else:
        assert_close(jax.jit(jax.vmap(jax.vmap(heads)))(jnp.asarray(x)), expected)


@pytest.mark.core
@both_ways
def test_a_feature_map_goes_through_as_in_the_authors_code(wrap):
    """[batch, channel, h, w] becomes [batch, position, channel], positions h-major; back again the value comes first.

    Recorded: indices, values, keys and negative squared distances of the whole encoder.
    """
    recorded, meta = golden("dkvb_splitters")
    fmap, keys, values = (recorded[name] for name in ("fmap", "pipe_keys_table", "pipe_values_table"))
    batch, channels, height, width = fmap.shape
    codebooks, pairs, key_width = keys.shape
    made = bn.discrete_key_value_bottleneck(
        channels, values.shape[-1], codebooks=codebooks, pairs=pairs, key_width=key_width
    )
    state = frozen(keys, projection=recorded["rand_proj"])
    params = {"values": jnp.asarray(values)}
    features = fmap.reshape(batch, channels, -1).swapaxes(1, 2)
    indices = wrap(made.lookup)(params, state, features)

    def on_the_map(fetched):
        """[B, C, k, V, h, w] from [B, P, C, k, V]."""
        return np.moveaxis(np.asarray(fetched), 1, -1).reshape(*fetched.shape[:1], codebooks, 1, -1, height, width)

    np.testing.assert_array_equal(on_the_map(indices[..., None]), recorded["pipe_indices"])
    assert_close(on_the_map(wrap(made.read)(params, indices)), recorded["pipe_values"])
    fetched = fetched_keys(keys, indices)
    assert_close(on_the_map(fetched), recorded["pipe_keys"])
    distances = nearest.squared_distances(jnp.asarray(recorded["pipe_split"].swapaxes(1, 2)), fetched[..., 0, :])
    assert_close(on_the_map(-distances[..., None, None]), recorded["pipe_distances"])
    assert meta["num_codebooks"] == codebooks


# Fitting keys


def fit_by_numpy(made_with, state, points, key):
    """One step as `discrete_key_value_bottleneck` words it, in NumPy; only the draw of replacements is jaxcl's.

    Args:
        made_with: decay, dead_share and averages.
        state: codebook [C, J, W], counts [C, J] and sums [C, J, W] as NumPy arrays.
        points: heads [C, N, W].
        key: what `fit_keys` is given.
    """
    decay, share, authors = made_with["decay"], made_with["dead_share"], made_with["averages"] == "authors"
    epsilon = 1e-5 if authors else 0.0
    codebook, counts, sums = (np.array(part, np.float64) for part in state)
    replaced = np.zeros(counts.shape, bool)
    for c, (own_key, x) in enumerate(zip(jax.random.split(key, len(points)), points, strict=True)):
        chosen = np.argmin(((x[:, None] - codebook[c][None]) ** 2).sum(axis=-1), axis=-1)
        for pair in range(counts.shape[1]):
            mine = x[chosen == pair]
            counts[c, pair] = decay * counts[c, pair] + (1 - decay) * len(mine)
            sums[c, pair] = decay * sums[c, pair] + (1 - decay) * mine.sum(axis=0)
        total = counts[c].sum()
        smoothed = (counts[c] + epsilon) / (total + len(counts[c]) * epsilon) * total
        known = smoothed > 0
        codebook[c][known] = sums[c][known] / smoothed[known][:, None]
        if not share:
            continue
        even_load = points.shape[1] / counts.shape[1] if authors else counts[c].mean()
        dead = counts[c] < share * even_load
        rows, served = (
            np.asarray(part)
            for part in quantize.draw_replacements(own_key, jnp.asarray(x, jnp.float32), jnp.asarray(dead))
        )
        codebook[c][served], replaced[c] = rows[served], served
        if not authors:
            counts[c][served], sums[c][served] = even_load, rows[served] * even_load
    return (codebook, counts, sums), replaced


@pytest.mark.parametrize(("averages", "dead_share"), [("sound", 0.0), ("sound", 0.31), ("authors", 0.31)])
def test_key_fitting_equals_numpy(averages, dead_share):
    """Four steps, with positions, against `fit_by_numpy`; with a dead share some keys are replaced, and not all."""
    options = {"decay": 0.8, "dead_share": dead_share, "averages": averages}
    made, params, state, _ = random_bottleneck(**options)
    fit = jax.jit(made.fit_keys)
    expected = tuple(np.asarray(part) for part in state.keys)
    replaced, rng = [], np.random.default_rng(1)
    for key in map(jax.random.key, range(4)):
        features = rng.standard_normal((6, 4, 6), np.float32)
        state = fit(key, params, state, features)
        points = heads_by_numpy(state, features)
        expected, served = fit_by_numpy(options, expected, points, key)
        replaced.append(served.mean())
        for actual, wanted in zip(state.keys, expected, strict=True):
            assert_close(actual, wanted)
    assert (0 < np.mean(replaced) < 1) == (dead_share > 0)


@pytest.mark.parametrize("averages", ["sound", "authors"])
def test_features_that_are_not_finite_fit_no_key(averages):
    features = np.random.default_rng(2).standard_normal((24, 6), np.float32)
    spoilt = np.concatenate([features, np.full((1, 6), np.nan, np.float32), np.full((1, 6), np.inf, np.float32)])
    made, params, state, _ = random_bottleneck(decay=0.8, dead_share=0.0, averages=averages)
    plain, other = (jax.jit(made.fit_keys)(jax.random.key(0), params, state, x) for x in (features, spoilt))
    jax.tree.map(assert_close, plain.keys, other.keys)
    replacing, *_ = random_bottleneck(decay=0.8, dead_share=1.0, averages=averages)
    replaced = jax.jit(replacing.fit_keys)(jax.random.key(0), params, state, spoilt).keys.codebook
    assert np.isfinite(replaced).all() and not np.array_equal(replaced, plain.keys.codebook)


@pytest.mark.parametrize("affine", [False, True])
def test_keys_that_were_placed_are_fitted_on_from_there(affine):
    """More keys than heads in a batch: what a batch does not choose is not dead."""
    made = bn.discrete_key_value_bottleneck(6, 2, codebooks=3, pairs=128, key_width=2)
    features = jax.random.normal(jax.random.key(0), (2000, 6))
    params, state = made.init(jax.random.key(1))
    if affine:
        placed = bn.fit_simvq_keys(jax.random.key(2), made, state, features)
    else:
        placed = jax.jit(functools.partial(made.place, iterations=5))(jax.random.key(2), params, state, features)

    def distance(state):
        return float(made.distances(state, features, made.lookup(params, state, features)).mean())

    fit, fitted = jax.jit(made.fit_keys), placed
    for number in range(4):
        fitted = fit(jax.random.key(number), params, fitted, features[32 * number : 32 * number + 32])
    assert distance(fitted) < 1.1 * distance(placed)
    moved = np.abs(fitted.keys.codebook - placed.keys.codebook).max(axis=-1) > 1
    assert moved.mean() < 0.1


def test_fitted_keys_lie_in_clusters_and_all_are_used():
    """Four corners of a square with little noise, six standard deviations of it being far less than their distance."""
    made = bn.discrete_key_value_bottleneck(4, 2, codebooks=2, pairs=16, key_width=2, projection="chunk")
    rng = np.random.default_rng(0)
    params, state = None, frozen(rng.normal(size=(2, 16, 2)))
    corners = np.asarray([[-2, -2], [-2, 2], [2, -2], [2, 2]], np.float32)
    heads = corners[rng.integers(4, size=(256, 2))] + rng.normal(0, 0.1, (256, 2, 2)).astype(np.float32)
    features = jnp.asarray(heads.reshape(256, 4))
    for key in map(jax.random.key, range(10)):
        state = bn.fit_epoch(key, made, params, state, features, batch_size=64)
    gaps = np.linalg.norm(np.asarray(state.keys.codebook)[:, :, None] - corners, axis=-1)  # [C, J, corner]
    assert gaps.min(axis=2).max() < 0.6
    assert gaps.min(axis=1).max() < 0.6
    used = made.count_usage(state, jax.jit(made.lookup)(params, state, features)).usage
    np.testing.assert_array_equal(quantize.utilisation(used), [1.0, 1.0])


def test_keys_that_nothing_chose_keep_their_place():
    """Without replacement a far key is never chosen, and "sound" leaves it where it was, to the last bit.

    "authors" divides its start by the smoothing 1e-5 (times the smoothing's own normalisation, near 1).
    """
    moved = {}
    for averages in ("sound", "authors"):
        made, params, state, features = random_bottleneck(dead_share=0.0, averages=averages)
        far = state.keys.codebook.copy()
        far[:, 2] = 1e3
        state = state._replace(keys=state.keys._replace(codebook=far, sums=far if averages == "authors" else 0 * far))
        fit = jax.jit(made.fit_keys)
        for key in map(jax.random.key, range(3)):
            state = fit(key, params, state, features)
        moved[averages] = np.asarray(state.keys.codebook)
    assert (moved["sound"][:, 2] == 1e3).all()
    np.testing.assert_allclose(moved["authors"][:, 2], 1e3 * 0.95**3 / 1e-5, rtol=1e-3)


@pytest.mark.parametrize(("batch_size", "batches", "left_out"), [(4, 3, 1), (50, 1, 0)])
def test_an_epoch_is_a_pass_in_random_order(batch_size, batches, left_out):
    """Which batch saw an example shows in the sums of a lone pair, feature n being n's unit vector.

    With decay 1/2, n adds 2^-(1 + batches after its own) to coordinate n, and 0 if it was left out. A `batch_size`
    above the number of examples counts as that number.
    """
    made = bn.discrete_key_value_bottleneck(
        13, 1, codebooks=1, pairs=1, key_width=13, projection="chunk", decay=0.5, dead_share=0.0
    )
    state = frozen(np.zeros((1, 1, 13)))
    sums = [
        np.asarray(bn.fit_epoch(jax.random.key(seed), made, None, state, np.eye(13), batch_size=batch_size).keys.sums)
        for seed in (0, 1)
    ]
    expected = [0.0] * left_out + [2.0**-after for after in range(batches, 0, -1) for _ in range(min(batch_size, 13))]
    for one in sums:
        assert sorted(one.ravel().tolist()) == expected
    assert (sums[0] != sums[1]).any() == (batches > 1)


def on_eight_devices(kind, made):
    """`fit_keys` with the batch split over eight devices."""
    mesh = host_mesh("devices")
    if kind == "pmap":
        mapped = jax.pmap(
            lambda key, params, state, features: made.fit_keys(key, params, state, features, axis_name="devices"),
            axis_name="devices", in_axes=(None, None, None, 0),
        )  # fmt: skip
        return lambda key, params, state, features: mapped(key, params, state, features.reshape(8, -1, 6))
    if kind == "shard_map":
        mapped = jax.shard_map(
            lambda key, params, state, features: made.fit_keys(key, params, state, features, axis_name="devices"),
            mesh=mesh, in_specs=(P(), P(), P(), P("devices")), out_specs=P(),
        )  # fmt: skip
        return jax.jit(mapped)
    fit, split = jax.jit(made.fit_keys), NamedSharding(mesh, P("devices"))
    return lambda key, params, state, features: fit(key, params, state, jax.device_put(features, split))


@pytest.mark.core
@pytest.mark.parametrize("kind", ["pmap", "shard_map", "jit"])
def test_eight_devices_fit_the_keys_of_one(kind):
    """Two steps, keys replaced in each: the expected state is that of one device with the whole batch."""
    made, params, state, _ = random_bottleneck(decay=0.1, dead_share=0.5)
    fit, alone = on_eight_devices(kind, made), jax.jit(made.fit_keys)
    one = split = jax.device_get(state)
    for step in range(2):
        key = jax.random.key(step)
        features = np.random.default_rng(step).standard_normal((32, 6), np.float32)
        one = jax.device_get(alone(key, params, one, features))
        found = jax.device_get(fit(key, params, split, features))
        # What a replaced key starts from: its sum is exactly its count times the head it was put on.
        assert (one.keys.sums == one.keys.counts[..., None] * one.keys.codebook).all(axis=-1).any()
        if kind == "pmap":
            jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * 8)), found)
            found = jax.tree.map(lambda leaf: leaf[0], found)
        jax.tree.map(assert_close, found, one)
        split = found


def test_init_draws_unit_columns_and_zero_values():
    """Columns of unit length over channels, keys N(0, 1), all else zero; "authors" starts sums at the keys."""
    sizes = {"codebooks": 5, "pairs": 64, "key_width": 3}
    params, state = jax.device_get(bn.discrete_key_value_bottleneck(20, 4, **sizes).init(jax.random.key(0)))
    assert state.projection.shape == (5, 20, 3)
    np.testing.assert_allclose(np.sqrt((np.asarray(state.projection) ** 2).sum(axis=1)), 1, rtol=1e-6)
    assert params["values"].shape == (5, 64, 4)
    assert not any(leaf.any() for leaf in (params["values"], state.keys.counts, state.keys.sums, state.usage))
    keys = np.asarray(state.keys.codebook)
    assert abs(keys.mean()) < 4 / np.sqrt(keys.size)
    assert abs(keys.std() - 1) < 4 / np.sqrt(2 * keys.size)
    made = bn.discrete_key_value_bottleneck(20, 4, averages="authors", **sizes)
    _, authors = jax.device_get(made.init(jax.random.key(1)))
    assert_same(authors.keys.sums, authors.keys.codebook)
    assert not authors.keys.counts.any()
    assert (authors.keys.codebook != keys).any()


def test_learning_never_moves_keys():
    """No gradient reaches keys, projection or features (zeros by definition), and counting changes `usage` alone."""
    made, params, state, features = random_bottleneck(top_k=2)

    def loss(keys, projection, features):
        now = state._replace(keys=state.keys._replace(codebook=keys), projection=projection)
        return jnp.square(bn.vote(made.read(params, made.lookup(params, now, features)))).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(state.keys.codebook, state.projection, features)
    assert not any(np.any(grad) for grad in grads)
    counted = made.count_usage(state, nearest_by_numpy(state, features, 2))
    assert_same(counted._replace(usage=state.usage), state)
    assert counted.usage.sum() == 12 * 3 * 2


# Look-up


@pytest.mark.core
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("leading", [(), (12,), (4, 3), (2, 3, 2)])
def test_lookup_equals_a_sort_of_all_distances(top_k, leading):
    """Any leading axes, against `nearest_by_numpy`."""
    made, params, state, features = random_bottleneck(top_k=top_k)
    features = features[: np.prod(leading, dtype=int)].reshape(*leading, 6)
    indices = jax.jit(made.lookup)(params, state, features)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, nearest_by_numpy(state, features, top_k))


@pytest.mark.parametrize("top_k", [1, 3])
def test_lookup_under_vmap_equals_plain_calls(top_k):
    """Over features one by one, and over states that stand for seeds."""
    made, params, state, features = random_bottleneck(top_k=top_k)
    _, _, other, _ = random_bottleneck(seed=1, top_k=top_k)
    lookup = jax.jit(made.lookup)
    whole = lookup(params, state, features)
    assert_same(jax.jit(jax.vmap(lambda one: made.lookup(params, state, one)))(features), whole)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), state, other)
    found = jax.jit(jax.vmap(lambda state: made.lookup(params, state, features)))(both)
    assert_same(found, np.stack([whole, lookup(params, other, features)]))


def test_fitting_under_vmap_equals_plain_calls():
    """Over states that stand for seeds."""
    made, params, state, features = random_bottleneck()
    _, _, other, _ = random_bottleneck(seed=1)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), state, other)
    fit, key = jax.jit(made.fit_keys), jax.random.key(3)
    fitted = jax.jit(jax.vmap(lambda state: made.fit_keys(key, params, state, features)))(both)
    for seed, one in enumerate((state, other)):
        expected = fit(key, params, one, features)
        jax.tree.map(assert_close, jax.tree.map(lambda leaf, seed=seed: leaf[seed], fitted), expected)


def test_bfloat16_features_are_taken_as_float32():
    """Expected: the same numbers handed in as float32; the state stays float32."""
    made, params, state, features = random_bottleneck()
    lookup, fit, key = jax.jit(made.lookup), jax.jit(made.fit_keys), jax.random.key(1)
    half, same = features.astype(jnp.bfloat16), features.astype(jnp.bfloat16).astype(np.float32)
    found = lookup(params, state, half)
    assert_same(found, lookup(params, state, same))
    np.testing.assert_array_equal(found, nearest_by_numpy(state, half, 1))
    fitted = fit(key, params, state, half)
    assert_same(fitted, fit(key, params, state, same))
    assert fitted.keys.codebook.dtype == jnp.float32


@pytest.mark.parametrize("top_k", [1, 2])
def test_used_only_before_any_use_gives_the_lowest_indices(top_k):
    """All pairs are alike then: index 0, as in the authors' code, and with more picks those that follow."""
    made, params, state, features = random_bottleneck(top_k=top_k)
    indices = jax.jit(made.lookup, static_argnames="used_only")(params, state, features, used_only=True)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(top_k), (12, 3, top_k)))


@pytest.mark.parametrize("top_k", [1, 2])
def test_used_only_fetches_the_nearest_of_the_used(top_k):
    """Against `nearest_by_numpy` with unused pairs infinitely far; without the option all pairs take part."""
    made, params, state, features = random_bottleneck(top_k=top_k)
    lookup = jax.jit(made.lookup, static_argnames="used_only")
    eligible = np.zeros((3, 7), bool)
    eligible[:, :4] = True
    state = state._replace(usage=3 * eligible.astype(np.int32))
    found = lookup(params, state, features, used_only=True)
    np.testing.assert_array_equal(found, nearest_by_numpy(state, features, top_k, eligible))
    everywhere = lookup(params, state, features)
    np.testing.assert_array_equal(everywhere, nearest_by_numpy(state, features, top_k))
    assert (np.asarray(found) != np.asarray(everywhere)).any()


def test_an_unused_pair_never_wins_against_a_used_one_that_is_far():
    """Where jaxcl leaves the authors' floor: the only used pair is the farthest of all, and is fetched."""
    made, params, state, features = random_bottleneck()
    keys, usage = state.keys.codebook.copy(), np.zeros((3, 7), np.int32)
    keys[:, 4], usage[:, 4] = 50.0, 1
    state = state._replace(keys=state.keys._replace(codebook=keys), usage=usage)
    indices = jax.jit(made.lookup, static_argnames="used_only")(params, state, features, used_only=True)
    assert (np.asarray(indices) == 4).all()


@pytest.mark.core
def test_no_second_compilation():
    """One program each for three features, keys and states."""
    made, params, state, features = random_bottleneck(pairs=9, dead_share=0.0)
    lookup, fit = jax.jit(made.lookup), jax.jit(made.fit_keys)
    with count_compilations(["lookup", "fit_keys"]) as compilations:
        for step in range(3):
            state = fit(jax.random.key(step), params, state, features + step)
            lookup(params, state, features - step)
    assert dict(compilations) == {"lookup": 1, "fit_keys": 1}


# Reading, counting, voting


@pytest.mark.parametrize("shape", [(3, 2), (4, 5, 3, 2)])
def test_read_count_and_vote_equal_numpy(shape):
    """Indexing, `np.add.at` and sums; indices kept as uint16 give what int32 gives."""
    made, params, state, _ = random_bottleneck(top_k=2)
    indices = np.random.default_rng(0).integers(7, size=shape)
    values = np.asarray(params["values"])
    codebook = np.broadcast_to(np.arange(3)[:, None], shape)
    expected = values[codebook, indices]
    counts = np.zeros((3, 7), int)
    np.add.at(counts, (codebook, indices), 1)
    for dtype in (jnp.int32, jnp.uint16):
        kept = indices.astype(dtype)
        found = jax.jit(made.read)(params, kept)
        np.testing.assert_array_equal(found, expected)
        count_usage = jax.jit(made.count_usage)
        np.testing.assert_array_equal(count_usage(count_usage(state, kept), kept).usage, 2 * counts)
    assert_close(bn.vote(found), expected.sum(axis=-2).mean(axis=-2), 1e-6)


def test_the_most_pairs_fit_sixteen_bits():
    """65,536 pairs: the last index is 65,535, and its row, its count and its number follow by arithmetic."""
    made = bn.discrete_key_value_bottleneck(2, 1, codebooks=2, pairs=2**16, key_width=1)
    state = frozen(np.zeros((2, 2**16, 1)))
    params = {"values": jnp.arange(2.0**17).reshape(2, 2**16, 1)}
    last = np.full((1, 2, 1), 2**16 - 1, np.uint16)
    np.testing.assert_array_equal(bn.pair_numbers(last, 2**16)[0, :, 0], [2**16 - 1, 2**17 - 1])
    np.testing.assert_array_equal(made.read(params, last)[0, :, 0, 0], [2**16 - 1, 2**17 - 1])
    usage = np.asarray(made.count_usage(state, last).usage)
    assert usage[:, -1].tolist() == [1, 1]
    assert usage.sum() == 2


def test_the_gradient_of_read_is_a_dense_scatter():
    """By hand: each fetched row gets the sum of its cotangents; and by central differences of a linear function."""
    made, params, _, _ = random_bottleneck(top_k=2)
    rng = np.random.default_rng(0)
    indices, weights = rng.integers(7, size=(9, 3, 2)), rng.normal(size=(9, 3, 2, 5)).astype(np.float32)

    def total(params):
        return jnp.sum(weights * made.read(params, indices))

    expected = np.zeros((3, 7, 5))
    np.add.at(expected, (np.arange(3)[:, None], indices), weights)
    found = jax.jit(jax.grad(total))(params)["values"]
    assert_close(found, expected)
    direction = rng.normal(size=(3, 7, 5)).astype(np.float32)
    up, down = (jax.jit(total)({"values": params["values"] + sign * direction}) for sign in (1, -1))
    np.testing.assert_allclose((up - down) / 2, (expected * direction).sum(), rtol=1e-4)


# The sparse optimizer


def dense_of(rows, shape):
    """The dense gradient [R, V] that `rows` stand for, by `np.add.at` in float64."""
    table = np.zeros(shape)
    np.add.at(table, np.asarray(rows.numbers), np.asarray(rows.values, np.float64))
    return table


def clipped_descent(gradients, learning_rate, max_norm):
    """The dense rule by NumPy: minus the rate times the gradients, scaled by min(1, max_norm / (norm + 1e-6))."""
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    return [-learning_rate * factor * gradient for gradient in gradients]


def random_rows(rng, *, table_rows, aligned):
    """Rows of five examples, three each, distinct within an example; `aligned` ones all point the same way."""
    numbers = np.stack([rng.permutation(table_rows)[:3] for _ in range(5)])
    values = rng.normal(size=(5, 3, 4))
    if aligned:
        values = np.broadcast_to(rng.normal(size=4), values.shape)
    return trees.Rows(jnp.asarray(numbers, jnp.int32), jnp.asarray(values, jnp.float32))


@jax.jit
def sparse_updates(gradients, max_norm):
    return bn.sparse_sgd(0.7, max_norm=max_norm).update(gradients, optax.EmptyState())[0]


@given(
    seed=st.integers(0, 2**32 - 1), table_rows=st.integers(3, 12), aligned=st.booleans(), mixed=st.booleans(),
    tightness=st.one_of(st.floats(0.05, 3), st.just(1.0)), exponent=st.integers(-3, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_clipping_is_the_dense_rule_for_any_rows(seed, table_rows, aligned, mixed, tightness, exponent):
    """However rows coincide, and with a dense leaf beside them, against `clipped_descent`.

    Three rows in the table, and all values aligned, make the norm equal to the bound that spares working it out: were
    any norm above its bound, some clip between the two would be missed. `tightness` is max_norm over the norm.
    """
    rng = np.random.default_rng(seed)
    scale = np.float32(10.0**exponent)
    rows = random_rows(rng, table_rows=table_rows, aligned=aligned)
    gradients = {"values": rows._replace(values=rows.values * scale)}
    gradients["bias"] = jnp.asarray(rng.normal(size=3) * scale * mixed, jnp.float32)
    dense = [dense_of(gradients["values"], (12, 4)), np.asarray(gradients["bias"], np.float64)]
    max_norm = np.float32(tightness * np.sqrt(sum((gradient**2).sum() for gradient in dense)))
    updates = sparse_updates(gradients, max_norm)
    expected = clipped_descent(dense, 0.7, float(max_norm))
    found = [dense_of(updates["values"], (12, 4)), np.asarray(updates["bias"])]
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5 * float(max_norm))
    np.testing.assert_array_equal(updates["values"].numbers, gradients["values"].numbers)


@pytest.mark.parametrize(("max_norm", "dtype"), [(None, jnp.float32), (20.0, jnp.float32), (20.0, jnp.bfloat16)])
def test_sparse_sgd_plain_jitted_and_mapped(max_norm, dtype):
    """Whole updates of a tree, by `trees.apply_updates`, against `clipped_descent`; under `vmap` each clips alone.

    Of the two gradients the first, of norm about 7, is left as it is and the second, of norm about 400, clipped.
    """
    tx = bn.sparse_sgd(0.5, max_norm=max_norm)
    rng = np.random.default_rng(0)
    both = [random_rows(rng, table_rows=4, aligned=False) for _ in range(2)]
    gradients = [
        {"values": rows._replace(values=(rows.values * size).astype(dtype)), "bias": jnp.full(3, size)}
        for rows, size in zip(both, (1.0, 50.0), strict=True)
    ]
    params = {"values": jnp.ones((2, 6, 4)), "bias": jnp.zeros(3)}

    def descend(gradients):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return trees.apply_updates(params, updates)

    mapped = jax.jit(jax.vmap(descend))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients))
    for seed, one in enumerate(gradients):
        dense = [dense_of(one["values"], (12, 4)), np.asarray(one["bias"])]
        values, bias = clipped_descent(dense, 0.5, max_norm)
        expected = {"values": 1 + values.reshape(2, 6, 4), "bias": bias}
        if max_norm:
            assert (np.abs(values).sum() < np.abs(0.49 * dense[0]).sum()) == (seed == 1)
        for found in (descend(one), jax.jit(descend)(one), jax.tree.map(lambda leaf, seed=seed: leaf[seed], mapped)):
            for name, wanted in expected.items():
                assert found[name].dtype == jnp.float32
                assert_close(found[name], wanted, 1e-5 if dtype == jnp.float32 else 1e-2)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_width": 0}, "feature_width: got 0; pass 1 or more"),
        ({"value_width": 0}, "value_width: got 0; pass 1 or more"),
        ({"codebooks": 0}, "codebooks: got 0; pass 1 or more"),
        ({"pairs": 0}, "pairs: got 0; pass 1 or more"),
        ({"pairs": 65537}, "pairs: got 65537; pass a number from 1 to 65536"),
        ({"key_width": -1}, "key_width: got -1; pass 1 or more"),
        ({"top_k": 0}, "top_k: got 0; pass 1 or more"),
        ({"top_k": 8}, "top_k: got 8; pass a number from 1 to 7"),
        ({"projection": "learned"}, "projection: got 'learned'; choose one of 'random', 'chunk'"),
        ({"projection": "chunk"}, "feature_width: got 6; chunks need codebooks * key_width = 12 features"),
        ({"averages": "none"}, "averages: got 'none'; choose one of 'sound', 'authors'"),
        ({"decay": 1.5}, "decay: got 1.5; pass a number from 0 to 1"),
        ({"decay": -0.1}, "decay: got -0.1; pass a number from 0 to 1"),
        ({"decay": float("nan")}, "decay: got nan; pass a number from 0 to 1"),
        ({"dead_share": 2}, "dead_share: got 2; pass a number from 0 to 1"),
        ({"dead_share": -1}, "dead_share: got -1; pass a number from 0 to 1"),
    ],
)
def test_bad_options_say_what_to_do(arguments, message):
    """The texts are jaxcl's form of errors: argument, value, fix."""
    good = {"feature_width": 6, "value_width": 5, "codebooks": 3, "pairs": 7, "key_width": 4}
    with pytest.raises(ValueError) as caught:
        bn.discrete_key_value_bottleneck(**(good | arguments))
    assert str(caught.value) == message


def test_an_epoch_needs_batches():
    made, params, state, features = random_bottleneck()
    with pytest.raises(ValueError, match="batch_size: got 0; pass 1 or more"):
        bn.fit_epoch(jax.random.key(0), made, params, state, features, batch_size=0)


@pytest.mark.parametrize("shape", [(2, 5), (5,), ()])
@pytest.mark.parametrize("member", ["lookup", "fit_keys"])
def test_features_of_another_width_say_what_to_do(member, shape):
    made, params, state, _ = random_bottleneck()
    key = [jax.random.key(0)] if member == "fit_keys" else []
    with pytest.raises(ValueError) as caught:
        getattr(made, member)(*key, params, state, jnp.zeros(shape))
    assert str(caught.value) == f"features: got shape {shape}; its last axis must be 6, the width of the bottleneck"


def test_votes_need_codebooks_and_picks():
    with pytest.raises(ValueError, match=r"values: got shape \(2, 5\); pass an array with 3 axes"):
        bn.vote(jnp.zeros((2, 5)))


def test_keys_on_their_clusters_stay_there():
    """Four clusters, a key on each, 16 examples of each: no key is dead, though all counts start at zero."""
    centres = np.asarray([[-2, -2], [-2, 2], [2, -2], [2, 2]], np.float32)
    made = bn.discrete_key_value_bottleneck(2, 1, codebooks=1, pairs=4, key_width=2, projection="chunk")
    params, state = made.init(jax.random.key(0))
    state = state._replace(keys=state.keys._replace(codebook=jnp.asarray(centres[None])))
    noise = np.random.default_rng(0).normal(size=(64, 2)) * 0.1
    fitted = jax.jit(made.fit_keys)(jax.random.key(1), params, state, jnp.asarray(np.tile(centres, (16, 1)) + noise))
    expected = centres + noise.reshape(16, 4, 2).mean(axis=0)  # the mean of each cluster's examples
    assert_close(fitted.keys.codebook[0], expected)


@pytest.mark.parametrize("shape", [(9, 3), (3,), (9, 4, 1)])
def test_indices_of_another_shape_are_named(shape):
    made, params, _, _ = random_bottleneck()
    with pytest.raises(ValueError, match=r"indices: got shape .*; pass \[..., 3, top_k\], as `lookup` gives"):
        made.read(params, jnp.zeros(shape, jnp.int32))


def test_fitting_needs_features():
    made, params, state, _ = random_bottleneck()
    with pytest.raises(ValueError, match=r"features, their number: got 0; pass 1 or more"):
        bn.fit_epoch(jax.random.key(0), made, params, state, jnp.zeros((0, 6)), batch_size=4)


@pytest.mark.parametrize("options", [{"learning_rate": -1.0}, {"learning_rate": 1.0, "max_norm": -1.0}])
def test_sgd_that_would_ascend_is_refused(options):
    with pytest.raises(ValueError, match=r"(learning_rate|max_norm): got -1.0; pass 0 or more"):
        bn.sparse_sgd(**options)


def test_sampled_pairs_have_the_chances_of_their_distances():
    """4,000 draws for one feature: frequencies as exp(-d^2 / T) to three standard errors; spare pairs never."""
    made = bn.discrete_key_value_bottleneck(3, 2, codebooks=2, pairs=6, key_width=2, spare=2)
    params, state = made.init(jax.random.key(0))
    feature = jnp.asarray([[0.3, -0.2, 0.5]])
    draw = jax.jit(lambda key: bn.sample_pairs(key, made, state, feature, temperature=2.0))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
    assert drawn.shape == (4000, 1, 2, 1)
    heads, keys = np.asarray(made.heads(state, feature)), np.asarray(state.keys.codebook)
    for codebook in range(2):
        chances = np.exp(-((heads[codebook] - keys[codebook, :4]) ** 2).sum(axis=1) / 2)
        chances /= chances.sum()
        seen = np.bincount(drawn[:, 0, codebook, 0], minlength=6) / 4000
        assert (np.abs(seen[:4] - chances) < 3 * np.sqrt(chances * (1 - chances) / 4000) + 1e-9).all()
        assert not seen[4:].any()
    cold = bn.sample_pairs(jax.random.key(0), made, state, feature, temperature=1e-6)
    np.testing.assert_array_equal(cold, made.lookup(params, state, feature))
    with pytest.raises(ValueError, match="temperature: got 0"):
        bn.sample_pairs(jax.random.key(0), made, state, feature, temperature=0)
