"""Greedy decoding with a cache against running the whole network again for each token."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import both_ways, drawn, plain

from jaxcl import nets

LENGTH, NEVER = 7, -1
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 30, (2, 6)), jnp.int32)
COUNTS = np.array([6, 2])  # tokens of each text
MASK = jnp.arange(6) < COUNTS[:, None]


@cache
def network(kind):
    """A network that chooses many different tokens, and its parameters."""
    if kind == "t5":
        net = nets.T5(30, 16, 1, 2, 2, 6, 12, buckets=8, farthest=8, tied=False)
        return net, drawn(net, TOKENS, TOKENS)
    scaling = nets.RotaryScaling(4.0, 1.0, 4.0, 8)
    net = nets.Llama(30, 16, 2, 4, 2, 6, 12, rotary_scaling=scaling)
    return net, drawn(net, TOKENS)


def decode(net, wrap=jax.jit, **options):
    return wrap(partial(nets.greedy_decode, net.apply, **({"length": LENGTH, "end": NEVER} | options)))


@cache
def again(kind):
    """What is chosen without a cache: each text alone and without padding, all of it again for each token."""
    net, params = network(kind)
    apply, chosen = jax.jit(net.apply), []
    for number, count in enumerate(COUNTS):
        text = TOKENS[number : number + 1, :count]
        written = jnp.zeros((1, 1), jnp.int32) if kind == "t5" else text
        for _ in range(LENGTH):
            # Padded to one shape, which is compiled once; what is to come changes nothing.
            padded = jnp.pad(written, ((0, 0), (0, 13 - written.shape[1])))
            logits = apply(params, text, padded) if kind == "t5" else apply(params, padded)
            token = jnp.argmax(logits[0, written.shape[1] - 1]).astype(jnp.int32)
            written = jnp.append(written, token[None, None], axis=1)
        chosen.append(written[0, -LENGTH:])
    return np.asarray(chosen)


KINDS = pytest.mark.parametrize("kind", ["t5", "llama"])


@pytest.mark.core
@KINDS
@both_ways
def test_tokens_are_those_of_the_whole_network(wrap, kind):
    net, params = network(kind)
    chosen = decode(net, wrap)(params, TOKENS, MASK)
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, again(kind))
    assert len(np.unique(chosen)) > 4


@KINDS
def test_after_the_end_comes_padding(kind):
    net, params = network(kind)
    expected = again(kind).copy()
    end = expected[0, 2]
    for row in expected:
        ended = np.flatnonzero(row == end)
        row[ended[0] + 1 if len(ended) else LENGTH :] = 29
    assert (expected != again(kind)).any()
    found = decode(net, end=int(end), padding=29)(params, TOKENS, MASK)
    np.testing.assert_array_equal(found, expected)


@KINDS
def test_each_steps_logits_are_those_of_the_whole_network(kind):
    net, params = network(kind)
    forced = jnp.asarray(np.random.default_rng(2).integers(0, 30, (2, 4)), jnp.int32)
    logits, kept = jax.jit(partial(net.apply, method="start"), static_argnums=3)(params, TOKENS, None, 5)
    step = jax.jit(partial(net.apply, method="step"))
    found = [logits]
    for token in forced.T:
        logits, kept = step(params, token, kept)
        found.append(logits)
    if kind == "t5":
        whole = jax.jit(net.apply)(params, TOKENS, jnp.pad(forced, ((0, 0), (1, 0))))
    else:
        whole = jax.jit(net.apply)(params, jnp.concatenate([TOKENS, forced], axis=1))[:, 5:]
    np.testing.assert_allclose(jnp.stack(found, axis=1), whole, atol=1e-4)


@KINDS
def test_bfloat16_decodes(kind):
    net, params = network(kind)
    chosen = decode(net.clone(dtype=jnp.bfloat16), length=3)(params, TOKENS, MASK)
    assert chosen.shape == (2, 3) and ((chosen >= 0) & (chosen < 30)).all()


def test_parameters_can_be_mapped_over():
    net, params = network("llama")
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    chosen = decode(net, end=int(again("llama")[0, 1]))  # so that some end before others
    mapped = jax.jit(jax.vmap(chosen, (0, None, None)))(both, TOKENS, MASK)
    np.testing.assert_array_equal(mapped[0], chosen(params, TOKENS, MASK))
    np.testing.assert_array_equal(mapped[1], chosen(jax.tree.map(jnp.negative, params), TOKENS, MASK))


def test_decoding_stops_when_all_have_ended():
    net, params = network("t5")
    steps = []

    def apply(*arguments, method):
        if method == "step":
            jax.debug.callback(lambda: steps.append(1))
        return net.apply(*arguments, method=method)

    first, third = again("t5")[0, 0], again("t5")[0, 2]
    counted = jax.jit(partial(nets.greedy_decode, apply, length=LENGTH))
    for end, count in ((first, 0), (third, 2), (NEVER, LENGTH - 1)):
        steps.clear()
        counted(params, TOKENS[:1], MASK[:1], end=end)
        jax.effects_barrier()
        assert len(steps) == count


@KINDS
def test_any_of_several_tokens_ends_a_text(kind):
    net, params = network(kind)
    first, second = (int(again(kind)[row, place]) for row, place in ((0, 2), (1, 1)))
    found = decode(net, end=[first, second], padding=29)(params, TOKENS, MASK)
    expected = again(kind).copy()
    for row in expected:
        ended = np.flatnonzero((row == first) | (row == second))
        row[ended[0] + 1 if len(ended) else LENGTH :] = 29
    np.testing.assert_array_equal(found, expected)


def test_other_arguments_are_refused():
    net, params = network("llama")
    with pytest.raises(ValueError, match="mask: got texts with padding before a token; pad texts on the right"):
        decode(net, plain)(params, TOKENS, MASK[:, ::-1])
    with pytest.raises(ValueError, match="end: got None; pass the token that ends a text, or some"):
        decode(net, end=None)(params, TOKENS)
    with pytest.raises(ValueError, match="length: got 0; pass 1 or more"):
        decode(net, length=0)(params, TOKENS)
    with pytest.raises(ValueError, match=r"tokens: got shape \(6,\)"):
        decode(net)(params, TOKENS[0])
