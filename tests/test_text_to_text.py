"""Answers in words: losses against a plain computation, greedy answers, a whole sequence of tasks for T5 and Llama."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import adapters, continual, nets
from jaxcl.continual import Adapted, Batch, Examples, streams

ANSWERS = np.array([[5, 6, 1], [7, 1, -1], [5, 1, -1]])
T5 = nets.T5(24, 16, 1, 1, 2, 8, 32, buckets=8, farthest=16)
LLAMA = nets.Llama(24, 16, 1, 2, 1, 8, 32)


def params_of(net):
    tokens = jnp.ones((1, 4), jnp.int32)
    return jax.jit(net.init)(jax.random.key(0), *(tokens, tokens) if net is T5 else (tokens,))


PARAMS = {net: params_of(net) for net in (T5, LLAMA)}
both = pytest.mark.parametrize("net", [T5, LLAMA], ids=["T5", "Llama"])
TOKENS = np.array([[3, 4, 8, 9], [10, 0, 11, -1], [12, -1, -1, -1]], np.int32)


def batch(weights=(1, 1, 1)):
    return Batch(
        jnp.asarray(TOKENS), jnp.asarray([0, 1, 2]), jnp.float32(weights), jnp.ones((3, 4), bool), jnp.int32(0)
    )


def nothing(path, inputs, outputs):
    return outputs


def log_likelihoods(net, row):
    """Of an answer's tokens, each text by itself without padding."""
    text, answer = TOKENS[row][TOKENS[row] >= 0], ANSWERS[row][ANSWERS[row] >= 0]
    if net is T5:
        logits = jax.jit(net.apply)(PARAMS[net], text[None], np.r_[0, answer[:-1]][None].astype(np.int32))[0]
    else:
        logits = jax.jit(net.apply)(PARAMS[net], np.r_[text, answer[:-1]][None].astype(np.int32))[0, len(text) - 1 :]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [[5, 6, 1], [7, 1, 0]],
            r"answers: got \[7, 1, 0\] for class 1; put the end, 1, after its tokens and -1 wherever",
        ),
        ([[5, -1, -1], [7, 1, -1]], r"answers: got \[5, -1, -1\] for class 0"),
        ([[5, -1, 1]], r"answers: got \[5, -1, 1\]"),
        ([[5, 1, 1]], r"answers: got \[5, 1, 1\]"),
        ([[5, 1, -2]], r"answers: got \[5, 1, -2\]"),
        ([[5, 1], [5, 1]], "answers: got the same for two classes; give each class a name of its own"),
    ],
)
def test_answers_that_could_never_be_written_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        nets.text_to_text(T5, PARAMS[T5], np.array(answers))
    nets.text_to_text(T5, PARAMS[T5], np.array([[1, -1], [0, 1], [2, 3]]))  # the last has no room for an end


@both
def test_the_loss_is_that_of_the_answers_tokens(net):
    loss = jax.jit(partial(nets.text_to_text(net, PARAMS[net], ANSWERS).loss, nothing, ()))
    every = [log_likelihoods(net, row) for row in range(3)]
    for weights in ((1, 1, 1), (1, 0, 1)):
        expected = -np.mean(np.concatenate([terms for terms, weight in zip(every, weights, strict=True) if weight]))
        assert_close(loss(batch(weights))[0], expected)


@both
def test_an_answer_is_the_class_whose_name_is_written(net):
    """And no class is, if what is written is no name."""
    objective = nets.text_to_text(net, PARAMS[net], ANSWERS)
    logits = jax.jit(partial(objective.predict, nothing, ()))(jnp.asarray(TOKENS))
    written = nets.greedy_decode(
        net.apply, PARAMS[net], np.maximum(TOKENS, 0), TOKENS >= 0, length=3, end=1, padding=nets.NO_TOKEN
    )
    expected = [
        next((k for k, answer in enumerate(ANSWERS) if np.array_equal(answer, row)), 3) for row in np.asarray(written)
    ]
    np.testing.assert_array_equal(logits.argmax(axis=1), expected)
    assert logits.shape == (3, 4)
    spoken = nets.text_to_text(net, PARAMS[net], np.asarray(written)[:1])
    assert spoken.predict(nothing, (), jnp.asarray(TOKENS))[0].argmax() == 0


@both
def test_real_tokens_are_those_of_texts_and_answers(net):
    real = nets.real_tokens(net, ANSWERS)
    if net is T5:
        np.testing.assert_array_equal(real("params/encoder/layers_0/output/kernel", batch()), TOKENS >= 0)
        np.testing.assert_array_equal(real("params/decoder/layers_0/output/kernel", batch()), ANSWERS >= 0)
        np.testing.assert_array_equal(real("params/decoder/layers_0/cross_key/kernel", batch()), TOKENS >= 0)
    else:
        lengths = [(TOKENS[row] >= 0).sum() + (ANSWERS[row] >= 0).sum() for row in range(3)]
        assert real("params/layers_0/output/kernel", batch()).sum(axis=1).tolist() == lengths


@both
@pytest.mark.parametrize("name", ["lora", "o_lora", "oa_adapter"])
def test_adapters_learn_to_answer_in_words(net, name):
    """Two tasks, one compilation; texts say in their first token what is right."""
    rng = np.random.default_rng(0)
    labels = np.arange(36) % 3
    inputs = np.concatenate([labels[:, None] + 10, rng.integers(13, 24, (36, 3))], axis=1).astype(np.int32)
    part = Examples(inputs, labels.astype(np.int32))
    stream = streams.data_sets([(part, part)] * 2, classes=4)

    def covers(path):
        sites = ("attention_output", "cross_output", "output") if name == "oa_adapter" else ("query", "value", "output")
        return path.endswith(tuple(f"/{site}/kernel" for site in sites))

    method = {
        "lora": lambda: adapters.lora(covers, 4, alpha=16),
        "o_lora": lambda: adapters.o_lora(covers, 4, 2, alpha=16),
        "oa_adapter": lambda: adapters.oa_adapter(covers, 4, 2, threshold=0.3, protected=4),
    }[name]()
    objective = nets.text_to_text(net, PARAMS[net], ANSWERS)
    strategy = continual.adapted_network(
        method, PARAMS[net], objective, counted=nets.real_tokens(net, ANSWERS) if method.measure else None
    )
    params = Adapted(method.init(jax.random.key(1), PARAMS[net])[0], ())
    result = continual.run(jax.random.key(2), strategy, optax.adam(2e-2), params, stream, epochs=40, batch_size=18)
    assert set(result.compilations.values()) == {1}
    history = [entry["loss"] for entry in result.history if entry["stage"] == 0]
    assert history[-1] < 0.5 * history[0]
    assert result.accuracy[0, 0] > result.untrained[0] + 0.2
