"""The masked prior against its formulas, on tables of logits, and trained on toy grids."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, compiled, numerical_gradient, plain

from jaxcl.masked_prior import decisions_a_step, masked_prior, smallest_radix, to_digits
from jaxcl.nets.transformer import TokenTransformer


class Table:
    """A network whose logits are its params [classes + 1, T, ...], whatever the tokens are."""

    def __init__(self):
        self.traced = 0

    def init(self, key, tokens, labels):
        return jax.random.normal(key, (1, tokens.shape[1], 5))

    def apply(self, params, tokens, labels):
        self.traced += 1
        return params[labels]


class Witness(Table):
    """A table that remembers the tokens and labels it was shown, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def apply(self, params, tokens, labels):
        remember = lambda *shown: self.seen.append(tuple(map(np.asarray, shown)))  # noqa: E731
        jax.debug.callback(remember, tokens, labels, ordered=True)
        return super().apply(params, tokens, labels)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def probabilities(logits, codebook_size):
    """Of the indices below K, [..., K] float64, from their digits' logits [..., F, radix]: products, renormalised."""
    p = np.exp(np.float64(logits))
    p /= p.sum(axis=-1, keepdims=True)
    digits, radix = logits.shape[-2:]
    names = list(itertools.product(range(radix), repeat=digits))[:codebook_size]
    joint = np.stack([np.prod([p[..., f, d] for f, d in enumerate(name)], axis=0) for name in names], axis=-1)
    return joint / joint.sum(axis=-1, keepdims=True)


def assert_drawn_from(tokens, expected):
    """That tokens [N] have the frequencies `expected` [K], to 5 standard deviations."""
    assert tokens.min() >= 0 and tokens.max() < len(expected)
    frequencies = np.bincount(tokens, minlength=len(expected)) / len(tokens)
    deviation = np.sqrt(expected * (1 - expected) / len(tokens))
    assert (np.abs(frequencies - expected) <= 5 * deviation + 1e-12).all()


# Digits and the schedule


@pytest.mark.parametrize("digits", [1, 2, 3, 5])
def test_the_radix_is_the_smallest_with_room_for_all_codes(digits):
    sizes = [1, 2, 7, 8, 9, 64, 125, 216, 243, 244, 343, 1000, 1024, 262_144]
    for size in sizes:
        assert smallest_radix(size, digits) == next(r for r in itertools.count(1) if r**digits >= size)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(jax.jit, static_argnums=(1, 2)), jax.vmap])
def test_digits_count_from_the_most_significant(wrap):
    indices = np.arange(343, dtype=np.int32).reshape(7, 49)
    function = wrap(to_digits) if wrap is not jax.vmap else jax.vmap(lambda row: to_digits(row, 7, 3))
    actual = function(jnp.asarray(indices)) if wrap is jax.vmap else function(jnp.asarray(indices), 7, 3)
    np.testing.assert_array_equal(actual, np.stack(np.unravel_index(indices, (7, 7, 7)), axis=-1))


@pytest.mark.parametrize(
    ("length", "hidden"),
    [
        (16, [15, 14, 13, 11, 8, 6, 3, 0]),  # 16 cos(pi t / 16), rounded down
        (256, [251, 236, 212, 181, 142, 97, 49, 0]),
        (12, [10, 6, 0]),  # cos(pi / 3) is a half
        (8, [7, 6, 5, 4, 3, 2, 1, 0]),  # one at least
        (9, [0]),
    ],
)
def test_the_schedule_is_the_published_one(length, hidden):
    expected = -np.diff([length, *hidden])
    np.testing.assert_array_equal(decisions_a_step(length, len(hidden)), expected)


def test_the_schedule_adds_up_and_never_stands_still():
    for length in (1, 2, 7, 16, 49, 64, 256):
        for steps in range(1, length + 1):
            counts = np.asarray(decisions_a_step(length, steps))
            assert counts.shape == (steps,)
            assert counts.min() >= 1 and counts.sum() == length
            free = np.floor(length * np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps) + 1e-9)
            hidden = length - np.cumsum(counts)
            assert (hidden <= free).all()  # fewer only where a step would else have decided none
            assert (counts[hidden < free] == 1).all()


# Sampling


@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (4, 2.0), (12, 0.0)])
def test_each_step_decides_as_many_as_scheduled_and_changes_none(steps, guidance):
    witness = Witness()
    prior = masked_prior(witness, 7, 12, classes=2)
    logits = 2 * normal(0, 3, 12, 2, 3)
    labels = jnp.asarray([0, 1, 1, 2, 0])
    tokens = prior.sample(jax.random.key(0), logits, labels, steps=steps, guidance=guidance)
    jax.effects_barrier()
    shown, told = (np.stack(part) for part in zip(*witness.seen, strict=True))
    if guidance:
        np.testing.assert_array_equal(shown[:, :5], shown[:, 5:])
        np.testing.assert_array_equal(told[:, 5:], np.full((steps, 5), 2))
    shown = [*shown[:, :5], np.asarray(tokens)]
    np.testing.assert_array_equal(told[:, :5], np.tile(labels, (steps, 1)))
    assert (shown[0] == 7).all() and shown[-1].dtype == np.int32
    assert (shown[-1] >= 0).all() and (shown[-1] < 7).all()
    for before, after, count in zip(shown[:-1], shown[1:], decisions_a_step(12, steps), strict=True):
        np.testing.assert_array_equal(after[before < 7], before[before < 7])
        np.testing.assert_array_equal((before == 7).sum(axis=1) - (after == 7).sum(axis=1), np.full(5, count))


def test_the_surest_are_decided_first_where_there_is_no_noise():
    witness = Witness()
    prior = masked_prior(witness, 5, 8)
    sureness = np.asarray([3.0, 7.0, 1.0, 5.0, 8.0, 2.0, 6.0, 4.0], np.float32)
    logits = np.zeros((1, 8, 5), np.float32)
    logits[0, np.arange(8), np.arange(8) % 5] = sureness
    tokens = prior.sample(jax.random.key(0), logits, 3, steps=8, temperature=1e-3, choice_temperature=0.0)
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens, np.tile(np.arange(8) % 5, (3, 1)))
    for number, (shown, _) in enumerate(witness.seen):
        decided = np.argsort(-sureness)[:number]
        np.testing.assert_array_equal(np.isin(np.arange(8), decided), shown[0] < 5)


def test_noise_makes_the_order_random_at_first_and_not_at_last():
    """Of two tokens, the first decided is the surer with the probability that a difference of Gumbels has."""
    witness = Witness()
    prior = masked_prior(witness, 2, 2)
    logits = np.asarray([[[1.0, 0.0], [3.0, 0.0]]], np.float32)
    prior.sample(jax.random.key(0), logits, 20_000, steps=2, temperature=1e-3, choice_temperature=4.0)
    jax.effects_barrier()
    p = 1 / (1 + np.exp(-np.asarray([1.0, 3.0])))
    surer = 1 / (1 + (p[0] / p[1]) ** (1 / 2))  # the noise of the first of two steps is half of 4
    second = (witness.seen[1][0][:, 1] == 0).astype(int)
    assert_drawn_from(second, np.asarray([1 - surer, surer]))


@pytest.mark.parametrize(("codebook_size", "digits"), [(5, 1), (7, 2), (11, 3)])
def test_an_index_has_its_digits_probability_given_that_it_is_below_k(codebook_size, digits):
    logits = normal(codebook_size, 1, 1, digits, smallest_radix(codebook_size, digits))
    prior = masked_prior(Table(), codebook_size, 1)
    for temperature in (1.0, 0.5):
        tokens = prior.sample(jax.random.key(1), logits, 5000, steps=1, temperature=temperature)
        assert_drawn_from(np.asarray(tokens)[:, 0], probabilities(logits[0, 0] / temperature, codebook_size))


def test_no_index_is_too_large_even_where_the_network_wants_one():
    logits = np.zeros((1, 6, 3, 4), np.float32)
    logits[..., 3] = 30  # 63, of 22 codes: the largest, digits 1 1 1
    tokens = masked_prior(Table(), 22, 6).sample(jax.random.key(0), logits, 1000, steps=3)
    assert np.asarray(tokens).max() < 22
    # What is left of the highest first digit that leaves the rest free: 0, then 3 and 3.
    assert (np.asarray(tokens) == 15).mean() > 0.99


def test_guidance_extrapolates_from_the_logits_without_a_class():
    logits = normal(0, 3, 1, 2, 3)
    prior = masked_prior(Table(), 8, 1, classes=2)
    labels = jnp.tile(jnp.asarray([0, 1]), 5000)
    for guidance in (0.0, 0.5, 3.0):
        tokens = np.asarray(prior.sample(jax.random.key(0), logits, labels, steps=1, guidance=guidance))[:, 0]
        for label in (0, 1):
            guided = (1 + guidance) * logits[label, 0] - guidance * logits[2, 0]
            assert_drawn_from(tokens[label::2], probabilities(guided, 8))


def test_a_count_samples_without_a_class():
    prior = masked_prior(Table(), 5, 4, classes=2)
    logits = normal(0, 3, 4, 5)
    counted, none = (prior.sample(jax.random.key(0), logits, labels, steps=4) for labels in (6, np.full(6, 2)))
    np.testing.assert_array_equal(counted, none)


def test_the_key_decides_and_nothing_else():
    network = Table()
    prior = masked_prior(network, 5, 6)
    logits = normal(0, 1, 6, 5)
    keys = jax.random.split(jax.random.key(0), 3)

    def sample(key, **options):
        return prior.sample(key, logits, 4, steps=3, **options)

    alone = np.stack([sample(key) for key in keys])
    traced = network.traced
    np.testing.assert_array_equal(sample(keys[0]), alone[0])
    assert (alone[0] != alone[1]).any()
    assert (alone[0, 0] != alone[0, 1]).any()
    sample(keys[0], temperature=0.7, choice_temperature=1.0)
    assert network.traced == traced  # numbers are arguments of one compiled program
    np.testing.assert_array_equal(jax.jit(jax.vmap(sample))(keys), alone)


# The loss


def toy_tokens(codebook_size, *shape):
    return jnp.asarray(np.random.default_rng(9).integers(0, codebook_size, shape), jnp.int32)


@pytest.mark.parametrize(
    ("codebook_size", "digits", "wrap"), [(5, 1, plain), (5, 1, compiled), (7, 2, compiled), (11, 3, compiled)]
)
def test_the_loss_is_the_cross_entropy_of_what_is_hidden(codebook_size, digits, wrap):
    witness = Witness()
    prior = masked_prior(witness, codebook_size, 6, classes=2, label_dropping=0.5)
    logits = normal(0, 3, 6, digits, smallest_radix(codebook_size, digits))
    tokens, labels = toy_tokens(codebook_size, 8, 6), jnp.arange(8) % 2

    def total(logits):
        out = prior.loss(jax.random.key(0), logits, tokens, labels)
        return out.loss.sum(), out

    grad, out = wrap(jax.grad(total, has_aux=True))(logits)
    jax.effects_barrier()
    shown, told = witness.seen[0]
    hidden = shown == codebook_size
    np.testing.assert_array_equal(shown[~hidden], np.asarray(tokens)[~hidden])
    np.testing.assert_array_equal(out.masked, hidden.sum(axis=1))
    assert hidden.any(axis=1).all() and not hidden.all()
    dropped = told == 2
    assert 0 < dropped.sum() < 8
    np.testing.assert_array_equal(told[~dropped], np.asarray(labels)[~dropped])

    def loss(logits):
        p = np.take_along_axis(probabilities(logits[told], codebook_size), np.asarray(tokens)[..., None], axis=-1)
        return -(np.log(p[..., 0]) * hidden).sum(axis=1) / hidden.sum(axis=1)

    assert_close(out.loss, loss(logits))
    likeliest = logits[told].argmax(axis=-1) @ logits.shape[-1] ** np.arange(digits)[::-1]
    assert_close(out.accuracy, ((likeliest == tokens) * hidden).sum(axis=1) / hidden.sum(axis=1))
    assert_close(grad, numerical_gradient(lambda logits: loss(logits).sum(), logits), 1e-4)


@pytest.mark.parametrize(("codebook_size", "digits"), [(11, 3), (262_144, 2), (200_000, 2)])
def test_knowing_nothing_costs_the_logarithm_of_k(codebook_size, digits):
    """Also where the digits have room for more."""
    logits = np.zeros((1, 3, digits, smallest_radix(codebook_size, digits)), np.float32)
    loss = jax.jit(masked_prior(Table(), codebook_size, 3).loss)
    out = loss(jax.random.key(0), logits, toy_tokens(codebook_size, 2, 3))
    assert_close(out.loss, np.full(2, np.log(codebook_size)))


def test_as_many_are_hidden_as_the_cosine_says():
    """P(n hidden) is the length of the r for which cos(pi r / 2) T lies in (n - 1, n]; which ones is uniform."""
    witness = Witness()
    prior = masked_prior(witness, 5, 9)
    out = jax.jit(prior.loss)(jax.random.key(0), np.zeros((1, 9, 5), np.float32), toy_tokens(5, 20_000, 9))
    jax.effects_barrier()
    expected = -np.diff(np.arccos(np.arange(10) / 9)) * 2 / np.pi
    assert_drawn_from(np.asarray(out.masked) - 1, expected)
    hidden = witness.seen[0][0] == 5
    single = hidden[hidden.sum(axis=1) == 1]
    assert_drawn_from(single.argmax(axis=1), np.full(9, 1 / 9))


@pytest.mark.parametrize(("dropping", "given", "told"), [(0.0, True, 1), (1.0, True, 3), (0.0, False, 3)])
def test_labels_are_dropped_as_often_as_asked(dropping, given, told):
    witness = Witness()
    prior = masked_prior(witness, 5, 2, classes=3, label_dropping=dropping)
    labels = jnp.full(50, 1) if given else None
    jax.jit(prior.loss)(jax.random.key(0), np.zeros((4, 2, 5), np.float32), toy_tokens(5, 50, 2), labels)
    jax.effects_barrier()
    np.testing.assert_array_equal(witness.seen[0][1], np.full(50, told))


def test_logits_in_bfloat16_and_losses_under_vmap():
    prior = masked_prior(Table(), 7, 6)
    logits, tokens = jnp.asarray(normal(0, 1, 6, 2, 3)), toy_tokens(7, 8, 6)
    keys = jax.random.split(jax.random.key(0), 3)
    loss = jax.jit(prior.loss)
    alone = np.stack([loss(key, logits, tokens).loss for key in keys])
    assert_close(jax.vmap(lambda key: loss(key, logits, tokens).loss)(keys), alone)
    rounded = loss(keys[0], logits.astype(jnp.bfloat16), tokens).loss
    assert rounded.dtype == jnp.float32
    assert_close(rounded, alone[0], 0.02)


# Trained


def train(prior, patterns, labels, steps):
    """Parameters after Adam on batches of 32 of the patterns [n, T], of the classes [n], and the losses [steps]."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, opt_state = carry
        batch_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(batch_key, (32,), 0, len(patterns))
        loss, grads = jax.value_and_grad(
            lambda params: prior.loss(loss_key, params, patterns[rows], labels[rows]).loss.mean()
        )(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def run(key):
        init_key, train_key = jax.random.split(key)
        params = prior.init(init_key)
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(train_key, steps))

    (params, _), losses = run(jax.random.key(0))
    return params, np.asarray(losses)


def test_a_prior_learns_two_patterns_with_and_without_their_classes():
    """Tokens of a large codebook, by digits; the patterns differ in the last one, so that it alone decides."""
    codebook_size, radix = 249_900, 500
    patterns = radix * toy_tokens(499, 1, 8) + toy_tokens(radix, 2, 8)
    network = TokenTransformer(codebook_size, classes=2, width=32, layers=1, heads=2, digits=2)
    prior = masked_prior(network, codebook_size, 8, classes=2, label_dropping=0.5)
    params, losses = train(prior, patterns, jnp.arange(2), 250)
    assert losses[:3].mean() > 10  # the logarithm of K is 12.4
    assert losses[-50:].mean() < 0.3  # which of the two it is costs log 2 a token where all are hidden, else nothing
    labels = np.arange(400) % 2
    for told, guidance in ((labels, 1.0), (400, 0.0)):
        tokens = prior.sample(jax.random.key(1), params, told, temperature=0.5, guidance=guidance)
        matches = (np.asarray(tokens)[:, None] == np.asarray(patterns)).all(axis=-1)
        assert matches.any(axis=1).mean() > 0.97
        if guidance:
            assert matches[np.arange(400), labels].mean() > 0.97
        else:
            assert matches.mean(axis=0).min() > 0.1


# Bad arguments


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: masked_prior(Table(), 0, 4), "codebook_size: got 0; pass a number from 1 to 2147483647"),
        (lambda: masked_prior(Table(), 5, 0), "length: got 0; pass 1 or more"),
        (lambda: masked_prior(Table(), 5, 4, classes=-1), "classes: got -1; pass 0 or more"),
        (lambda: masked_prior(Table(), 5, 4, label_dropping=1.5), "label_dropping: got 1.5; pass a number from 0 to 1"),
        (lambda: decisions_a_step(4, 5), "steps: got 5; pass a number from 1 to 4"),
        (lambda: smallest_radix(0, 2), "codebook_size: got 0; pass 1 or more"),
        (lambda: smallest_radix(5, 0), "digits: got 0; pass 1 or more"),
    ],
)
def test_bad_sizes_are_named(function, message):
    with pytest.raises(ValueError) as caught:
        function()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tokens", "labels", "logits", "message"),
    [
        ((4,), None, (1, 4, 5), "tokens: got shape (4,); pass [B, 4], grids flattened"),
        ((2, 3), None, (1, 4, 5), "tokens: got shape (2, 3); pass [B, 4], grids flattened"),
        ((2, 4), (2,), (1, 4, 5), "labels: got shape (2,); this prior has no classes: give it `classes`"),
        ((2, 4), None, (1, 4, 4), "logits: got 1 digits in radix 4; 5 codes need a network with more outputs"),
        ((2, 4), None, (1, 5), "logits: got shape (2, 5); pass an array with 4 axes"),
    ],
)
def test_bad_batches_are_named(tokens, labels, logits, message):
    prior = masked_prior(Table(), 5, 4)
    labels = None if labels is None else jnp.zeros(labels, jnp.int32)
    with pytest.raises(ValueError) as caught:
        prior.loss(jax.random.key(0), jnp.zeros(logits), jnp.zeros(tokens, jnp.int32), labels)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (0, {}, "labels: got 0; pass 1 or more"),
        (jnp.zeros((2, 1), jnp.int32), {}, "labels: got shape (2, 1); pass [2], one an example"),
        (2, {"steps": 0}, "steps: got 0; pass a number from 1 to 4"),
        (2, {"temperature": 0.0}, "temperature: got 0.0; pass 1e-06 or more"),
        (2, {"choice_temperature": -1.0}, "choice_temperature: got -1.0; pass 0 or more"),
        (2, {"guidance": -1.0}, "guidance: got -1.0; pass 0 or more"),
    ],
)
def test_bad_options_of_sampling_are_named(labels, options, message):
    prior = masked_prior(Table(), 5, 4, classes=1)
    with pytest.raises(ValueError) as caught:
        prior.sample(jax.random.key(0), jnp.zeros((2, 4, 5)), labels, **{"steps": 2} | options)
    assert str(caught.value) == message
