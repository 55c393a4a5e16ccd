"""The strategy that trains a bottleneck's values on cached indices: the authors' steps, and the dense rule.

The dense rule is plain automatic differentiation of the vote in the whole table of values, clipped by this file's
`clip` and followed by `optax.sgd`: what PyTorch does, and the authors with it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, both_ways, golden, steps_of

from jaxcl import bottleneck as bn
from jaxcl import nets, quantize, trees
from jaxcl.continual import (
    Batch,
    Examples,
    key_value_bottleneck,
    linear_probe,
    metrics,
    naive,
    run,
    run_seeds,
    streams,
)

KEY = jax.random.key(0)


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def clip(max_norm):
    """PyTorch's clipping: scales by min(1, max_norm / (norm + 1e-6)), the norm over all leaves."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1, max_norm / (norm_of(updates) + 1e-6))
        return jax.tree.map(lambda update: factor * update, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def dense_descent(learning_rate, max_norm=None, momentum=0.0):
    first = optax.identity() if max_norm is None else clip(max_norm)
    return optax.chain(first, optax.sgd(learning_rate, momentum=momentum or None))


def dense_strategy(made, label_smoothing=0.1):
    """The vote as any other network, its gradient dense."""
    return naive(lambda params, indices: bn.vote(made.read(params, indices)), label_smoothing=label_smoothing)


def batch_of(indices, labels, classes):
    rows = len(labels)
    return Batch(indices, labels, np.ones(rows, np.float32), np.ones((rows, classes), bool), np.int32(0))


def one_step(strategy, tx, params, opt_state, state, batch):
    """What the loop does with a batch, and its gradients and metrics."""
    grads, metrics = strategy.gradients(KEY, params, state, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    updates, state = strategy.after_update(KEY, params, state, batch, grads, updates)
    return trees.apply_updates(params, updates), opt_state, state, grads, metrics


# Goldens


def recorded_case(name):
    """File, its options, and a bottleneck whose heads are the recorded ones, laid side by side in the feature."""
    recorded, meta = golden(name)
    sizes = {"codebooks": meta["num_codebooks"], "pairs": meta["num_pairs"], "key_width": meta["dim_keys"]}
    width = meta["num_codebooks"] * meta["dim_keys"]
    made = bn.discrete_key_value_bottleneck(
        width, meta["dim_values"], top_k=meta["topk"], projection="chunk", **sizes
    )  # fmt: skip
    keys, unused = recorded["keys"], np.zeros((meta["num_codebooks"], meta["num_pairs"]), np.int32)
    averages = quantize.EMAState(keys, np.zeros(keys.shape[:2]), np.zeros(keys.shape))
    return recorded, meta, made, bn.KeyState(None, averages, np.ones_like(unused, bool), unused)


def check_step(recorded, step, found):
    """Loss, gradient and its norm before clipping, and values after the step; logits are those before it."""
    for name in ("logits", "loss", "grad_values", "values"):
        assert_close(found[name], recorded[f"{name}_{step}"])
    assert_close(np.linalg.norm(found["grad_values"]), recorded[f"grad_norm_{step}"])


@pytest.mark.core
@both_ways
@pytest.mark.parametrize("name", ["dkvb_train_top1", "dkvb_clip_active", "dkvb_train_top3"])
def test_training_is_the_authors(name, wrap):
    """Three recorded steps (the first in plain calls) from features to values; and counts of use.

    The last case has two positions an example, whose votes are averaged.
    """
    recorded, meta, made, state = recorded_case(name)
    strategy = key_value_bottleneck(made, label_smoothing=meta["label_smoothing"])
    tx = bn.sparse_sgd(meta["lr"], max_norm=meta["clip"])

    def step(params, state, features, labels):
        indices = made.lookup(params, state, features)
        logits = strategy.predict(params, (), indices, None)
        after, _, _, grads, metrics = one_step(
            strategy, tx, params, (), (), batch_of(indices, labels, meta["dim_values"])
        )
        found = {
            "logits": logits,
            "loss": metrics["loss"],
            "grad_values": trees.add_rows(jnp.zeros_like(params["values"]), grads["values"]),
            "values": after["values"],
        }
        return after, made.count_usage(state, indices), found

    params, step = {"values": jnp.asarray(recorded["init_values"])}, wrap(step)
    for number in steps_of(wrap):
        heads = recorded["x"][number]  # [B, C, P, W]
        features = jnp.asarray(heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1))
        params, state, found = step(params, state, features, jnp.asarray(recorded["labels"][number]))
        check_step(recorded, number, found)
        np.testing.assert_array_equal(state.usage, recorded[f"counter_{number}"])
    clipped = [recorded[f"grad_norm_{number}"] > meta["clip"] for number in steps_of(wrap)]
    assert any(clipped) == (name == "dkvb_clip_active")


# Sparse equals dense


@functools.cache
def small(top_k=1, value_width=5):
    """Six codebooks of ten pairs, five classes: a batch of eight fetches most pairs twice and more."""
    return bn.discrete_key_value_bottleneck(4, value_width, codebooks=6, pairs=10, key_width=2, top_k=top_k)


def random_indices(rng, *leading, top_k):
    """Distinct pairs within an example's codebook, as a look-up gives them; [..., 6, top_k]."""
    return np.argsort(rng.random((*leading, 6, 10)), axis=-1)[..., :top_k].astype(np.int32)


def all_pairs(top_k):
    """Indices [60, 6, top_k]: each pair in turn, with the first pairs of the other codebooks."""
    indices = np.tile(np.arange(top_k), (6, 10, 6, 1))
    for codebook in range(6):
        indices[codebook, :, codebook] = (np.arange(10)[:, None] + np.arange(top_k)) % 10
    return indices.reshape(60, 6, top_k)


def effective_values(params, state, momentum):
    """The values as of now, by NumPy from what the strategy keeps.

    The table holds where each value would come to rest, q = p + mu w / (1 - mu); w has decayed by mu a step since the
    pair was last fetched.
    """
    values = np.asarray(params["values"], np.float64)
    if not momentum:
        return values
    age = np.asarray(state.step) - np.asarray(state.touched)
    velocity = np.asarray(state.velocity, np.float64) * momentum ** age[..., None].astype(np.float64)
    return values - momentum / (1 - momentum) * velocity


def size_of(gradient):
    """The norm of a dense gradient; of a sparse one the sum of its examples' norms.

    The sum is never less, and is the bound that spares `sparse_sgd` the norm.
    """
    if trees.is_rows(gradient):
        return jax.vmap(norm_of)(gradient.values).sum()
    return norm_of(gradient)


def many_steps(strategy, tx, params, batches):
    """All batches in one scan: parameters and state at the end, and the losses and gradient sizes on the way."""

    def step(carry, batch):
        *carry, grads, metrics = one_step(strategy, tx, *carry, batch)
        return tuple(carry), (metrics["loss"], size_of(grads["values"]))

    carry = params, tx.init(params), strategy.init(KEY, params, jax.tree.map(lambda leaf: leaf[0], batches))
    (params, _, state), (losses, sizes) = jax.lax.scan(step, carry, batches)
    return params, state, losses, sizes


@functools.partial(jax.jit, static_argnames=("kind", "top_k", "momentum"))
def train(kind, top_k, momentum, max_norm, params, batches):
    """`many_steps` with the sparse or the dense rule; compiled once for all values of max_norm but None."""
    if kind == "sparse":
        strategy = key_value_bottleneck(small(top_k), momentum=momentum)
        return many_steps(strategy, bn.sparse_sgd(0.5, max_norm=max_norm), params, batches)
    return many_steps(dense_strategy(small(top_k)), dense_descent(0.5, max_norm, momentum), params, batches)


@functools.cache
def random_training(top_k):
    """200 batches, some of their rows only filling up, and values to start from."""
    rng = np.random.default_rng(top_k)
    weights = (rng.random((200, 8)) < 0.9).astype(np.float32)
    batches = Batch(
        random_indices(rng, 200, 8, top_k=top_k), rng.integers(5, size=(200, 8)), weights,
        np.ones((200, 8, 5), bool), np.zeros(200, np.int32),
    )  # fmt: skip
    return {"values": 0.1 * rng.standard_normal((6, 10, 5), np.float32)}, batches


# For top_k 1 and 3; which norms these clips are above or below is asserted in the test.
CLIPS = {
    "none": (None, None),
    "far": (10.0, 10.0),
    "near": (0.3, 0.5),
    "sometimes": (0.13, 0.22),
    "always": (0.05, 0.05),
}


@pytest.mark.core
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clipping", CLIPS)
def test_sparse_steps_are_the_dense_rule(top_k, momentum, clipping):
    """200 random batches: losses on the way, and all values and votes at the end, to 1e-6.

    Clipping is off; or never active, with the bound of the norm under the clip ("far") or above it ("near"); or active
    in some steps; or in all.
    """
    max_norm, case = CLIPS[clipping][top_k // 2], random_training(top_k)
    expected, _, losses, norms = jax.device_get(train("dense", top_k, momentum, max_norm, *case))
    found, state, sparse_losses, bounds = jax.device_get(train("sparse", top_k, momentum, max_norm, *case))
    if max_norm is not None:
        low, high = {"far": (0, 0), "near": (0, 0), "sometimes": (0.1, 0.9), "always": (1, 1)}[clipping]
        assert low <= (norms > max_norm).mean() <= high, np.quantile(norms, [0, 0.5, 1])
        assert (
            (bounds > max_norm).mean() > 0.5 if clipping == "near" else (bounds < max_norm).all() == (clipping == "far")
        )
    assert_close(sparse_losses, losses, 1e-6)
    assert_close(effective_values(found, state, momentum), expected["values"], 1e-6)
    strategy, pairs = key_value_bottleneck(small(top_k), momentum=momentum), all_pairs(top_k)
    votes = jax.jit(strategy.predict)(found, state, pairs, None)
    expected_votes = expected["values"][np.arange(6)[:, None], pairs].sum(axis=2).mean(axis=1)
    assert_close(votes, expected_votes, 1e-6)


def test_values_wider_than_the_classes_are_padding():
    """With eight columns and five classes, the first five learn as alone; the others stay zero, to the last bit."""
    rng = np.random.default_rng(0)
    batches = Batch(
        random_indices(rng, 20, 8, top_k=1), rng.integers(5, size=(20, 8)), np.ones((20, 8), np.float32),
        np.ones((20, 8, 5), bool), np.zeros(20, np.int32),
    )  # fmt: skip
    found, tx = {}, bn.sparse_sgd(0.5, max_norm=0.3)
    for width, classes in ((5, None), (8, 5)):
        strategy = key_value_bottleneck(small(1, width), classes=classes, momentum=0.5)
        start = {"values": np.zeros((6, 10, width), np.float32)}
        steps = functools.partial(many_steps, strategy, tx)
        found[width], state, _, _ = jax.jit(steps)(start, batches)
        assert jax.eval_shape(strategy.predict, found[width], state, all_pairs(1), None).shape == (60, 5)
    wide, alone = found[8]["values"], found[5]["values"]
    assert_close(wide[..., :5], alone, 1e-6)
    assert not wide[..., 5:].any()


def test_positions_that_fetch_the_same_pair_add_up_before_the_norm_is_clipped():
    """Nine positions of each example fetch the same pairs: the norm is nine times one position's, not three times."""
    rng = np.random.default_rng(0)
    indices = np.repeat(random_indices(rng, 2, 1, top_k=1), 9, axis=1)
    batch, params = batch_of(indices, np.array([1, 3]), 5), {"values": jnp.zeros((6, 10, 5))}
    grads, _ = key_value_bottleneck(small()).gradients(KEY, params, (), batch)
    dense = trees.add_rows(jnp.zeros((6, 10, 5)), grads["values"])
    max_norm = 0.8 * float(norm_of(dense))
    assert float(norm_of(grads["values"].values)) < max_norm
    updates, _ = bn.sparse_sgd(1.0, max_norm=max_norm).update(grads, optax.EmptyState())
    found = trees.add_rows(jnp.zeros((6, 10, 5)), updates["values"])
    assert_close(found, -dense * max_norm / (norm_of(dense) + 1e-6), 1e-6)


def wide_params(decoder):
    """Values of width 3, drawn, behind a decoder to five classes."""
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.standard_normal((6, 10, 3)), jnp.float32)
    return {"values": values, "decoder": decoder.init(KEY, jnp.zeros((1, 6, 2, 3)))}


@pytest.mark.parametrize("train_decoder", [False, True])
@pytest.mark.parametrize("hidden", [(), (7,)])
def test_a_decoder_is_the_dense_rule(hidden, train_decoder):
    """40 clipped steps, linear and with a hidden layer; a decoder that is not trained stays to the last bit."""
    rng = np.random.default_rng(1)
    decoder, made = nets.MLP(hidden, 5), small(2, 3)
    batches = Batch(
        random_indices(rng, 40, 8, top_k=2), rng.integers(5, size=(40, 8)), np.ones((40, 8), np.float32),
        np.ones((40, 8, 5), bool), np.zeros(40, np.int32),
    )  # fmt: skip
    start = wide_params(decoder)

    def logits(params, indices):
        learned = params["decoder"] if train_decoder else jax.lax.stop_gradient(params["decoder"])
        return decoder.apply(learned, made.read(params, indices))

    ours = key_value_bottleneck(made, decoder=decoder.apply, train_decoder=train_decoder)
    found, state, losses, _ = jax.jit(
        functools.partial(many_steps, ours, bn.sparse_sgd(0.5, max_norm=0.15))
    )(start, batches)  # fmt: skip
    rule = naive(logits, label_smoothing=0.1)
    expected, _, dense_losses, norms = jax.jit(functools.partial(many_steps, rule, dense_descent(0.5, 0.15)))(
        start, batches
    )
    assert (norms > 0.15).any()
    assert_close(losses, dense_losses, 1e-5)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, expected)
    same = jax.tree.leaves(jax.tree.map(np.array_equal, found["decoder"], start["decoder"]))
    assert not any(same) if train_decoder else all(same)
    answers = ours.predict(found, state, batches.inputs[0], None)
    assert_close(answers, decoder.apply(found["decoder"], made.read(found, batches.inputs[0])), 1e-6)


# Whole runs


def cached_stream(seed, top_k, dtype=np.uint16):
    """Three tasks of two classes on random cached indices; tasks of unlike sizes, the last batches of eight ragged."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), [11, 15, 9, 4, 16, 14])
    shown = np.concatenate([labels, rng.integers(6, size=30), np.arange(6)])
    indices = random_indices(rng, len(shown), top_k=top_k).astype(dtype)
    train = Examples(indices[: len(labels)], labels)
    test = Examples(indices[len(labels) :], shown[len(labels) :])
    return streams.class_incremental(jax.random.key(seed), train, test, classes_per_task=2)


def train_on(stream, strategy, tx, values, **options):
    return run(KEY, strategy, tx, {"values": values}, stream, epochs=3, batch_size=8, **options)


@pytest.mark.parametrize(("top_k", "momentum", "steps_per_call"), [(1, 0.0, 1), (1, 0.9, 4), (3, 0.9, 1)])
def test_sparse_runs_are_dense_runs(top_k, momentum, steps_per_call):
    """Through the loop, over tasks with ragged batches: the same accuracies after each task and the same values."""
    made = small(top_k, 6)
    stream = cached_stream(0, top_k)
    values = jnp.asarray(np.random.default_rng(1).normal(size=(6, 10, 6)), jnp.float32)
    options = {"steps_per_call": steps_per_call}
    dense = train_on(stream, dense_strategy(made), dense_descent(1.0, 0.3, momentum), values, **options)
    sparse = train_on(
        stream, key_value_bottleneck(made, momentum=momentum), bn.sparse_sgd(1.0, max_norm=0.3), values, **options
    )
    np.testing.assert_array_equal(sparse.accuracy, dense.accuracy)
    np.testing.assert_array_equal(sparse.untrained, dense.untrained)
    assert len(np.unique(sparse.accuracy)) > 3
    for ours, theirs in zip(sparse.history, dense.history, strict=True):
        assert ours.keys() == theirs.keys()
        assert_close(list(ours.values()), list(theirs.values()), 1e-6)
    assert_close(effective_values(sparse.params, sparse.strategy_state, momentum), dense.params["values"], 1e-6)


def test_seeds_together_are_seeds_in_turn(one_core):
    """Two seeds with other examples, tasks of other lengths: some steps of a task are only one seed's."""
    made = small(1, 6)
    both = [cached_stream(seed, 1) for seed in (0, 1)]
    lengths = [[-(-len(part.rows) // 8) for part in stream.train_sets] for stream in both]
    assert lengths[0] != lengths[1]
    rng = np.random.default_rng(1)
    params = [{"values": jnp.asarray(rng.normal(size=(6, 10, 6)), jnp.float32)} for _ in both]
    strategy, tx = key_value_bottleneck(made, momentum=0.9), bn.sparse_sgd(1.0, max_norm=0.3)
    turn, together = (
        run_seeds(
            jax.random.split(KEY, 2), strategy, tx, params, both,
            epochs=2, batch_size=8, steps_per_call=3, together=together,
        )
        for together in (False, True)
    )  # fmt: skip
    for one, other in zip(together, turn, strict=True):
        np.testing.assert_array_equal(one.accuracy, other.accuracy)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-6), one.params, other.params)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-6), one.strategy_state, other.strategy_state)


def gaussian_clusters(rng, examples_per_class):
    """Ten classes in 16 dimensions, each a Gaussian cluster about its own centre, the same in each call."""
    centres = np.abs(np.random.default_rng(7).normal(size=(10, 16))) * 2
    labels = np.repeat(np.arange(10), examples_per_class)
    return Examples((centres[labels] + rng.normal(size=(len(labels), 16)) * 0.5).astype(np.float32), labels)


@pytest.mark.core
def test_classes_in_turn_are_kept_where_a_linear_probe_forgets():
    """Five tasks of two far-apart classes: by the method's claim all ten stay; a probe answers with the last two."""
    rng = np.random.default_rng(0)
    train, test = gaussian_clusters(rng, 40), gaussian_clusters(rng, 20)
    stream = streams.class_incremental(jax.random.key(1), train, test, classes_per_task=2)
    made = bn.discrete_key_value_bottleneck(16, 10, codebooks=12, pairs=40, key_width=4)
    params, state = made.init(KEY)
    for key in jax.random.split(KEY, 5):
        state = bn.fit_epoch(key, made, params, state, train.inputs, batch_size=100)
    lookup = jax.jit(made.lookup)
    cached = streams.map_inputs(stream, lambda features: lookup(params, state, features).astype(np.uint16))
    ours = run(
        KEY, key_value_bottleneck(made), bn.sparse_sgd(3.0, max_norm=1.0), params, cached, epochs=10, batch_size=16
    )
    probe = run(
        KEY, linear_probe(), optax.sgd(0.1), {"kernel": jnp.zeros((16, 10)), "bias": jnp.zeros(10)}, stream,
        epochs=10, batch_size=16,
    )  # fmt: skip
    assert metrics.average_accuracy(ours.accuracy) >= 0.95
    assert metrics.average_accuracy(probe.accuracy) <= 0.5
    assert metrics.learning_accuracy(probe.accuracy) >= 0.95
    assert cached.train.inputs.dtype == np.uint16


def test_values_of_float64_stay_so_to_the_end():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(32, 16)), np.repeat(np.arange(4), 8)
    with jax.enable_x64(True):
        made = bn.discrete_key_value_bottleneck(16, 4, codebooks=4, pairs=8, key_width=4, projection="chunk")
        params, state = made.init(KEY)
        assert params["values"].dtype == jnp.float64
        state = bn.fit_simvq_keys(KEY, made, state, features, iterations=2)
        indices = np.asarray(made.lookup(params, state, features))
        shown = Examples(indices, labels)
        stream = streams.class_incremental(None, shown, shown, classes_per_task=2)
        result = run(
            KEY, key_value_bottleneck(made), bn.sparse_sgd(3.0, max_norm=1.0), params, stream, epochs=4, batch_size=8
        )
        assert result.params["values"].dtype == jnp.float64 and np.any(result.params["values"])
        votes = bn.begin_votes(params, indices, labels, classes=4)
        votes, loss = bn.train_votes(votes, np.arange(32, dtype=np.int32).reshape(4, 8), learning_rate=3.0)
        moved = bn.end_votes(params, votes)["values"]
    assert moved.dtype == jnp.float64 and np.any(moved) and loss.dtype == jnp.float32 and np.isfinite(loss)


# Bad arguments


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_bad_momentum_says_what_to_do(momentum):
    """jaxcl's form of errors: argument, value, fix."""
    with pytest.raises(ValueError) as caught:
        key_value_bottleneck(small(), momentum=momentum)
    assert str(caught.value) == f"momentum: got {momentum}; pass a number from 0 to 0.999999"
