"""Relative entropy coding against the posteriors it must follow, candidates and layouts against their definitions."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy import special, stats

from jaxcl import coding, gaussian, threefry
from jaxcl.continual.compilations import count_compilations
from jaxcl.gaussian import Gaussian

SEED = 11


# Candidates


@pytest.mark.core
def test_exact_normal_variables_are_quantiles_to_both_sides():
    magnitudes = np.unique(np.geomspace(1, 2**31 - 1, 50_000).astype(np.uint32))
    magnitudes = np.concatenate([[0], magnitudes, 2**31 - 1 - magnitudes[:1000]]).astype(np.uint32)
    upper = coding.exact_normal_of_word(magnitudes)
    assert upper.dtype == np.float32
    np.testing.assert_allclose(upper, -special.ndtri((magnitudes + 0.5) / 2**32), rtol=0, atol=5e-7)
    np.testing.assert_array_equal(coding.exact_normal_of_word(magnitudes + np.uint32(2**31)), -upper)


@pytest.mark.core
def test_exact_normal_variables_have_not_changed():
    """Files would decode to other weights: the sum is that of all versions since the first."""
    words = np.random.Generator(np.random.Philox(0)).integers(0, 2**32, 100_000, np.uint32)
    values = coding.exact_normal_of_word(words).astype("<f4")
    assert hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()[:16] == "3444f0cc6364b00a"
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == "58d2fa470885089d"


def test_a_machine_with_other_floats_is_refused(monkeypatch):
    from jaxcl.coding import candidates

    monkeypatch.setattr(candidates, "_ROOT_OF_TWO_PI", np.nextafter(2.5066282746310002, 3))
    candidates._table.cache_clear()
    with pytest.raises(RuntimeError, match="IEEE 754"):
        coding.exact_normal_of_word(np.zeros(1, np.uint32))
    candidates._table.cache_clear()


@pytest.mark.core
def test_candidates_are_those_that_the_encoder_sees():
    blocks, indices = np.arange(50, dtype=np.uint32), np.arange(50, dtype=np.uint32) ** 3
    for width in (1, 2, 7):
        found = coding.chosen_candidates(SEED, blocks, indices, width)
        assert found.shape == (50, width)
        for place in range(width):
            key = (jnp.full(50, SEED, jnp.uint32), jnp.asarray(blocks))
            words = threefry.threefry_2x32(key, (jnp.asarray(indices), jnp.full(50, place // 2, jnp.uint32)))
            assert_close(found[:, place], threefry.normal_of_word(words[place % 2]))


# Coders


def posterior(count, width, bits, raw=0.6):
    """M times the same posterior with a KL of so many bits from N(0, 1)."""
    prior = Gaussian(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    share = jnp.linspace(0, 1, width)[None]
    q = gaussian.mean_kl(jnp.full((1, width), raw), share, jnp.full(1, bits * math.log(2)), prior)
    return Gaussian(*(jnp.tile(leaf, (count, 1)) for leaf in q)), prior


def coded(coder, q, p, seed=SEED, key=0):
    """Indices, and the samples they stand for in units of q."""
    blocks = np.arange(len(q.mean), dtype=np.uint32)
    encoded = coder.encode(jax.random.key(key), seed, blocks, q, p)
    drawn = coding.chosen_candidates(seed, blocks, np.asarray(encoded.indices), q.mean.shape[1])
    return encoded, (drawn - np.asarray(q.mean)) / np.asarray(q.scale)


@pytest.mark.core
@pytest.mark.parametrize(("width", "bits", "count"), [(1, 1, 4000), (1, 6, 4000), (8, 1, 4000), (8, 4, 1500)])
def test_astar_samples_are_exact_and_cost_what_theory_says(width, bits, count, tmp_path):
    q, p = posterior(count, width, bits)
    encoded, samples = coded(coding.astar(18), q, p)
    assert np.asarray(encoded.decided).all()
    assert stats.kstest(samples[:, 0], "norm").pvalue > 0.01
    assert stats.kstest((samples**2).sum(axis=1), stats.chi2(width).cdf).pvalue > 0.01
    layout = coding.layout_of({"w": jnp.zeros((count, width))}, width=width, seed=SEED)
    size = coding.save(tmp_path / "w.jcl", coding.Message(layout, np.ones(1, np.float32), 18, encoded.indices, bits))
    assert 8 * size / count < bits + math.log2(bits + 1) + 5


@pytest.mark.parametrize("coder", [coding.mrc, coding.orc])
def test_the_bias_of_importance_sampling_shrinks_with_bits(coder):
    q, p = posterior(4000, 4, 4)
    spread = [np.std(coded(coder(bits), q, p)[1]) for bits in (3, 5, 9)]
    assert spread[0] - 1 > 0.1 and spread[0] - 1 > 2 * (spread[1] - 1) > 4 * abs(spread[2] - 1)
    encoded, samples = coded(coder(10), q, p)
    assert np.asarray(encoded.decided).all()
    assert stats.kstest(samples[:, 0], "norm").pvalue > 0.01


def test_ordered_indices_are_lower_for_the_same_samples():
    q, p = posterior(4000, 4, 4)
    (plain, of_plain), (ordered, of_ordered) = (coded(coder(7), q, p) for coder in (coding.mrc, coding.orc))
    assert stats.ks_2samp(of_plain[:, 0], of_ordered[:, 0]).pvalue > 0.01
    low, uniform = (np.mean(np.log2(np.asarray(encoded.indices) + 1.0)) for encoded in (ordered, plain))
    assert low < uniform - 1


def test_diagnostics_are_those_of_the_weights():
    q, p = posterior(6, 3, 3)
    encoded, _ = coded(coding.mrc(8), q, p)
    for block in range(6):
        z = coding.chosen_candidates(SEED, np.full(256, block), np.arange(256), 3)
        weights = np.exp(
            np.sum(stats.norm(q.mean[block], q.scale[block]).logpdf(z) - stats.norm(0, 1).logpdf(z), axis=1)
        )
        assert_close(encoded.effective_sample_size[block], weights.sum() ** 2 / (weights**2).sum(), 1e-3)
        assert_close(encoded.log_normaliser[block], np.log(weights.mean()), 1e-3)


def test_a_block_that_is_the_prior_takes_the_first_candidates():
    q = Gaussian(jnp.zeros((3, 5)), jnp.full((3, 5), 2.0))
    encoded = coding.astar(10).encode(jax.random.key(0), SEED, np.arange(3), q, Gaussian(jnp.zeros(5), q.scale))
    np.testing.assert_array_equal(encoded.indices, 0)
    assert np.asarray(encoded.decided).all()


def test_what_cannot_be_decided_is_told():
    q, p = posterior(8, 4, 16)
    assert not np.asarray(coded(coding.astar(4), q, p)[0].decided).any()
    wide = Gaussian(q.mean, jnp.full((8, 4), 1.5))  # weights have no largest one
    assert not np.asarray(coded(coding.astar(6), wide, p)[0].decided).any()


def test_chunks_do_not_matter(monkeypatch):
    """More candidates than one chunk holds: the winner is the best of all chunks."""
    from jaxcl.coding import coders

    q, p = posterior(16, 4, 12)
    monkeypatch.setattr(coders, "_CHUNK", 256)
    small = coding.mrc(12).encode(jax.random.key(0), SEED, np.arange(16), q, p)
    z = coding.chosen_candidates(SEED, np.full(4096, 5), np.arange(4096), 4)
    weights = stats.norm(q.mean[5], q.scale[5]).logpdf(z).sum(axis=1) - stats.norm(0, 1).logpdf(z).sum(axis=1)
    assert_close(small.log_normaliser[5], special.logsumexp(weights) - np.log(4096), 1e-3)
    chosen = weights[np.asarray(small.indices)[5]]
    assert chosen > np.sort(weights)[-200]  # one of 4,096 with nearly all the weight


@pytest.mark.parametrize("coder", [coding.mrc(8), coding.orc(8), coding.astar(12)])
def test_what_comes_of_a_block_depends_on_no_other(coder, monkeypatch):
    from jaxcl.coding import coders

    monkeypatch.setattr(coders, "_CHUNK", 800)
    q, p = posterior(12, 4, 5)
    whole = coder.encode(jax.random.key(0), SEED, np.arange(12), q, p)  # 256 candidates in four chunks, or in one
    some = np.asarray([9, 2, 5])
    part = coder.encode(jax.random.key(0), SEED, some, Gaussian(*(leaf[some] for leaf in q)), p)
    np.testing.assert_array_equal(part.indices, np.asarray(whole.indices)[some])


def test_the_senders_own_randomness_decides():
    """Of `mrc`, that is: where arrivals are in order, all but the first ones come at nearly the same times anyway."""
    q, p = posterior(50, 4, 5)
    first, second = (coding.mrc(8).encode(jax.random.key(key), SEED, np.arange(50), q, p).indices for key in range(2))
    assert (np.asarray(first) != np.asarray(second)).mean() > 0.2


@pytest.mark.parametrize(("bits", "message"), [(0, "bits: got 0; pass a number from 1 to 30"), (31, "bits: got 31")])
def test_bits_are_checked(bits, message):
    for coder in (coding.mrc, coding.orc, coding.astar):
        with pytest.raises(ValueError, match=message):
            coder(bits)


def test_what_has_seen_all_candidates_is_decided():
    q, p = posterior(8, 4, 3)
    wide = Gaussian(q.mean, jnp.full((8, 4), 1.5))
    for coder in (coding.mrc(4), coding.orc(4)):
        assert np.asarray(coded(coder, wide, p)[0].decided).all()


@pytest.mark.core
@pytest.mark.parametrize("coder", [coding.mrc(6), coding.orc(6), coding.astar(8)])
def test_indices_are_the_same_with_x64(coder):
    q, p = posterior(6, 3, 3)
    plain = coded(coder, q, p)[0].indices
    with jax.enable_x64(True):
        np.testing.assert_array_equal(coded(coder, q, p)[0].indices, plain)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_words(seed):
    q, p = posterior(1, 2, 3)
    with pytest.raises(ValueError, match=f"seed: got {seed}; pass a number from 0 to 4294967295"):
        coding.mrc(4).encode(jax.random.key(0), seed, np.zeros(1, np.uint32), q, p)


@pytest.mark.parametrize("blocks", [0, 1, 2, 4])
def test_there_is_a_block_for_each_row_of_means(blocks):
    q, p = posterior(3, 4, 3)
    with pytest.raises(ValueError, match=rf"blocks: got {blocks} for means of shape \(3, 4\)"):
        coding.mrc(4).encode(jax.random.key(0), 0, np.arange(blocks), q, p)


def test_coders_of_as_many_bits_share_a_compilation_and_narrow_posteriors_are_coded():
    q, p = posterior(3, 4, 3)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (q, p))
    with count_compilations(("_race",)) as compilations:
        for of in ((q, p), (q, p), narrow):
            encoded = coding.orc(5).encode(jax.random.key(0), 0, np.arange(3), *of)
    assert compilations["_race"] == 2 and encoded.effective_sample_size.dtype == jnp.float32


def test_means_must_be_blocks():
    with pytest.raises(ValueError, match=r"q\.mean: got shape"):
        coding.mrc(4).encode(
            jax.random.key(0), 0, np.arange(3), Gaussian(jnp.zeros(3), jnp.ones(3)), Gaussian(0.0, 1.0)
        )


@pytest.mark.core
def test_blocks_are_coded_alike_on_many_devices():
    q, p = posterior(16, 4, 6)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), ("blocks",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("blocks"))
    blocks = np.arange(16, dtype=np.uint32)
    for coder in (coding.mrc(8), coding.astar(14)):
        alone = coder.encode(jax.random.key(3), SEED, blocks, q, p)
        spread = coder.encode(
            jax.random.key(3), SEED, jax.device_put(blocks, split), Gaussian(*(jax.device_put(x, split) for x in q)), p
        )
        np.testing.assert_array_equal(alone.indices, spread.indices)


# Layouts

PARAMS = {"params": {"Dense_0": {"kernel": jnp.zeros((6, 5)), "bias": jnp.zeros(5)}, "scalar": jnp.zeros(())}}
KERNEL = "params/Dense_0/kernel"


def test_each_value_has_a_place_of_its_own_and_serves_equally_many_weights():
    layout = coding.layout_of(PARAMS, width=4, seed=SEED, values={KERNEL: 7})
    assert layout.blocks == 4 and layout.weights == 36  # 7 + 5 + 1 values
    places = coding.places(layout)
    found = {path: np.unique(place, return_counts=True) for path, place in places.of_weights.items()}
    taken = np.concatenate([own for own, _ in found.values()])
    assert len(np.unique(taken)) == len(taken) == 13 and taken.min() >= 0 and taken.max() < 16
    assert [len(own) for own, _ in found.values()] == [5, 7, 1]
    assert set(found[KERNEL][1]) == {4, 5}
    for number, leaf in enumerate(layout.leaves):
        assert (places.leaf.ravel()[places.of_weights[leaf.path]] == number).all()
    assert not np.array_equal(places.of_weights[KERNEL], coding.places(layout._replace(seed=1)).of_weights[KERNEL])


def test_trees_of_values_have_the_networks_structure_and_gradients():
    layout = coding.layout_of(PARAMS, width=4, values={KERNEL: 7})
    of_weights = coding.places(layout).of_weights
    values = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)), jnp.float32)
    tree = coding.tree_of_values(of_weights, values)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, PARAMS)
    gradient = jax.grad(lambda v: jnp.sum(coding.tree_of_values(of_weights, v)["params"]["Dense_0"]["kernel"]))(values)
    expected = np.bincount(of_weights[KERNEL].ravel(), minlength=16).reshape(4, 4)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width: got 0"),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"values": {"params/kernel": 3}}, r"values: got paths \['params/kernel'\]; choose from"),
        ({"values": {KERNEL: 31}}, r"values\['params/Dense_0/kernel'\]: got 31; pass a number from 1 to 30"),
    ],
)
def test_layouts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        coding.layout_of(PARAMS, **{"width": 4} | arguments)


@pytest.mark.parametrize(
    "params",
    [
        {"mlp/~/linear_0": {"w": jnp.zeros(3)}}, {"a/b": jnp.zeros(3), "a": {"b": jnp.zeros(3)}}, [jnp.zeros(3)],
        {"a": (jnp.zeros(3), jnp.zeros(3))}, {"a\tb": jnp.zeros(3)}, {"a" * 2000: jnp.zeros(3)},
        {"count": jnp.int32(5)}, {"a": jnp.zeros((1,) * 33)},
    ],
)  # fmt: skip
def test_trees_that_could_not_be_given_back_are_refused(params):
    with pytest.raises(ValueError, match="params: got"):
        coding.layout_of(params, width=4)


def test_empty_leaves_are_refused():
    with pytest.raises(ValueError, match="leave out what has no weights"):
        coding.layout_of({"a": jnp.zeros((0, 3))}, width=4)
