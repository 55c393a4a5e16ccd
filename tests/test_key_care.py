"""Key care: it sees a shift and only a shift, puts free keys where heads are, and changes nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy import stats

from jaxcl import bottleneck as bn
from jaxcl import continual, quantize
from jaxcl.continual import Examples, streams
from jaxcl.continual.strategies import key_value

CODEBOOKS, PAIRS, WIDTH, SPARE, CLASSES = 3, 24, 4, 8, 5
FEATURES = CODEBOOKS * WIDTH


@functools.cache
def fitted():
    """Layer, params with random values, state with usage counted, reference, and the features of all that."""
    layer = bn.discrete_key_value_bottleneck(
        FEATURES, CLASSES, codebooks=CODEBOOKS, pairs=PAIRS, key_width=WIDTH, spare=SPARE, projection="chunk"
    )
    params, state = layer.init(jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (2000, FEATURES))
    for epoch in range(3):
        state = bn.fit_epoch(jax.random.key(epoch), layer, params, state, features, batch_size=100)
    state = jax.jit(layer.count_usage)(state, jax.jit(layer.lookup)(params, state, features))
    params = {"values": jax.random.normal(jax.random.key(2), params["values"].shape)}
    reference = jax.jit(functools.partial(bn.reference_distances, layer))(params, state, features)
    return layer, params, state, reference, features


def care(state, features, policy=bn.KeyPolicy(), seed=3, mask=None):  # noqa: B008
    layer, params, _, reference, _ = fitted()
    call = jax.jit(functools.partial(bn.care_for_keys, bottleneck=layer, policy=policy))
    return call(jax.random.key(seed), params=params, state=state, reference=reference, features=features, mask=mask)


def drifted(count=200):
    return 6 + jax.random.normal(jax.random.key(4), (count, FEATURES))


def distances_of(layer, params, state, features):
    return np.asarray(layer.distances(state, features, layer.lookup(params, state, features)))


# Spare keys


def test_spare_keys_are_neither_fitted_nor_fetched():
    layer, params, state, _, features = fitted()
    assert int(state.active.sum()) == CODEBOOKS * (PAIRS - SPARE)
    assert int(layer.lookup(params, state, features).max()) < PAIRS - SPARE
    _, untouched = layer.init(jax.random.key(0))
    np.testing.assert_array_equal(state.keys.codebook[:, PAIRS - SPARE :], untouched.keys.codebook[:, PAIRS - SPARE :])


def test_spare_keys_change_nothing_for_the_others():
    *_, features = fitted()

    def keys(pairs, spare):
        # Which heads replace dead keys is drawn among all keys, and so depends on their number: none is replaced here.
        layer = bn.discrete_key_value_bottleneck(
            FEATURES, CLASSES, codebooks=CODEBOOKS, pairs=pairs, key_width=WIDTH, spare=spare, projection="chunk",
            dead_share=0,
        )  # fmt: skip
        params, state = layer.init(jax.random.key(0))
        state = state._replace(keys=state.keys._replace(codebook=first[:, :pairs]))
        return bn.fit_epoch(jax.random.key(5), layer, params, state, features, batch_size=100).keys.codebook

    first = jax.random.normal(jax.random.key(9), (CODEBOOKS, PAIRS, WIDTH))
    assert_close(keys(PAIRS, SPARE)[:, : PAIRS - SPARE], keys(PAIRS - SPARE, 0), 1e-5)


# Placing keys


@pytest.mark.parametrize("iterations", [0, 4])
def test_keys_are_placed_as_each_codebook_would_be(iterations):
    layer, params, state, _, features = fitted()
    key, in_play = jax.random.key(11), PAIRS - SPARE
    placed = jax.jit(functools.partial(layer.place, iterations=iterations))(key, params, state, features)
    heads = layer.heads(state, features)
    for c, own in enumerate(jax.random.split(key, CODEBOOKS)):
        before = state.keys.codebook[c, :in_play]
        expected = quantize.place_codes(own, before, heads[c], iterations=iterations, metric="euclidean")
        assert_close(placed.keys.codebook[c, :in_play], expected, 1e-5)
    np.testing.assert_array_equal(placed.keys.codebook[:, in_play:], state.keys.codebook[:, in_play:])
    # Each counts as one head, but for those in reserve.
    np.testing.assert_array_equal(placed.keys.counts, state.active)
    np.testing.assert_array_equal(placed.keys.sums, placed.keys.codebook * state.active[..., None])


def test_k_means_brings_keys_nearer():
    layer, params, state, _, features = fitted()
    means = []
    for iterations in (0, 1, 8):
        placed = layer.place(jax.random.key(12), params, state, features, iterations=iterations)
        means.append(float(distances_of(layer, params, placed, features).mean()))
    assert means[0] > means[1] > means[2]


# Health


def test_distances_are_those_to_the_nearest_active_key():
    layer, params, state, _, features = fitted()
    heads = np.asarray(features).reshape(-1, CODEBOOKS, WIDTH)
    keys = np.asarray(state.keys.codebook)[:, : PAIRS - SPARE]
    expected = ((heads[:, :, None] - keys) ** 2).sum(axis=-1).min(axis=-1)
    assert_close(distances_of(layer, params, state, features), expected, 1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1.0, 0.7), (2.0, 0.0), (0.5, 0.0)])
def test_the_shift_is_the_one_sided_kolmogorov_smirnov_statistic(scale, offset):
    layer, params, state, reference, features = fitted()
    batch = offset + scale * jax.random.normal(jax.random.key(5), (300, FEATURES))
    health = bn.check_keys(layer, params, state, reference, batch)
    before, now = (distances_of(layer, params, state, x) for x in (features, batch))
    expected = [
        stats.ks_2samp(before[:, c], now[:, c], alternative="greater", method="asymp").statistic
        for c in range(CODEBOOKS)
    ]
    np.testing.assert_allclose(health.shift, expected, atol=0.02)


def test_usage_is_told():
    layer, params, state, reference, features = fitted()
    health = bn.check_keys(layer, params, state, reference, features)
    used = np.asarray(state.usage)[:, : PAIRS - SPARE]
    assert_close(health.utilisation, (used > 0).mean(axis=1))
    assert_close(health.perplexity, np.exp(stats.entropy(used, axis=1)))
    np.testing.assert_array_equal(health.free, (used == 0).sum(axis=1) + SPARE)


# Care


def test_the_same_data_leave_all_as_it_was():
    _, params, state, _, _ = fitted()
    same = jax.random.normal(jax.random.key(6), (500, FEATURES))
    cared_params, cared, told = care(state, same)
    assert float(told.health.shift.max()) < 0.15 and not told.placed.any()
    jax.tree.map(np.testing.assert_array_equal, (cared_params, cared), (params, state))


def test_spare_keys_wake_on_far_heads_with_the_values_of_the_nearest():
    layer, params, state, _, features = fitted()
    batch = drifted()
    cared_params, cared, told = care(state, batch)
    np.testing.assert_array_equal(told.placed, [SPARE] * CODEBOOKS)
    assert cared.active.all()
    heads = np.asarray(batch).reshape(-1, CODEBOOKS, WIDTH)
    nearest = np.asarray(layer.lookup(params, state, batch))[..., 0]
    for c in range(CODEBOOKS):
        for slot in range(PAIRS - SPARE, PAIRS):
            (row,) = np.flatnonzero((heads[:, c] == cared.keys.codebook[c, slot]).all(axis=1))
            np.testing.assert_array_equal(cared_params["values"][c, slot], params["values"][c, nearest[row, c]])
            assert int(cared.usage[c, slot]) == 1
            load = float(state.keys.counts[c].sum() / (PAIRS - SPARE))
            assert float(cared.keys.counts[c, slot]) == pytest.approx(load, rel=1e-5)
            assert_close(cared.keys.sums[c, slot], load * cared.keys.codebook[c, slot], 1e-5)
    # All else is as it was, and so is what old examples fetch.
    np.testing.assert_array_equal(cared.keys.codebook[:, : PAIRS - SPARE], state.keys.codebook[:, : PAIRS - SPARE])
    np.testing.assert_array_equal(cared_params["values"][:, : PAIRS - SPARE], params["values"][:, : PAIRS - SPARE])
    before, after = (np.asarray(layer.lookup(params, own, features)) for own in (state, cared))
    assert (before == after).mean() > 0.99
    again = bn.check_keys(layer, params, cared, fitted()[3], batch)
    assert (np.asarray(again.shift) <= np.asarray(told.health.shift)).all() and not again.free.any()


def test_keys_that_training_never_fetched_follow_the_spare_ones():
    _, _, state, _, _ = fitted()
    state = state._replace(usage=state.usage.at[:, 2:5].set(0))
    _, cared, told = care(state, drifted())
    np.testing.assert_array_equal(told.placed, [SPARE + 3] * CODEBOOKS)
    changed = (cared.keys.codebook != state.keys.codebook).any(axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(changed[0]), [2, 3, 4, *range(PAIRS - SPARE, PAIRS)])


def test_a_call_places_as_many_as_the_policy_says_and_the_next_goes_on():
    _, _, state, _, _ = fitted()
    policy = bn.KeyPolicy(most=5)
    _, cared, told = care(state, drifted(), policy)
    np.testing.assert_array_equal(told.placed, [5] * CODEBOOKS)
    _, cared, told = care(cared, drifted(), policy, seed=7)
    np.testing.assert_array_equal(told.placed, [SPARE - 5] * CODEBOOKS)
    _, cared, told = care(cared, drifted(), policy, seed=8)
    np.testing.assert_array_equal(told.placed, [0] * CODEBOOKS)


def test_a_batch_with_few_far_heads_gives_few_keys():
    _, _, state, _, features = fitted()
    batch = jnp.concatenate([features[:10], drifted(20)])
    _, _, told = care(state, batch)
    assert (told.placed == SPARE).all()
    _, _, told = care(state, batch, mask=(jnp.arange(30) >= 8) & (jnp.arange(30) < 16))
    assert (told.placed <= 7).all() and (told.placed >= 6).all()


def test_a_shift_that_chance_may_give_so_small_a_batch_wakes_no_key():
    _, _, state, _, features = fitted()
    batch = jnp.concatenate([features[:30], drifted(10)])
    _, _, told = care(state, batch)
    assert told.health.shift.min() > 0.15 and told.above == pytest.approx((np.log(1000) / 80) ** 0.5)
    np.testing.assert_array_equal(told.placed > 0, told.health.shift > told.above)
    assert not told.placed.all()
    _, _, told = care(state, jnp.concatenate([batch] * 4))
    assert told.placed.all()


def test_held_out_features_are_the_reference_that_gives_no_false_alarm():
    layer = bn.discrete_key_value_bottleneck(
        FEATURES, CLASSES, codebooks=CODEBOOKS, pairs=200, key_width=WIDTH, projection="chunk"
    )
    shown, held_out, fresh = jax.random.normal(jax.random.key(20), (3, 1000, FEATURES))
    params, state = layer.init(jax.random.key(0))
    state = jax.jit(functools.partial(layer.place, iterations=5))(jax.random.key(1), params, state, shown)
    shift = [
        float(bn.check_keys(layer, params, state, bn.reference_distances(layer, params, state, of), fresh).shift.max())
        for of in (shown, held_out)
    ]
    assert shift[0] > 0.15 and shift[1] < 0.1


def test_decisions_are_told_with_their_causes():
    _, _, state, _, _ = fitted()
    _, cared, told = care(state, drifted())
    records = bn.describe_care(told)
    assert [record["codebook"] for record in records] == [0, 1, 2]
    assert records[0]["placed"] == SPARE and records[0]["free"] == 0
    assert "is above 0.15; 100.0% of heads are far" in records[0]["cause"]
    _, _, told = care(cared, drifted(), seed=9)
    assert "but no key is free" in bn.describe_care(told)[0]["cause"]
    _, _, told = care(state, jax.random.normal(jax.random.key(6), (500, FEATURES)))
    assert "is not above 0.15" in bn.describe_care(told)[0]["cause"]


# Deleting a class


def test_a_deleted_class_is_no_answer_and_others_keep_what_they_do_not_share():
    layer, params, state, _, _ = fitted()
    own = jnp.broadcast_to(jnp.array([0, 1, 2])[:, None], (40, 3, 1))  # these pairs are the class's alone
    shared = jnp.broadcast_to(jnp.array([3, 4, 5])[:, None], (10, 3, 1))
    others = jnp.broadcast_to(jnp.array([3, 4, 5])[:, None], (90, 3, 1))
    state = layer.count_usage(state._replace(usage=jnp.zeros_like(state.usage)), jnp.concatenate([own, shared, others]))
    for label in (0, CLASSES - 1):
        forgotten, left = bn.forget_class(params, state, label, jnp.concatenate([own, shared]))
        values = np.asarray(forgotten["values"])
        kept = [other for other in range(CLASSES) if other != label]
        assert (values[..., label] < values[..., kept].min(axis=-1)).all()
        reset = [values[c, pair][kept] for c, pair in enumerate((0, 1, 2))]
        np.testing.assert_array_equal(reset, np.zeros((3, CLASSES - 1)))
        untouched = np.asarray(params["values"])[..., kept].copy()
        untouched[[0, 1, 2], [0, 1, 2]] = 0
        np.testing.assert_array_equal(values[..., kept], untouched)
        np.testing.assert_array_equal(left.usage[[0, 1, 2], [0, 1, 2]], 0)
        np.testing.assert_array_equal(left.usage[[0, 1, 2], [3, 4, 5]], 90)


def test_classes_deleted_in_turn_stay_deleted():
    """Each class alone fetches a pair of its own, which its deletion resets."""
    layer, params, state, _, _ = fitted()
    pairs = jnp.arange(CLASSES)[:, None, None, None] * jnp.ones((1, 5, CODEBOOKS, 1), jnp.int32)
    state = layer.count_usage(state._replace(usage=jnp.zeros_like(state.usage)), pairs)
    for label in range(CLASSES - 1):
        deleted = range(label)
        params, state = bn.forget_class(params, state, label, pairs[label], deleted=deleted)
        kept = [*range(label + 1, CLASSES)]
        values = np.asarray(params["values"])
        assert (values[..., [*deleted, label]].max(axis=-1) < values[..., kept].min(axis=-1)).all()
    with pytest.raises(ValueError, match=f"deleted: got .*; leave a class beside {CLASSES - 1}"):
        bn.forget_class(params, state, CLASSES - 1, pairs[0], deleted=range(CLASSES - 1))


def test_what_fetched_nothing_resets_nothing_and_shares_are_reached():
    """-1 stands where a row only fills a batch up; 27 of 90 fetches are 0.3 of them, which no float32 says."""
    _, params, state, _, _ = fitted()
    usage = jnp.full_like(state.usage, 90)
    own = jnp.concatenate([jnp.zeros((27, CODEBOOKS, 1), jnp.int32), jnp.full((50, CODEBOOKS, 1), -1)])
    _, left = bn.forget_class(params, state._replace(usage=usage), 0, own, share=0.3)
    np.testing.assert_array_equal(left.usage, usage.at[:, 0].set(0))


def test_a_class_of_feature_maps_is_deleted_as_its_positions_are():
    _, params, state, _, _ = fitted()
    maps = jax.random.randint(jax.random.key(3), (6, 5, CODEBOOKS, 1), 0, PAIRS)
    flat = maps.reshape(30, CODEBOOKS, 1)
    both = (bn.forget_class(params, state, 1, indices, share=0.2) for indices in (maps, flat))
    jax.tree.map(np.testing.assert_array_equal, *both)
    with pytest.raises(ValueError, match=r"indices: got shape \(3, 6, 1\); pass \[..., 3, top_k\]"):
        bn.forget_class(params, state, 1, flat[:6].swapaxes(0, 1))


def test_features_that_are_not_finite_are_left_out_of_care():
    layer, params, state, _, features = fitted()
    spoilt = jnp.concatenate([drifted(), jnp.full((40, FEATURES), jnp.nan)])
    plain, other = care(state, drifted()), care(state, spoilt)
    jax.tree.map(np.testing.assert_array_equal, plain[2].health, other[2].health)
    assert other[2].placed.all() and np.isfinite(other[1].keys.codebook).all()
    told = bn.reference_distances(layer, params, state, features.at[0].set(jnp.inf))
    assert np.isfinite(told.quantiles).all()


# In a stream


def stream(indices=None):
    """Two tasks, the second far from where keys were fitted; features, or the indices they fetch."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(330) % CLASSES).astype(np.int32)
    inputs = rng.standard_normal((330, FEATURES)).astype(np.float32) + 6 * (labels >= 3)[:, None]
    examples = Examples(inputs if indices is None else np.asarray(indices(jnp.asarray(inputs))), labels)
    return streams.class_incremental(None, examples, examples, classes_per_task=(3, 2))


def trained(strategy, of, **options):
    _, params, *_ = fitted()
    tx = bn.sparse_sgd(1.0, max_norm=1.0)
    return continual.run(jax.random.key(0), strategy, tx, params, of, epochs=6, batch_size=32, **options)


def cared_strategy(refresh_every):
    layer, _, state, reference, _ = fitted()
    return continual.cared_key_value_bottleneck(layer, state, reference, refresh_every=refresh_every)


def test_without_care_it_is_training_on_indices():
    layer, params, state, *_ = fitted()
    plain = trained(continual.key_value_bottleneck(layer), stream(lambda x: layer.lookup(params, state, x)))
    cared = trained(cared_strategy(0), stream())
    assert_close(cared.params["values"], plain.params["values"], 1e-5)
    np.testing.assert_array_equal(cared.accuracy, plain.accuracy)
    counted = np.asarray(cared.strategy_state.keys.usage - state.usage)
    np.testing.assert_array_equal(counted.sum(axis=1), [6 * 330] * CODEBOOKS)  # rows that fill up are not counted


def test_keys_are_placed_in_the_middle_of_a_stream_without_a_second_compilation():
    result = trained(cared_strategy(4), stream())
    assert np.asarray(result.strategy_state.placed).min() >= SPARE
    assert all(count == 1 for count in result.compilations.values())


@pytest.mark.parametrize("logged", [256, 5])
def test_decisions_are_remembered_the_newest_of_them(logged, monkeypatch):
    """A check every four steps of a task: of 42 and 30, for 198 and 132 examples."""
    monkeypatch.setattr(key_value, "_LOGGED", logged)
    state = trained(cared_strategy(4), stream()).strategy_state
    decisions = continual.key_decisions(state)
    checks = int(state.checks)
    assert checks == 42 // 4 + 30 // 4
    assert [number for number, _ in decisions] == list(range(max(0, checks - logged), checks))
    if logged > checks:
        np.testing.assert_array_equal(sum(care.placed for _, care in decisions), state.placed)
        causes = [bn.describe_care(care)[0]["cause"] for _, care in decisions]
        assert "is not above" in causes[0] and any("of heads are far" in cause for cause in causes[9:])


# What is refused


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (bn.KeyPolicy(shift=2.0), r"policy\.shift: got 2\.0"),
        (bn.KeyPolicy(far=-1.0), r"policy\.far: got -1\.0"),
        (bn.KeyPolicy(most=0), r"policy\.most: got 0"),
    ],
)
def test_policies_are_checked(policy, message):
    _, _, state, _, features = fitted()
    with pytest.raises(ValueError, match=message):
        care(state, features, policy)


def test_arguments_are_checked():
    _, params, state, *_ = fitted()
    with pytest.raises(ValueError, match="label: got 5"):
        bn.forget_class(params, state, CLASSES, np.zeros((1, CODEBOOKS, 1), int))
    with pytest.raises(ValueError, match="share: got 0"):
        bn.forget_class(params, state, 0, np.zeros((1, CODEBOOKS, 1), int), share=0)
    with pytest.raises(ValueError, match="spare: got 24"):
        bn.discrete_key_value_bottleneck(6, 2, codebooks=2, pairs=24, key_width=3, spare=24)
    with pytest.raises(ValueError, match="top_k: got 3"):
        bn.discrete_key_value_bottleneck(6, 2, codebooks=2, pairs=4, key_width=3, spare=2, top_k=3)
    with pytest.raises(ValueError, match="refresh_every: got -1"):
        cared_strategy(-1)
