"""The Transformer over tokens against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl.nets.transformer import TokenTransformer
from jaxcl.trees import parameter_count


def small(digits, codebook_size=7):
    """A network, parameters that all count, tokens some of which are hidden, and labels."""
    net = TokenTransformer(codebook_size, classes=2, width=8, layers=2, heads=2, digits=digits)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, codebook_size + 1, (4, 5)), jnp.int32).at[:, 0].set(codebook_size)
    labels = jnp.asarray([0, 1, 2, 1])

    def draw(leaf):  # the initialiser would be compiled for each leaf
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)

    return net, jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), tokens, labels)), tokens, labels


def layer_norm(weights, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * weights["scale"] + weights["bias"]


def dense(weights, x):
    return x @ weights["kernel"] + weights["bias"]


def gelu(x):
    """The approximation with tanh (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(weights, x, heads):
    """One head, one example and one query after the other."""
    width = x.shape[-1] // heads
    query, key, value = np.split(dense(weights["Dense_0"], x), 3, axis=-1)
    attended = np.zeros_like(x)
    for b, head, t in np.ndindex(len(x), heads, x.shape[1]):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(key[b, :, part] @ query[b, t, part] / np.sqrt(width))
        attended[b, t, part] = scores / scores.sum() @ value[b, :, part]
    return dense(weights["Dense_1"], attended)


def forward(weights, tokens, labels, digits, radix, hidden):
    x = np.zeros((*tokens.shape, weights["mask"].size))
    for number in range(digits):
        digit = tokens // radix ** (digits - 1 - number) % radix
        x += weights[f"digit_{number}"]["embedding"][digit]
    x[tokens == hidden] = weights["mask"]
    x += weights["positions"] + weights["class"]["embedding"][labels][:, None]
    for number in range(2):
        block = weights[f"_Block_{number}"]
        x = x + attention(block, layer_norm(block["LayerNorm_0"], x), 2)
        inner = gelu(dense(block["Dense_2"], layer_norm(block["LayerNorm_1"], x)))
        x = x + dense(block["Dense_3"], inner)
    return dense(weights["Dense_0"], layer_norm(weights["LayerNorm_0"], x))


@pytest.mark.parametrize(("digits", "radix"), [(1, 7), (2, 3)])
def test_it_is_the_published_network_with_normalisation_first(digits, radix):
    net, params, tokens, labels = small(digits)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    expected = forward(weights, np.asarray(tokens), np.asarray(labels), digits, radix, hidden=7)
    shape = (4, 5, 7) if digits == 1 else (4, 5, 2, 3)
    assert_close(jax.jit(net.apply)(params, tokens, labels), expected.reshape(shape))
    assert_close(net.apply(params, tokens, labels), expected.reshape(shape))


def test_a_position_sees_all_of_its_own_grid_and_nothing_else():
    net, params, tokens, labels = small(2)
    apply = jax.jit(net.apply)
    before = np.asarray(apply(params, tokens, labels))
    for changed in (0, 4):
        after = apply(params, tokens.at[1, changed].set(3), labels)
        moved = np.abs(after - before).max(axis=(2, 3)) > 1e-4
        np.testing.assert_array_equal(moved, np.tile(np.arange(4)[:, None] == 1, 5))
    assert_close(jax.vmap(lambda t, c: apply(params, t[None], c[None])[0])(tokens, labels), before)


def test_half_precision_and_gradients():
    net, params, tokens, labels = small(2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rounded, exact = (jax.jit(net.apply)(p, tokens, labels) for p in (half, params))
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded.astype(jnp.float32), exact, 0.1)
    grads = jax.jit(jax.grad(lambda params: jnp.square(net.apply(params, tokens, labels)).mean()))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


def test_heads_of_digits_keep_a_large_codebook_small():
    """Embeddings and heads of 262,144 codes: two of 512 each, or three of 64."""
    counts = {}
    for digits, radix in ((2, 512), (3, 64)):
        net = TokenTransformer(262_144, width=16, layers=1, heads=2, digits=digits)
        tokens, labels = jnp.zeros((2, 6), jnp.int32), jnp.zeros(2, jnp.int32)
        params = jax.eval_shape(net.init, jax.random.key(0), tokens, labels)
        assert jax.eval_shape(net.apply, params, tokens, labels).shape == (2, 6, digits, radix)
        counts[digits] = parameter_count(params)
    rest = 16 + 6 * 16 + 16 + 2 * 16 + 4 * 16 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16
    assert counts == {2: rest + 1024 * (16 + 16 + 1), 3: rest + 192 * (16 + 16 + 1)}


@pytest.mark.parametrize(
    ("options", "tokens", "labels", "message"),
    [
        ({"width": 9}, (2, 5), (2,), "width: got 9; pass a multiple of heads, which are 4"),
        ({"digits": 0}, (2, 5), (2,), "digits: got 0; pass 1 or more"),
        ({}, (2, 5, 5), (2,), "tokens: got shape (2, 5, 5); pass an array with 2 axes"),
        ({}, (2, 5), (), "labels: got shape (); pass an array with 1 axes"),
    ],
)
def test_bad_arguments_are_named(options, tokens, labels, message):
    net = TokenTransformer(7, **{"width": 8} | options)
    with pytest.raises(ValueError) as caught:
        net.init(jax.random.key(0), jnp.zeros(tokens, jnp.int32), jnp.zeros(labels, jnp.int32))
    assert str(caught.value) == message
