"""Masks: what each method keeps and leaves free, that it is the same for ever, and scales of re-used weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import continual, masks, trees
from jaxcl.continual import Examples, streams

pytestmark = pytest.mark.core

WIDTH, HIDDEN, CLASSES, TASKS = 7, 21, 3, 4  # numbers of weights that no byte divides
STEPS = 8


def covers(path):
    return path.startswith("hidden") and path.endswith("kernel")


def network(params, x):
    for name in ("hidden_0", "hidden_1"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def network_params(key=0):
    def dense(key, inputs, outputs):
        return {"kernel": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "bias": jnp.zeros(outputs)}

    keys = jax.random.split(jax.random.key(key), 3)
    sizes = {"hidden_0": (WIDTH, HIDDEN), "hidden_1": (HIDDEN, HIDDEN), "head": (HIDDEN, CLASSES)}
    return {name: dense(key, *size) for key, (name, size) in zip(keys, sizes.items(), strict=True)}


METHODS = {
    "ib_masks": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0),
    "ib_masks, 8 bits": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0, scale_bits=8),
    "ib_masks, one scale": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0, scale_bits=0),
    "ib_masks, float scales": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0, scale_rule="authors"),
    "ib_masks, free ones anew": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0, redraw="free"),
    "ib_masks, no re-use": lambda: masks.ib_masks(covers, TASKS, log_variance=-4.0, reuse=False),
    "winning_subnetwork": lambda: masks.winning_subnetwork(covers, TASKS, sparsity=0.6),
    "packnet": lambda: masks.packnet(covers, TASKS, share=0.4, prune_after=STEPS // 2),
}
method_of = functools.cache(lambda name: METHODS[name]())


def trained(name, tx, *, tasks=TASKS):
    """What is trained and the state after each task, of steps that move everything that may move."""
    method = method_of(name)
    masked, state = method.init(jax.random.key(1), network_params())
    opt_state = tx.init(masked)
    traced = []  # each function once a compilation

    @jax.jit
    def step(key, masked, opt_state, state, task):
        traced.append("step")
        sample_key, data_key = jax.random.split(key)
        x = jax.random.normal(data_key, (32, WIDTH))
        labels = jnp.argmax(x[:, :CLASSES] + jnp.roll(x, task, axis=1)[:, :CLASSES], axis=1)

        def loss(masked):
            params, nats = method.sample(sample_key, masked, state)
            losses = optax.softmax_cross_entropy_with_integer_labels(network(params, x), labels)
            return losses.mean() + 1e-2 * nats / len(x)

        updates, opt_state = tx.update(jax.grad(loss)(masked), opt_state, masked)
        updates, new_state = method.protect(masked, updates, state)
        return optax.apply_updates(masked, updates), opt_state, new_state

    @jax.jit
    def commit(key, masked, state, task):
        traced.append("commit")
        return method.commit(key, masked, state, task)

    after = []
    for task in range(tasks):
        for number in range(STEPS):
            key = jax.random.fold_in(jax.random.key(task), number)
            masked, opt_state, state = step(key, masked, opt_state, state, task)
        before = masked, state
        masked, state = commit(jax.random.key(100 + task), masked, state, task)
        after.append((before, (masked, state)))
    assert sorted(traced) == ["commit", "step"]
    return after


RATES = masks.separate_rates(optax.adam(1e-2), optax.adam(0.3))
DECAYED = masks.separate_rates(optax.adamw(1e-2, weight_decay=0.1), optax.adamw(0.3, weight_decay=0.1))
results = functools.cache(lambda name: trained(name, RATES))


@pytest.mark.parametrize(
    ("name", "tx"),
    [pytest.param(name, RATES, id=name) for name in METHODS]
    + [pytest.param(name, DECAYED, id=f"{name}, adamw") for name in ("ib_masks", "winning_subnetwork", "packnet")],
)
def test_nothing_is_forgotten_to_the_last_bit(name, tx):
    """The logits of 1,000 inputs, as the task was committed and after each later one; all else has moved."""
    method = method_of(name)
    x = jax.random.normal(jax.random.key(5), (1000, WIDTH))
    traced = []

    @jax.jit
    def answer(masked, state, task):
        traced.append(task)
        return network(method.select(masked, state, task), x)

    after = results(name) if tx is RATES else trained(name, tx)
    for task in range(TASKS):
        first = np.asarray(answer(*after[task][1], task))
        for _, later in after[task + 1 :]:
            np.testing.assert_array_equal(np.asarray(answer(*later, task)), first)
    assert len(traced) == 1
    one, two = (after[task][1][0].weights for task in (0, TASKS - 1))
    for path, leaf in trees.leaves_by_path(one).items():
        assert np.any(leaf != trees.leaves_by_path(two)[path]), path


def masks_of(name):
    """By path, [T, ...]."""
    _, (_, state) = results(name)[-1]
    bank = method_of(name).bank(state)
    return bank, {path: np.stack([masks.task_mask(bank, path, task) for task in range(TASKS)]) for path in bank.owner}


@pytest.mark.parametrize("name", METHODS)
def test_owners_are_the_first_tasks_that_kept_a_weight(name):
    bank, of_tasks = masks_of(name)
    for path, kept in of_tasks.items():
        expected = np.where(kept.any(axis=0), kept.argmax(axis=0), masks.FREE)
        np.testing.assert_array_equal(bank.owner[path], expected)
        np.testing.assert_array_equal(masks.is_free(bank)[path], ~kept.any(axis=0))
        assert 0.05 < kept[0].mean() < 0.95 and kept.any(axis=0).mean() > kept[0].mean()


@pytest.mark.parametrize("name", ["ib_masks", "packnet"])
def test_usage_and_overlap_are_counted(name):
    bank, of_tasks = masks_of(name)
    usage = masks.weight_usage(bank, TASKS)
    for path, kept in of_tasks.items():
        for task in range(TASKS):
            before = kept[:task].any(axis=0)
            shares = (kept[task] & ~before).mean(), (kept[task] & before).mean(), (~(before | kept[task])).mean()
            np.testing.assert_allclose(usage[path][task], shares)
    flat = np.concatenate([kept.reshape(TASKS, -1) for kept in of_tasks.values()], axis=1)
    overlap = masks.mask_overlap(bank, TASKS)
    for one in range(TASKS):
        for two in range(TASKS):
            assert overlap[one, two] == pytest.approx((flat[one] & flat[two]).sum() / (flat[one] | flat[two]).sum())
    assert masks.mask_overlap(begin()[1].bank, 2).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "wide"), [("bfloat16", False), ("float32", True)])
def test_weights_keep_their_type(name, kind, wide):
    with jax.enable_x64(wide):
        method, params = method_of(name), jax.tree.map(lambda leaf: leaf.astype(kind), network_params())
        masked, state = method.init(jax.random.key(0), params)
        for made in (
            jax.eval_shape(method.sample, jax.random.key(0), masked, state)[0],
            jax.eval_shape(method.current, masked, state),
            jax.eval_shape(method.select, masked, state, 0),
        ):
            assert jax.tree.map(lambda leaf: leaf.dtype, made) == jax.tree.map(lambda leaf: leaf.dtype, params)


def test_packnet_keeps_no_weight_that_does_nothing():
    method = masks.packnet(covers, 2, share=0.5, prune_after=1)
    masked, state = method.init(jax.random.key(0), network_params())
    masked, state = method.commit(jax.random.key(0), masked, state, 0)
    _, state = method.commit(jax.random.key(0), masked, state, 1)  # nothing was trained: what is free is 0
    bank = method.bank(state)
    for path in bank.owner:
        np.testing.assert_array_equal(masks.task_mask(bank, path, 1), masks.task_mask(bank, path, 0))


def test_packnet_begins_what_it_pruned_anew():
    _, (masked, state) = results("packnet")[0]
    weights = trees.leaves_by_path(masked.weights)
    for path, free in masks.is_free(state.bank).items():
        assert free.any() and not weights[path][free].any() and weights[path][~free].all()


def test_without_re_use_masks_are_disjoint():
    _, of_tasks = masks_of("ib_masks, no re-use")
    assert all((kept.sum(axis=0) <= 1).all() for kept in of_tasks.values())
    _, of_tasks = masks_of("ib_masks")
    assert all((kept.sum(axis=0) > 1).any() for kept in of_tasks.values())


@pytest.mark.parametrize("task", range(TASKS))
def test_a_committed_task_computes_what_its_means_say(task):
    """Masked weights times their means: folded into those newly claimed, and within a 256th for those re-used."""
    method = method_of("ib_masks, 8 bits")
    (masked, state), (after, state_after) = results("ib_masks, 8 bits")[task]
    selected = trees.leaves_by_path(method.select(after, state_after, task))
    for path, noise in masked.scores.items():
        kept = np.asarray(masks.log_alpha(noise) < 0)
        np.testing.assert_array_equal(masks.task_mask(state_after.bank, path, task), kept)
        expected = np.where(kept, trees.leaves_by_path(masked.weights)[path] * noise.mean, 0)
        free = np.asarray(masks.is_free(state.bank)[path])
        np.testing.assert_array_equal(np.asarray(selected[path])[free], expected[free])
        span = np.ptp(np.asarray(noise.mean)[kept & ~free]) if (kept & ~free).any() else 0
        weight = np.abs(trees.leaves_by_path(masked.weights)[path])
        assert (np.abs(selected[path] - expected) <= weight * span / 2**7 + 1e-7).all()
    for path, own in trees.leaves_by_path(masked.weights).items():
        if path not in masked.scores:
            np.testing.assert_array_equal(selected[path], own)


def test_folding_leaves_the_noise_of_the_product_as_it_was():
    (masked, _), (after, state_after) = results("ib_masks, free ones anew")[0]
    for path, noise in masked.scores.items():
        claimed = np.asarray(state_after.bank.owner[path] == 0)
        old, new = (trees.leaves_by_path(part.weights)[path] for part in (masked, after))
        deviation = np.abs(old) * np.exp(noise.log_variance / 2)
        folded = np.abs(new) * np.exp(after.scores[path].log_variance / 2)
        assert_close(np.where(claimed, folded, 0), np.where(claimed, deviation, 0))
        np.testing.assert_array_equal(np.asarray(after.scores[path].mean)[claimed], 1)
        np.testing.assert_array_equal(np.asarray(new)[~claimed], np.asarray(old)[~claimed])


def test_what_a_task_keeps_in_nats_and_its_ratios_are_recorded():
    for task, ((masked, state), (_, after)) in enumerate(results("ib_masks")):
        for path, own in masked.scores.items():
            kept = np.asarray(masks.log_alpha(own) < 0)
            nats = 0.5 * np.log1p(np.asarray(own.mean)[kept] ** 2 / np.exp(np.asarray(own.log_variance)[kept]))
            assert_close(after.committed.information[path][task], nats.sum(), 1e-4)
            assert after.committed.ratios[path][task] == state.ratios[path]


@pytest.mark.parametrize("redraw", ["free", "all", "none"])
def test_noise_is_drawn_anew_as_told(redraw):
    method = masks.ib_masks(covers, 2, redraw=redraw)
    masked, state = method.init(jax.random.key(0), network_params())
    scores = jax.tree.map(
        lambda leaf: jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) % 3 > 0, leaf, 40.0), masked.scores
    )
    scores = {
        path: masks.Noise(jnp.where(noise.mean == 40, 0.0, 2.0), noise.log_variance) for path, noise in scores.items()
    }
    after, state = method.commit(jax.random.key(1), masked._replace(scores=scores), state, 0)
    for path, free in masks.is_free(state.bank).items():
        assert 0.3 < free.mean() < 0.4
        anew = np.abs(after.scores[path].mean - 1) < 0.1
        drawn = anew & (np.asarray(after.scores[path].mean) != 1)  # a folded mean is 1 to the bit
        expected = {"free": free, "all": jnp.ones_like(free), "none": jnp.zeros_like(free)}[redraw]
        assert (drawn != expected).mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_scales_have_little_error(bits):
    """No more than even steps over the range have, and what is not re-used has no part in it."""
    rng = np.random.default_rng(bits)
    mean = rng.normal(1, 0.2, 1001).astype(np.float32)
    reused = rng.random(1001) < 0.7
    mean[~reused] = 1e6
    rule = masks.folded_scales(bits)
    _, _, kept = rule.settle(
        jnp.ones(1001), masks.Noise(jnp.asarray(mean), jnp.zeros(1001)), ~reused, jnp.asarray(reused)
    )
    assert kept.levels.shape == (2**bits,) and kept.codes.shape == (-(-bits * 1001 // 8),)
    assert (np.diff(kept.levels) >= 0).all()
    read = np.asarray(rule.read(kept, jnp.asarray(reused)))
    np.testing.assert_array_equal(read[~reused], 1)
    error = np.mean((read[reused] - mean[reused]) ** 2)
    step = np.ptp(mean[reused]) / 2**bits
    even = mean[reused].min() + step * (np.floor((mean[reused] - mean[reused].min()) / step).clip(0, 2**bits - 1) + 0.5)
    assert error < 0.9 * np.mean((even - mean[reused]) ** 2)
    assert len(np.unique(read[reused])) <= 2**bits


@pytest.mark.parametrize("bits", [0, 3])
def test_scales_of_millions_are_not_lost_in_their_sum(bits):
    """A float32 that has come to 2^21 takes in steps of a quarter only."""
    mean = np.random.default_rng(bits).normal(1.05, 0.02, 2**22).astype(np.float32)
    all_of_them = jnp.ones(mean.shape, bool)
    rule = masks.folded_scales(bits)
    _, _, kept = rule.settle(jnp.ones(mean.shape), masks.Noise(jnp.asarray(mean), jnp.zeros(mean.shape)), ~all_of_them,
                             all_of_them)  # fmt: skip
    error = np.asarray(rule.read(kept, all_of_them), np.float64) - mean
    assert abs(error.mean()) < 1e-4
    assert error.std() < (0.0045 if bits else 0.0201)


@pytest.mark.parametrize("rule", ["folded", "authors"])
def test_what_a_task_has_now_is_what_it_keeps(rule):
    method = masks.ib_masks(covers, 2, log_variance=-2.0, scale_rule=rule)
    masked, state = method.init(jax.random.key(0), network_params())
    now = method.current(masked, state)
    assert any(
        bool(jnp.any(leaf != other)) for leaf, other in zip(*map(jax.tree.leaves, (now, masked.weights)), strict=True)
    )
    after = method.select(*method.commit(jax.random.key(1), masked, state, 0), 0)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-6), now, after)


def test_tasks_in_any_order_have_their_own_scales():
    method = masks.ib_masks(covers, 2, log_variance=-4.0)
    masked, state = method.init(jax.random.key(0), network_params())
    masked, state = method.commit(jax.random.key(1), masked, state, 1)
    scores = {path: noise._replace(mean=3 * jnp.ones_like(noise.mean)) for path, noise in masked.scores.items()}
    masked = masked._replace(scores=scores)
    now = method.current(masked, state)
    after = method.select(*method.commit(jax.random.key(1), masked, state, 0), 0)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5), now, after)


def test_a_task_of_packnet_uses_all_before_it_and_its_share_of_the_free():
    method = masks.packnet(covers, 3, share=[0.5, 0.25, 1.0], prune_after=1)
    masked, state = method.init(jax.random.key(0), network_params())
    weights = {path: np.asarray(leaf) for path, leaf in trees.leaves_by_path(masked.weights).items() if covers(path)}
    free = {path: np.ones(leaf.shape, bool) for path, leaf in weights.items()}
    trained = masked  # in each task, to the same weights
    for task, share in enumerate((0.5, 0.25, 1.0)):
        _, state = method.commit(jax.random.key(0), trained, state, task)
        for path, leaf in weights.items():
            keep = int(np.ceil(np.float32(share) * free[path].sum()))
            strength = np.sort(np.abs(leaf[free[path]]))[::-1]
            claimed = free[path] & (np.abs(leaf) >= strength[keep - 1])
            free[path] &= ~claimed
            np.testing.assert_array_equal(masks.task_mask(state.bank, path, task), ~free[path])
    assert not any(mask.any() for mask in free.values())


def test_packnet_prunes_after_its_steps():
    method = method_of("packnet")
    (_, state), _ = results("packnet")[0]
    assert int(state.steps) == STEPS
    for chosen in state.chosen.values():
        assert chosen.mean() == pytest.approx(0.4, abs=0.01)
    masked, fresh = method.init(jax.random.key(0), network_params())
    updates = jax.tree.map(jnp.ones_like, masked)
    for number in range(STEPS):
        _, fresh = method.protect(masked, updates, fresh)
        assert all(bool(chosen.all()) == (number + 1 < STEPS // 2) for chosen in fresh.chosen.values())


@pytest.mark.parametrize("shape", [(1,), (40,), (999,)])
def test_the_kth_smallest_is_that_of_sorting(shape):
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(shape)).astype(np.float32)
    values[: len(values) // 3] = 0.5
    values[len(values) // 2 :: 7] = 0
    values[len(values) // 2 + 1 :: 7] = -0.0
    values[-1:] = np.inf
    expected = np.sort(values)
    for k in {1, 2, len(values) // 2 + 1, len(values)}:
        if k <= len(values):
            assert masks.kth_smallest(jnp.asarray(values), k) == expected[k - 1]
    assert np.isnan(masks.kth_smallest(jnp.asarray(values), len(values) + 1))


def test_ratios_are_measured_for_the_layers_that_are_named():
    _, state = method_of("ib_masks").init(jax.random.key(0), network_params())
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((50, 1)) @ rng.standard_normal((1, HIDDEN))  # one component explains it all
    state = masks.refresh_ratios(state, {"hidden_0/kernel": jnp.asarray(flat + 1e-4, jnp.float32)})
    assert float(state.ratios["hidden_0/kernel"]) == 0 and float(state.ratios["hidden_1/kernel"]) == 1
    full = rng.standard_normal((4000, 2, HIDDEN)).astype(np.float32)
    assert float(masks.decomposition_ratio(full)) == pytest.approx(20 / 21)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert float(masks.decomposition_ratio(jnp.asarray(full, dtype))) == pytest.approx(20 / 21)
    with pytest.raises(ValueError, match=r"features: got paths \['head'\]; choose from \['hidden_0/kernel'"):
        masks.refresh_ratios(state, {"head": full})


def begin(covers=covers, tasks=2, params=None):
    return masks.ib_masks(covers, tasks).init(jax.random.key(0), params or network_params())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: begin(tasks=0), "tasks: got 0"),
        (lambda: begin(lambda path: False), "covers: got no match"),
        (lambda: begin(params={"hidden/kernel": jnp.ones(3, int)}), "covers: got hidden/kernel of int32; only"),
        (lambda: masks.ib_masks(covers, 2, scale_bits=9), "scale_bits: got 9"),
        (lambda: masks.ib_masks(covers, 2, scale_rule="stored"), "scale_rule: got 'stored'"),
        (lambda: masks.ib_masks(covers, 2, redraw="some"), "redraw: got 'some'"),
        (lambda: masks.winning_subnetwork(covers, 2, sparsity=1.0), r"sparsity: got 1\.0"),
        (lambda: masks.packnet(covers, 2, share=0.0, prune_after=1), r"share: got 0\.0"),
        (
            lambda: masks.packnet(covers, 2, share=[0.5], prune_after=1),
            "share: got 1 of them; pass one, or one for each",
        ),
        (lambda: masks.packnet(covers, 2, share=0.5, prune_after=0), "prune_after: got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In a stream


def permuted_stream():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((260, WIDTH)).astype(np.float32)
    labels = np.argmax(inputs[:, :CLASSES], axis=1).astype(np.int32)
    train, test = Examples(inputs[:200], labels[:200]), Examples(inputs[200:], labels[200:])
    return streams.permuted(jax.random.key(0), train, test, tasks=3)._replace(task_known=True)


def hidden_features(params, x):
    first = x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    return {"hidden_0/kernel": first, "hidden_1/kernel": jnp.tanh(first) @ params["hidden_1"]["kernel"]}


@pytest.mark.parametrize("name", ["ib_masks", "winning_subnetwork", "packnet"])
def test_a_stream_is_learned_without_forgetting_in_one_compilation(name):
    method = method_of(name)
    measured = {"features": hidden_features, "refresh_every": 10} if name == "ib_masks" else {}
    strategy = continual.masked_network(method, network, penalty_weight=1e-3, **measured)
    masked, _ = method.init(jax.random.key(1), network_params())
    tx = masks.separate_rates(optax.adam(1e-2), optax.adam(3e-2))
    result = continual.run(
        jax.random.key(2), strategy, tx, masked, permuted_stream(), epochs=30, batch_size=20, steps_per_call=10
    )
    for task in range(3):
        np.testing.assert_array_equal(result.accuracy[task:, task], result.accuracy[task, task])
        assert result.accuracy[task, task] > 0.75
    assert all(count == 1 for count in result.compilations.values())
    assert int(result.strategy_state.committed) == 3
    if measured:
        ratios = result.strategy_state.of_method.ratios
        assert all(0 < float(ratio) < 1 for ratio in ratios.values())


def test_a_task_that_is_not_told_is_an_error():
    strategy = continual.masked_network(method_of("packnet"), network)
    masked, _ = method_of("packnet").init(jax.random.key(1), network_params())
    with pytest.raises(ValueError, match="task: got None; masks go by task"):
        continual.run(
            jax.random.key(2), strategy, RATES, masked, permuted_stream()._replace(task_known=False),
            epochs=1, batch_size=20,
        )  # fmt: skip
    with pytest.raises(ValueError, match="refresh_every: got 3; pass features"):
        continual.masked_network(method_of("ib_masks"), network, refresh_every=3)
