"""A masked prior over grids of tokens: trained to fill in what is hidden, sampled from a grid that is hidden whole.

MaskGIT (Chang et al. 2022) on the indices that a quantizer gives. Grids are flattened to [B, T], T positions in any
fixed order; the index K stands for a token that is hidden. Large codebooks are predicted by the digits of their
indices, the most significant first, as in MAGVIT-v2 (Yu et al. 2024): K = 262,144 takes two heads of 512 outputs.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least, check_between, check_count, check_rank


class Network(Protocol):
    """What predicts tokens: anything with Linen's `init` and `apply`, such as `nets.transformer.TokenTransformer`.

    Tokens are [B, T] int32 in [0, K], K where they are hidden; labels [B] int32, the number of classes where there is
    none. Logits are [B, T, K], or [B, T, F, radix] of the F digits of an index, with radix ** F >= K.
    """

    def init(self, key: Key, tokens: Array, labels: Array, /) -> PyTree:
        """The params for tokens [B, T] and labels [B]."""

    def apply(self, params: PyTree, tokens: Array, labels: Array, /) -> Any:
        """Logits [B, T, K] or [B, T, F, radix] of tokens [B, T] and labels [B]."""


class PriorLoss(NamedTuple):
    """What `MaskedPrior.loss` says of each example."""

    loss: Array  # [B] float32, cross-entropy of the hidden tokens, nats a hidden token
    accuracy: Array  # [B] float32, share of the hidden tokens all of whose digits were the likeliest
    masked: Array  # [B] int32, how many tokens were hidden


class _Sample(Protocol):
    def __call__(
        self,
        key: Key,
        params: PyTree,
        labels: Array | int,
        *,
        steps: int = 8,
        temperature: float = 1.0,
        choice_temperature: float = 4.5,
        guidance: float = 0.0,
    ) -> Array: ...


class _Loss(Protocol):
    def __call__(self, key: Key, params: PyTree, tokens: Array, labels: Array | None = None) -> PriorLoss: ...


class MaskedPrior(NamedTuple):
    """A masked prior over token grids: three pure functions."""

    init: Callable[[Key], PyTree]  # (key) -> params
    loss: _Loss  # (key, params, tokens [B, T], labels [B] or None) -> PriorLoss
    sample: _Sample  # (key, params, labels [B] or how many, *, steps, ...) -> tokens [B, T] int32


def masked_prior(
    network: Network, codebook_size: int, length: int, *, classes: int = 0, label_dropping: float = 0.1
) -> MaskedPrior:
    """MaskGIT's training and sampling (Chang et al. 2022, section 3) around a network.

    `loss` hides ceil(cos(pi r / 2) T) tokens of each example, r ~ U[0, 1), and is their mean cross-entropy; weigh
    examples by `masked` to weigh every hidden token alike. There is no label smoothing, where the authors have 0.1.

    Where indices are predicted by digits, these are independent given the context, and an index has their product's
    probability given that it is below K: in the loss, and where it is drawn. An index that could be one of two which
    differ in several digits can so come out as neither.

    `sample` begins with all tokens hidden. Each step draws every token that is hidden, and keeps as many of them as
    `decisions_a_step` says, those with the highest log-probability + noise * Gumbel. What is kept stays. The noise
    falls linearly to 0 at the last step, as in the authors' code. It is jitted: another number of examples or steps
    compiles anew. It takes

    - labels: classes [B] int32, or how many to sample without a class.
    - steps: 1 to T.
    - temperature: what logits are divided by where tokens are drawn; log-probabilities are those of the logits as they
      are.
    - choice_temperature: the noise, before it falls; by default that of the authors.
    - guidance: w of classifier-free guidance, logits (1 + w) conditional - w unconditional (Ho & Salimans 2022, eq. 6);
      if it is not 0, the network runs on twice as many examples. This and the temperatures are Python numbers.

    Args:
        network: predicts tokens.
        codebook_size: K.
        length: T, the tokens of an example.
        classes: how many classes there are; with 0 there are no labels.
        label_dropping: probability with which `loss` hides a label, so that the prior learns to do without.

    Raises:
        ValueError: sizes below 1 (classes below 0) or no probability; in use, tokens that are not [B, T], labels where
            there are no classes or that are not [B], a network whose logits are too few for K, or options outside the
            ranges above.
    """
    check_between("codebook_size", codebook_size, 1, 2**31 - 1)  # K itself is an index too
    check_count("length", length, 1)
    check_count("classes", classes, 0)
    check_between("label_dropping", label_dropping, 0, 1)

    def predict(params: PyTree, tokens: Array, labels: Array, guidance: float | None = None) -> Array:
        """[B, T, F, radix] float32."""
        if guidance is not None:
            none = jnp.full_like(labels, classes)
            both = predict(params, jnp.concatenate([tokens, tokens]), jnp.concatenate([labels, none]))
            conditional, unconditional = jnp.split(both, 2)
            return (1 + guidance) * conditional - guidance * unconditional
        logits = network.apply(params, tokens, labels)
        logits = logits[:, :, None] if logits.ndim == 3 else logits
        check_rank("logits", logits, 4)
        digits, radix = logits.shape[2:]
        if radix**digits < codebook_size:
            fix = f"{codebook_size} codes need a network with more outputs"
            raise bad_argument("logits", f"{digits} digits in radix {radix}", fix)
        return logits.astype(jnp.float32)

    def init(key: Key) -> PyTree:
        return network.init(key, jnp.zeros((1, length), jnp.int32), jnp.zeros(1, jnp.int32))

    def loss(key: Key, params: PyTree, tokens: Array, labels: Array | None = None) -> PriorLoss:
        if tokens.ndim != 2 or tokens.shape[1] != length:
            raise bad_argument("tokens", f"shape {tuple(tokens.shape)}", f"pass [B, {length}], grids flattened")
        examples = len(tokens)
        ratio_key, choice_key, label_key = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(label_key, label_dropping, (examples,))
        labels = jnp.where(dropped, classes, _labels(labels, examples, classes))
        # cos is above 0 up to rounding: at least one token is hidden, and the mean is over something.
        ratio = jnp.cos(jnp.pi / 2 * jax.random.uniform(ratio_key, (examples,)))
        masked = jnp.clip(jnp.ceil(ratio * length).astype(jnp.int32), 1, length)
        hidden = _first(jax.random.uniform(choice_key, tokens.shape), masked)
        logits = predict(params, jnp.where(hidden, codebook_size, tokens), labels)
        digits, radix = logits.shape[2:]
        right = (logits.argmax(axis=-1) == to_digits(tokens, radix, digits)).all(axis=-1)

        def mean(values: Array) -> Array:
            return jnp.where(hidden, values, 0).sum(axis=1) / masked

        return PriorLoss(mean(-_log_probabilities(logits, tokens, codebook_size)), mean(right), masked)

    def sample(
        key: Key,
        params: PyTree,
        labels: Array | int,
        *,
        steps: int = 8,
        temperature: float = 1.0,
        choice_temperature: float = 4.5,
        guidance: float = 0.0,
    ) -> Array:
        check_at_least("temperature", temperature, 1e-6)
        check_at_least("choice_temperature", choice_temperature, 0)
        check_at_least("guidance", guidance, 0)
        if isinstance(labels, int):
            check_count("labels", labels, 1)
            labels = _labels(None, labels, classes)
        else:
            labels = _labels(labels, len(labels), classes)
        decisions = jnp.asarray(decisions_a_step(length, steps), jnp.int32)
        numbers = temperature, choice_temperature, guidance or None  # none is another program, without a second half
        return _decode(predict, codebook_size, length, key, params, labels, decisions, *numbers)

    return MaskedPrior(init, loss, sample)


def decisions_a_step(length: int, steps: int) -> list[int]:
    """How many of T tokens each step decides, T in all (Chang et al. 2022, sections 3.2 and 3.3).

    After step t of t = 1 to `steps`, floor(T cos(pi t / (2 steps))) tokens are still hidden; but each step decides one
    at least, as in the authors' code.

    Raises:
        ValueError: steps below 1 or above T.
    """
    check_between("steps", steps, 1, length)
    hidden = [length]
    for step in range(1, steps + 1):
        # Rounded first: cos(pi / 3) is 1/2, give or take a rounding error.
        hidden.append(min(hidden[-1] - 1, math.floor(round(length * math.cos(math.pi * step / (2 * steps)), 9))))
    return [before - after for before, after in itertools.pairwise(hidden)]


def smallest_radix(codebook_size: int, digits: int) -> int:
    """The smallest radix in which `digits` digits tell K codes apart: the root, rounded up without rounding errors.

    Raises:
        ValueError: K or digits below 1.
    """
    check_count("codebook_size", codebook_size, 1)
    check_count("digits", digits, 1)
    radix = max(1, round(codebook_size ** (1 / digits)))
    return next(size for size in (radix - 1, radix, radix + 1) if size**digits >= codebook_size)


def to_digits(indices: Array, radix: int, digits: int) -> Array:
    """Digits [..., F] of indices [...], the most significant first, in [0, radix)."""
    powers = radix ** np.arange(digits - 1, -1, -1, dtype=np.int32)
    return indices[..., None] // powers % radix


@partial(jax.jit, static_argnames=("predict", "codebook_size", "length"))
def _decode(
    predict: Callable[[PyTree, Array, Array, float | None], Array],
    codebook_size: int,
    length: int,
    key: Key,
    params: PyTree,
    labels: Array,
    decisions: Array,
    temperature: float,
    choice_temperature: float,
    guidance: float | None,
) -> Array:
    """Tokens [B, T], as many of an example decided in each step as `decisions` [steps] says, whose sum is T."""
    steps = len(decisions)

    def step(tokens: Array, inputs: tuple[Key, Array, Array]) -> tuple[Array, None]:
        (draw_key, noise_key), count, noise = inputs
        logits = predict(params, tokens, labels, guidance)
        drawn = _draw(draw_key, logits / temperature, codebook_size)
        confidence = _log_probabilities(logits, drawn, codebook_size)
        confidence += noise * jax.random.gumbel(noise_key, tokens.shape)
        keep = _first(-confidence, count, tokens < codebook_size)
        return jnp.where(keep, drawn, tokens), None

    noises = choice_temperature * (1 - jnp.arange(1, steps + 1) / steps)
    hidden = jnp.full((len(labels), length), codebook_size, jnp.int32)
    return lax.scan(step, hidden, (jax.random.split(key, (steps, 2)), decisions, noises))[0]


def _labels(labels: Array | None, examples: int, classes: int) -> Array:
    """Labels [B] int32: those given, or `classes`, which stands for none."""
    if labels is None:
        return jnp.full(examples, classes, jnp.int32)
    if not classes:
        raise bad_argument("labels", f"shape {tuple(labels.shape)}", "this prior has no classes: give it `classes`")
    if labels.shape != (examples,):
        raise bad_argument("labels", f"shape {tuple(labels.shape)}", f"pass [{examples}], one an example")
    return jnp.asarray(labels, jnp.int32)


def _first(scores: Array, count: Array, last: Array | None = None) -> Array:
    """Whether each score is among the `count` lowest of its row [B, T] bool; those that are `last` come last."""
    order = jnp.argsort(scores, axis=-1) if last is None else jnp.lexsort((scores, last), axis=-1)
    rank = jnp.argsort(order, axis=-1)  # the inverse permutation: no ties, so that the count is exact
    return rank < jnp.expand_dims(count, -1)


def _limits(log_p: Array, codebook_size: int) -> tuple[list[Array], Array]:
    """What keeps an index below K, from the log-probabilities [B, T, F, radix] of its digits.

    As long as an index's digits equal those of K - 1, the next one may be lower, after which all is allowed; equal,
    after which the rest must keep the limit too; but not higher. Returns, for each digit and each of its values, how
    probable it is in that case that the rest keeps the limit, [B, T, radix], a logarithm; and the log-probability
    [B, T] that an index does.
    """
    digits, radix = log_p.shape[2:]
    limit, values = to_digits(jnp.asarray(codebook_size - 1), radix, digits), jnp.arange(radix)
    weights: list[Array] = []
    below = jnp.zeros(log_p.shape[:2])
    for number in reversed(range(digits)):
        weight = jnp.where(values == limit[number], below[..., None], jnp.where(values > limit[number], -jnp.inf, 0.0))
        below = jax.nn.logsumexp(log_p[:, :, number] + weight, axis=-1)
        weights.insert(0, weight)
    return weights, below


def _log_probabilities(logits: Array, tokens: Array, codebook_size: int) -> Array:
    """Log-probability [B, T] of tokens [B, T] under logits [B, T, F, radix], given that an index is below K."""
    digits, radix = logits.shape[2:]
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, to_digits(tokens, radix, digits)[..., None], axis=-1)[..., 0]
    return chosen.sum(axis=-1) - _limits(log_p, codebook_size)[1]


def _draw(key: Key, logits: Array, codebook_size: int) -> Array:
    """Tokens [B, T] below K drawn from logits [B, T, F, radix], digit by digit."""
    digits, radix = logits.shape[2:]
    limit = to_digits(jnp.asarray(codebook_size - 1), radix, digits)
    log_p = jax.nn.log_softmax(logits)
    noise = jax.random.gumbel(key, logits.shape)  # what is largest with it is a draw
    tokens = jnp.zeros(logits.shape[:2], jnp.int32)
    at_limit = jnp.ones(logits.shape[:2], bool)
    for number, weight in enumerate(_limits(log_p, codebook_size)[0]):
        scores = log_p[:, :, number] + jnp.where(at_limit[..., None], weight, 0.0)
        digit = jnp.argmax(scores + noise[:, :, number], axis=-1).astype(jnp.int32)
        at_limit &= digit == limit[number]
        tokens = tokens * radix + digit
    return tokens
