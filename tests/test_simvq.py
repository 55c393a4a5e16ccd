"""SimVQ against recorded values of the authors' code and of vector-quantize-pytorch, and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, both_ways, golden, numerical_gradient

from jaxcl import quantize as q

pytestmark = pytest.mark.core


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Recorded values (goldens/README)


def step_of(quantizer, wrap):
    """What the records differentiate: `sum(P * output) + loss`, means over elements; loss, gradients, output."""

    def total(params, x, state, weights, commitment, codebook):
        out = quantizer.quantize(params, state, x)
        loss = (commitment * out.commitment_loss + codebook * out.codebook_loss).mean() / x.shape[-1]
        return (weights * out.codes).sum() + loss, (loss, out)

    gradients_of = wrap(jax.grad(total, argnums=(0, 1), has_aux=True))

    def step(*arguments):
        gradients, (loss, out) = gradients_of(*arguments)
        return loss, gradients, out

    return step


@pytest.mark.parametrize("name", ["simvq_official_1d", "simvq_official_2d"])
@pytest.mark.parametrize("form", ["legacy", "fixed"])
@both_ways
def test_the_authors_steps(name, form, wrap):
    """Channels come first there; "legacy" weighs the codebook's term by beta, "fixed" the commitment's."""
    arrays, meta = golden(name)
    quantizer = q.simvq(meta["n_e"], meta["e_dim"])
    params = {"basis": [{"kernel": jnp.asarray(arrays["W"].T), "bias": jnp.asarray(arrays["b"])}]}
    x, weights = (jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in ("z", "P"))
    terms = {"legacy": (1.0, meta["beta"]), "fixed": (meta["beta"], 1.0)}[form]

    step = step_of(quantizer, wrap)
    loss, (grads, grad_x), out = step(params, x, arrays["codebook"], weights, *terms)
    np.testing.assert_array_equal(np.ravel(out.indices), arrays["indices"].ravel())
    assert_close(np.moveaxis(np.asarray(out.codes), -1, 1), arrays[f"zq_{form}"])
    assert_close(loss, arrays[f"commit_{form}"])
    assert_close(np.moveaxis(np.asarray(grad_x), -1, 1), arrays[f"grad_z_{form}"])
    assert_close(grads["basis"][0]["kernel"].T, arrays[f"grad_W_{form}"])
    assert_close(grads["basis"][0]["bias"], arrays[f"grad_b_{form}"])
    _, (_, of_loss), _ = step(params, x, arrays["codebook"], jnp.zeros_like(weights), *terms)
    assert_close(np.moveaxis(np.asarray(of_loss), -1, 1), arrays[f"grad_z_commit_only_{form}"])
    table = quantizer.lookup(params, arrays["codebook"], jnp.arange(meta["n_e"]))
    assert_close(table, arrays["projected_codebook"])


@pytest.mark.parametrize(("form", "gradient"), [("rot", "rotation"), ("ste", "straight_through")])
@both_ways
def test_the_steps_of_vector_quantize_pytorch(form, gradient, wrap):
    arrays, meta = golden("simvq_lucidrains")
    quantizer = q.simvq(meta["codebook_size"], meta["dim"], bias=False, gradient=gradient)
    params, state = {"basis": [{"kernel": jnp.asarray(arrays["W"].T)}]}, arrays["frozen_codebook"]
    commitment, step = meta["input_to_quantize_commit_loss_weight_used"], step_of(quantizer, wrap)
    x, weights = jnp.asarray(arrays["x"]), jnp.asarray(arrays["P"])
    loss, (grads, grad_x), out = step(params, x, state, weights, commitment, 1.0)
    np.testing.assert_array_equal(out.indices, arrays["indices"])
    assert_close(out.codes, arrays[f"quantized_{form}"])
    assert_close(loss, arrays[f"loss_{form}"])
    assert_close(grad_x, arrays[f"grad_x_{form}"])
    assert_close(grads["basis"][0]["kernel"].T, arrays[f"grad_W_{form}"])
    _, (_, passed), _ = step(params, x, state, weights, 0.0, 0.0)
    assert_close(passed, arrays[f"grad_x_quantized_only_{form}"])
    assert_close(quantizer.lookup(params, state, out.indices), arrays["indices_to_codes"])


# Its own


def gelu(x):
    """The approximation with tanh (Hendrycks & Gimpel 2016), as `jax.nn.gelu` has it."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def projected(params, codebook):
    """C W + b in float64, with GELU between two layers."""
    codes = np.float64(codebook)
    for number, layer in enumerate(params["basis"]):
        codes = (gelu(codes) if number else codes) @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0))
    return codes


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("train_codebook", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_codebook_loss_moves_all_that_learns_and_nothing_else(hidden, train_codebook, metric):
    """Its gradient by numbers, in every parameter; the commitment loss has none in them, nor this one in x."""
    quantizer = q.simvq(9, 4, code_width=3, hidden=hidden, train_codebook=train_codebook, metric=metric)
    params, state = quantizer.init(jax.random.key(0))
    x = normal(1, 5, 2, 4)
    codebook = params["codebook"] if train_codebook else state
    table = projected(params, codebook)
    out = quantizer.quantize(params, state, x)

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) if metric == "cosine" else vectors

    distances = ((unit(np.float64(x))[..., None, :] - unit(table)) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(out.indices, distances.argmin(axis=-1))
    assert_close(out.codes, unit(table)[out.indices])
    assert_close(out.commitment_loss, distances.min(axis=-1))
    assert_close(out.codebook_loss, distances.min(axis=-1))

    def total(loss, params, x):
        return getattr(quantizer.quantize(params, state, x), loss).sum()

    grads, grad_x = jax.grad(lambda params, x: total("codebook_loss", params, x), argnums=(0, 1))(params, x)
    assert not np.asarray(grad_x).any()
    leaves, structure = jax.tree.flatten(params)
    for number, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):

        def at(values, number=number):
            moved = jax.tree.unflatten(structure, [*leaves[:number], values, *leaves[number + 1 :]])
            chosen = unit(projected(moved, moved.get("codebook", state)))[out.indices]
            return ((unit(np.float64(x)) - chosen) ** 2).sum()

        assert_close(grad, numerical_gradient(at, leaf), 1e-4)
        assert np.abs(np.asarray(grad)).max() > 1e-3
    of_commitment = jax.grad(lambda params: total("commitment_loss", params, x))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_commitment))


def test_a_step_on_one_vector_moves_every_code():
    """What SimVQ is for: vanilla VQ moves the chosen code alone."""
    quantizer, x = q.simvq(50, 6), normal(0, 1, 6)
    params, state = jax.jit(quantizer.init)(jax.random.key(1))

    @jax.jit
    def tables(params):
        grads = jax.grad(lambda params: quantizer.quantize(params, state, x).codebook_loss.sum())(params)
        moved = jax.tree.map(lambda param, grad: param - 0.1 * grad, params, grads)
        return [quantizer.lookup(p, state, jnp.arange(50)) for p in (params, moved)]

    before, after = tables(params)
    assert (np.abs(np.asarray(after - before)).max(axis=-1) > 0).all()


def test_how_it_begins():
    for initial in ("uniform", "orthogonal", "identity"):
        params, state = q.simvq(4096, 16, initial=initial).init(jax.random.key(0))
        kernel, bias = np.asarray(params["basis"][0]["kernel"]), np.asarray(params["basis"][0]["bias"])
        assert state.shape == (4096, 16) and state.std() == pytest.approx(16**-0.5, rel=0.02)
        assert np.abs(bias).max() <= 16**-0.5 and bias.std() > 0.05
        if initial == "uniform":
            assert np.abs(kernel).max() <= 16**-0.5 and kernel.std() == pytest.approx((3 * 16) ** -0.5, rel=0.1)
        else:
            assert_close(kernel.T @ kernel, np.eye(16))
    params, state = q.simvq(8, 5, code_width=3, bias=False, initial="identity").init(jax.random.key(0))
    table = q.simvq(8, 5, code_width=3, bias=False).lookup(params, state, jnp.arange(8))
    np.testing.assert_array_equal(table, np.pad(state, ((0, 0), (0, 2))))


def test_there_is_nothing_to_average():
    quantizer = q.simvq(8, 4)
    params, state = quantizer.init(jax.random.key(0))
    assert quantizer.update(jax.random.key(1), params, state, jnp.ones((3, 4)), jnp.zeros(3, jnp.int32)) is state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code_width": 0}, "code_width: got 0; pass 1 or more"),
        ({"hidden": 0}, "hidden: got 0; pass 1 or more"),
        ({"initial": "zeros"}, "initial: got 'zeros'; choose one of 'uniform', 'orthogonal', 'identity'"),
        ({"metric": "dot"}, "metric: got 'dot'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        q.simvq(8, 4, **options)
    assert str(caught.value).startswith(message)
