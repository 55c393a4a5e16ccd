"""Tokenizers and their training, on linear networks whose every value NumPy can work out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import quantize, tokenizer, trees
from jaxcl.continual.compilations import count_compilations

B, T, WIDE, D, K = 3, 5, 4, 2, 6
WEIGHTS = {"commitment_weight": 0.25, "codebook_weight": 0.5}


class Linear(NamedTuple):
    """[..., inputs] to [..., outputs], in Linen's form."""

    outputs: int
    name: str = "kernel"

    def init(self, key, inputs):
        return {self.name: jax.random.normal(key, (inputs.shape[-1], self.outputs))}

    def apply(self, params, inputs):
        return inputs @ params[self.name]


def squared_error(outputs, inputs, mask):
    error = jnp.square(outputs - inputs).mean(axis=-1)
    return (error if mask is None else jnp.where(mask, error, 0)).mean(axis=-1)


def make(quantizer=None, **options):
    made = tokenizer.tokenizer(Linear(D), Linear(WIDE), quantizer or quantize.vq(K, D))
    return made, tokenizer.trainer(made, optax.sgd(0.1), squared_error, **WEIGHTS, **options)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


INPUTS = normal(0, B, T, WIDE)


def by_hand(params, inputs, mask):
    """(outputs, indices, losses) in float64, of a vq."""
    encoder, decoder, codebook = (
        np.asarray(leaf, np.float64)
        for leaf in (params["encoder"]["kernel"], params["decoder"]["kernel"], params["quantizer"])
    )
    features = inputs.astype(np.float64) @ encoder
    indices = ((features[..., None, :] - codebook) ** 2).sum(axis=-1).argmin(axis=-1)
    codes = np.where(mask[..., None], codebook[indices], 0)
    distance = np.where(mask, ((features - codes) ** 2).sum(axis=-1), 0).sum() / (mask.sum() * D)
    error = np.where(mask, ((codes @ decoder - inputs) ** 2).mean(axis=-1), 0).mean()
    losses = {"reconstruction": error, "commitment": 0.25 * distance, "codebook": 0.5 * distance}
    return codes @ decoder, np.where(mask, indices, -1), losses | {"total": sum(losses.values())}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_step_is_as_worked_out_by_hand(masked, jitted):
    made, trainer = make()
    state = trainer.init(jax.random.key(1), INPUTS)
    mask = np.random.default_rng(2).random((B, T)) < 0.6 if masked else np.ones((B, T), bool)
    given = jnp.asarray(mask) if masked else None
    step = jax.jit(trainer.step) if jitted else trainer.step
    after, told = step(jax.random.key(2), state, INPUTS, given)
    outputs, indices, losses = by_hand(state.params, INPUTS, mask)
    out = made.reconstruct(state.params, state.state, INPUTS, given)
    assert_close(out.outputs, outputs)
    np.testing.assert_array_equal(told.indices, indices)
    np.testing.assert_array_equal(made.encode(state.params, state.state, INPUTS, given), indices)
    assert_close(made.decode(state.params, state.state, told.indices), outputs)
    assert set(told.losses) == set(losses) and bool(told.sound) and int(after.step) == 1
    for name, value in losses.items():
        assert_close(told.losses[name], value)
    # What moves the decoder is the reconstruction alone: its gradient is a product of codes and errors.
    codes = np.where(mask[..., None], np.asarray(state.params["quantizer"], np.float64)[indices], 0)
    error = np.where(mask[..., None], outputs - INPUTS, 0)
    gradient = np.einsum("btd,btw->dw", codes, 2 * error / error.size)
    assert_close(after.params["decoder"]["kernel"], state.params["decoder"]["kernel"] - 0.1 * gradient)


def test_the_regulariser_sees_features_and_the_quantizers_params():
    _, plain = make()
    _, regularised = make(regulariser=lambda params, features, mask: jnp.square(params).sum() + features.sum())
    state = plain.init(jax.random.key(1), INPUTS)
    without, extra = (trainer.step(jax.random.key(2), state, INPUTS)[1].losses for trainer in (plain, regularised))
    expected = np.square(state.params["quantizer"]).sum() + (INPUTS @ state.params["encoder"]["kernel"]).sum()
    assert_close(extra["regulariser"], expected)
    assert_close(extra["total"] - without["total"], expected, 1e-4)


def test_the_averages_are_updated_with_what_was_chosen():
    quantizer = quantize.ema_vq(K, D)
    made, trainer = make(quantizer)
    state = trainer.init(jax.random.key(1), INPUTS)
    after, told = trainer.step(jax.random.key(2), state, INPUTS)
    features = INPUTS @ state.params["encoder"]["kernel"]
    expected = quantizer.update(jax.random.key(2), (), state.state, features, told.indices)
    assert_close(after.state.codebook, expected.codebook)
    assert made.quantizer is quantizer


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("quantizer", [quantize.vq(K, D), quantize.ema_vq(K, D), quantize.simvq(K, D)])
def test_a_step_that_is_not_finite_changes_nothing_and_says_where_it_began(bad, quantizer):
    _, trainer = make(quantizer)
    state = trainer.init(jax.random.key(1), INPUTS)
    inputs = INPUTS.copy()
    inputs[1, 2, 3] = bad
    after, told = jax.jit(trainer.step)(jax.random.key(2), state, inputs, None)
    assert not bool(told.sound) and int(after.step) == 1
    assert trees.first_not_finite(told.not_finite) == "inputs (1 values)"
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), state._replace(step=0))


def test_what_begins_in_the_encoder_is_told():
    _, trainer = make()
    state = trainer.init(jax.random.key(1), INPUTS)
    state.params["encoder"]["kernel"] = state.params["encoder"]["kernel"].at[:, 0].set(3e38)
    _, told = trainer.step(jax.random.key(2), state, INPUTS)
    assert trees.first_not_finite(told.not_finite).startswith("features (")
    healthy = trainer.step(jax.random.key(2), trainer.init(jax.random.key(1), INPUTS), INPUTS)[1]
    assert trees.first_not_finite(healthy.not_finite) is None


def test_one_compilation_serves_all_steps():
    _, trainer = make(quantize.simvq(K, D))
    state = trainer.init(jax.random.key(1), INPUTS)
    step = jax.jit(trainer.step)
    with count_compilations(["step"]) as counts:
        for number in range(3):
            state, _ = step(jax.random.key(number), state, INPUTS, None)
    assert counts == {"step": 1}


# Against a discriminator


def adversary(start=0, **options):
    return tokenizer.Adversary(Linear(1, "judge"), optax.sgd(0.2), lambda path: path == "kernel", start, **options)


def test_the_discriminator_learns_and_the_generator_is_weighed_as_by_hand():
    _, trainer = make(adversary=adversary(weight=0.8))
    state = trainer.init(jax.random.key(1), INPUTS)
    after, told = jax.jit(trainer.step)(jax.random.key(2), state, INPUTS, None)
    judge = np.asarray(state.adversary[0]["judge"], np.float64)
    outputs, indices, losses = by_hand(state.params, INPUTS, np.ones((B, T), bool))
    codes = np.asarray(state.params["quantizer"], np.float64)[indices]
    # Both losses' gradients in the decoder's kernel, and eq. 7 of Esser et al. 2021.
    of_error = np.einsum("btd,btw->dw", codes, 2 * (outputs - INPUTS) / outputs.size)
    of_judge = np.einsum("btd,w->dw", codes, -judge[:, 0]) / (B * T)
    weight = 0.8 * np.linalg.norm(of_error) / (np.linalg.norm(of_judge) + 1e-4)
    adversarial = -weight * (outputs @ judge).mean()
    assert_close(told.losses["adversarial"], adversarial, 1e-4)
    assert_close(told.losses["total"], losses["total"] + adversarial, 1e-4)
    expected = np.asarray(state.params["decoder"]["kernel"]) - 0.1 * (of_error + weight * of_judge)
    assert_close(after.params["decoder"]["kernel"], expected, 1e-4)
    real, fake = INPUTS @ judge, outputs @ judge
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    assert_close(told.losses["discriminator"], hinge, 1e-4)
    slope = (np.where(fake > -1, outputs, 0) - np.where(real < 1, INPUTS, 0)).sum(axis=(0, 1)) / (B * T)
    assert_close(after.adversary[0]["judge"][:, 0], judge[:, 0] - 0.2 * slope, 1e-4)


def test_before_its_start_the_discriminator_does_not_count():
    _, plain = make()
    _, trainer = make(adversary=adversary(start=1))
    state = trainer.init(jax.random.key(1), INPUTS)
    after, told = trainer.step(jax.random.key(2), state, INPUTS)
    alone, _ = plain.step(jax.random.key(2), state._replace(adversary=None), INPUTS)
    assert float(told.losses["adversarial"]) == 0
    jax.tree.map(assert_close, after.params, alone.params)
    assert float(trainer.step(jax.random.key(3), after, INPUTS)[1].losses["adversarial"]) != 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_are_named(name):
    made, _ = make()
    with pytest.raises(ValueError, match=f"{name}: got -1; pass 0 or more"):
        tokenizer.trainer(made, optax.sgd(0.1), squared_error, **{name: -1})
