"""Progressive compression of a small network: what is coded stays, what is left learns, the file holds both."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import coding, gaussian, nets, trees
from jaxcl.continual.compilations import count_compilations
from jaxcl.gaussian import Gaussian

pytestmark = pytest.mark.core
NET = nets.MLP((16,), 3)
INPUTS = jax.random.normal(jax.random.key(0), (240, 6))
LABELS = jnp.argmax(INPUTS[:, :3] + INPUTS[:, 3:], axis=1)
PARAMS = NET.init(jax.random.key(1), INPUTS[:1])
LAYOUT = coding.layout_of(PARAMS, width=10, seed=5, values={"params/Dense_0/kernel": 60})
PLACES = coding.places(LAYOUT)
KL = 9.0
POSTERIORS = {"mean_kl": coding.mean_kl_posterior(LAYOUT, KL), "mean_var": coding.mean_var_posterior(LAYOUT, KL)}


def loss(params, batch):
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(NET.apply(params, inputs), labels).mean()


@pytest.fixture
def compiled():
    with count_compilations({"step"}) as counts:
        yield counts


def test_a_step_is_one_of_the_optimizer_on_one_draw():
    posterior, progress = POSTERIORS["mean_kl"], coding.nothing_coded(LAYOUT)
    trainer = coding.trainer(LAYOUT, posterior, optax.sgd(0.1), loss)
    state = trainer.init(jax.random.key(0), PARAMS)
    after, told = jax.jit(trainer.step)(jax.random.key(1), state, progress, (INPUTS, LABELS))

    @jax.jit
    def of_draw(variables):
        q, _ = posterior.gaussians(variables)
        draw = gaussian.sample(jax.random.key(1), q)
        return loss(coding.tree_of_values(PLACES.of_weights, draw), (INPUTS, LABELS))

    value, gradients = jax.value_and_grad(of_draw)(state.variables)
    assert_close(told.loss, value)
    assert_close(told.kl, KL)
    for new, old, gradient in zip(after.variables, state.variables, gradients, strict=True):
        assert_close(new, old - 0.1 * gradient)


def test_the_penalty_brings_blocks_to_their_budget(compiled):
    trainer = coding.trainer(
        LAYOUT, POSTERIORS["mean_var"], optax.adam(3e-2), loss, penalty=1e-4, penalty_rate=2e-2
    )  # fmt: skip
    state, step, progress = trainer.init(jax.random.key(0), PARAMS), jax.jit(trainer.step), coding.nothing_coded(LAYOUT)
    _, first = step(jax.random.key(1), state, progress, (INPUTS, LABELS))
    assert first.kl > 2 * KL
    for key in jax.random.split(jax.random.key(2), 600):
        state, told = step(key, state, progress, (INPUTS, LABELS))
    assert abs(told.kl - KL) < 0.15 * KL
    assert compiled["step"] == 1
    halfway = progress._replace(coded=jnp.asarray(LAYOUT.blocks - 1))
    after, told = step(jax.random.key(3), state, halfway, (INPUTS, LABELS))
    spent = gaussian.kl(*POSTERIORS["mean_var"].gaussians(state.variables)).sum(axis=1) / math.log(2)
    assert_close(told.kl, spent[-1], 1e-4)  # of the one that is left
    assert np.asarray(after.log_penalty < state.log_penalty)[:-1].all()


@pytest.mark.parametrize("name", POSTERIORS)
def test_posteriors_begin_at_the_scales_of_the_network(name):
    posterior = POSTERIORS[name]
    variables = posterior.init(jax.random.key(0), PARAMS)
    q, p = posterior.gaussians(variables)
    shape = (LAYOUT.blocks, LAYOUT.width)
    assert all(leaf.shape == shape for leaf in (*q, *p))
    leaves = trees.leaves_by_path(PARAMS)
    for number, path in enumerate(leaves):
        own = np.asarray(PLACES.leaf) == number
        scale = max(float(jnp.sqrt(jnp.mean(leaves[path] ** 2))), 1e-2)
        assert_close(np.asarray(p.scale)[own], np.full(own.sum(), scale))
    assert not np.asarray(p.mean).any()
    spent = gaussian.kl(q, p).sum(axis=1) / math.log(2)
    if name == "mean_kl":
        np.testing.assert_allclose(spent, KL, rtol=1e-5)
    else:
        assert_close(q.mean, variables.raw_mean * p.scale)
        assert_close(q.scale, np.exp(-2) * np.asarray(p.scale))


def test_a_network_is_compressed_while_it_trains(compiled, tmp_path):
    posterior, coder = POSTERIORS["mean_kl"], coding.orc(13)
    trainer = coding.trainer(LAYOUT, posterior, optax.adam(3e-2), loss)
    state, progress, step = trainer.init(jax.random.key(0), PARAMS), coding.nothing_coded(LAYOUT), jax.jit(trainer.step)
    keys = jax.random.split(jax.random.key(2), 400)
    for key in keys[:200]:
        state, _ = step(key, state, progress, (INPUTS, LABELS))
    state = state._replace(variables=coding.with_storable_priors(state.variables))
    priors, effective = state.variables.log_prior_scale, []
    for number, start in enumerate(range(0, LAYOUT.blocks, 4)):
        before = progress
        progress, encoded = coding.encode_next(
            jax.random.key(100 + number), coder, LAYOUT, posterior, state.variables, progress, 4
        )
        effective.append(np.asarray(encoded.effective_sample_size))
        assert int(progress.coded) == min(start + 4, LAYOUT.blocks)
        for old, new in zip(before[1:], progress[1:], strict=True):
            np.testing.assert_array_equal(np.asarray(old)[:start], np.asarray(new)[:start])
            assert not np.asarray(new)[start + 4 :].any()
        for key in keys[200 + 10 * number : 210 + 10 * number]:
            state, _ = step(key, state, progress, (INPUTS, LABELS))
    np.testing.assert_array_equal(state.variables.log_prior_scale, priors)
    np.testing.assert_allclose(progress.kl, KL, rtol=1e-5)
    assert np.concatenate(effective).min() >= 1

    coding.save(tmp_path / "w.jcl", coding.message(coder, LAYOUT, state.variables, progress))
    read = coding.load(tmp_path / "w.jcl")
    assert read.kl == pytest.approx(KL, abs=0.01)
    trained = coding.tree_of_values(PLACES.of_weights, progress.values)
    for path, leaf in trees.leaves_by_path(coding.decode(read)).items():
        np.testing.assert_array_equal(leaf, trees.leaves_by_path(trained)[path])
    accuracy = jnp.mean(jnp.argmax(NET.apply(coding.decode(read), INPUTS), axis=1) == LABELS)
    assert accuracy > 0.8  # chance is a third
    assert compiled["step"] == 1


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize(("kind", "wide"), [("bfloat16", False), ("float16", False), ("float64", True)])
def test_networks_of_other_types_are_trained_in_one_compilation(name, kind, wide):
    """What a step takes and gives has the same types, before anything is coded and after."""
    with jax.enable_x64(wide):
        params = jax.tree.map(lambda leaf: leaf.astype(kind), PARAMS)
        posterior, progress = POSTERIORS[name], coding.nothing_coded(LAYOUT)
        trainer = coding.trainer(LAYOUT, posterior, optax.adam(3e-2), loss)
        before = trainer.init(jax.random.key(0), params)
        after, _ = jax.eval_shape(trainer.step, jax.random.key(1), before, progress, (INPUTS, LABELS))
        kinds = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (before, after)]
        assert kinds[0] == kinds[1]
        variables = coding.with_storable_priors(before.variables)
        assert jax.tree.map(lambda leaf: leaf.dtype, variables) == kinds[0].variables
        assert progress.values.dtype == progress.kl.dtype == jnp.float32


def test_posteriors_that_are_not_finite_are_not_coded():
    posterior, progress = POSTERIORS["mean_var"], coding.nothing_coded(LAYOUT)
    variables = posterior.init(jax.random.key(0), PARAMS)
    variables = variables._replace(raw_mean=variables.raw_mean.at[0, 0].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="look at its losses"):
        coding.encode_next(jax.random.key(0), coding.orc(4), LAYOUT, posterior, variables, progress, 1)


def test_there_must_be_blocks_to_code():
    posterior, progress = POSTERIORS["mean_kl"], coding.nothing_coded(LAYOUT)
    variables = posterior.init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="count: got 0; pass 1 or more"):
        coding.encode_next(jax.random.key(0), coding.mrc(4), LAYOUT, posterior, variables, progress, 0)
    done = progress._replace(coded=jnp.asarray(LAYOUT.blocks))
    with pytest.raises(ValueError, match=r"progress: got all .* blocks coded"):
        coding.encode_next(jax.random.key(0), coding.mrc(4), LAYOUT, posterior, variables, done, 2)


def test_scales_that_were_stored_stay_as_they_are():
    scales = np.exp(np.random.default_rng(0).uniform(-20, 20, 2000)).astype(np.float32)
    stored = coding.storable(scales)
    np.testing.assert_allclose(stored, scales, rtol=2**-8)
    assert not (stored.view(np.uint32) & 0xFFFF).any()
    for nearby in (np.nextafter(stored, np.float32(0)), np.nextafter(stored, np.float32(np.inf))):
        np.testing.assert_array_equal(coding.storable(nearby), stored)


def test_only_blocks_that_are_not_coded_are_sampled():
    q = Gaussian(jnp.full((4, 2), 5.0), jnp.ones((4, 2)))
    progress = coding.Progress(
        jnp.asarray(3), jnp.zeros(4, jnp.uint32), jnp.arange(8.0).reshape(4, 2), jnp.zeros(4)
    )  # fmt: skip
    drawn = coding.sample_values(jax.random.key(0), q, progress)
    np.testing.assert_array_equal(drawn[:3], progress.values[:3])
    assert (np.abs(np.asarray(drawn[3]) - 5) < 5).all() and not np.array_equal(drawn[3], progress.values[3])


def test_a_budget_must_be_there():
    with pytest.raises(ValueError, match="kl: got 0"):
        coding.mean_kl_posterior(LAYOUT, 0)


@pytest.mark.parametrize("name", POSTERIORS)
def test_parameters_of_another_network_are_refused(name):
    with pytest.raises(ValueError, match=r"params: got leaves .*\(6, 17\).*; pass those of the layout"):
        POSTERIORS[name].init(jax.random.key(0), nets.MLP((17,), 3).init(jax.random.key(1), INPUTS[:1]))


def test_a_schedule_of_budgets_multiplies_the_kl_that_holds_by_itself():
    def schedule(step):
        return jnp.where(step < 1, 3.0, 1.0)

    step = jax.jit(coding.trainer(LAYOUT, POSTERIORS["mean_kl"], optax.sgd(0.1), loss, budget_schedule=schedule).step)
    plain = coding.trainer(LAYOUT, POSTERIORS["mean_kl"], optax.sgd(0.1), loss)
    state, progress = plain.init(jax.random.key(2), PARAMS), coding.nothing_coded(LAYOUT)
    first, told = step(jax.random.key(3), state, progress, (INPUTS, LABELS))
    assert_close(told.kl, 3 * KL)
    second, told = step(jax.random.key(4), first, progress, (INPUTS, LABELS))
    assert_close(told.kl, KL)
    expected, _ = plain.step(jax.random.key(4), first, progress, (INPUTS, LABELS))
    assert_close(second.variables.raw_mean, expected.variables.raw_mean)
    # Less noise by the larger budget: another draw, and so another step
    narrow, _ = plain.step(jax.random.key(3), state, progress, (INPUTS, LABELS))
    assert float(jnp.abs(narrow.variables.raw_mean - first.variables.raw_mean).max()) > 1e-4
    assert int(second.step) == 2
