"""Relative entropy coding: which of the shared candidates stands for a sample of a posterior, in about its KL in bits.

Sender and receiver draw the same candidates z from the prior p. Each arrives at a time of a race, and the one that
minimises time / (q / p)(z) wins; its number is the message. The coders differ in the arrivals alone. All of them take
blocks of weights side by side, look at candidates in chunks, and hold no more than one chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import threefry
from jaxcl.gaussian import Gaussian
from jaxcl.typing import Array, ArrayLike, Key, bad_argument, check_between, check_count, check_rank

MOST_BITS = 30  # of an index
_CHUNK = 1 << 18  # candidates of all blocks that are looked at together, about


class Encoded(NamedTuple):
    """What a coder found for M blocks."""

    indices: Array  # [M] uint32, of the candidates that won
    decided: Array  # [M] bool, whether no candidate that was not looked at could have won
    # Of the candidates that were looked at, how many depends on where the race could be broken off, and on its chunks.
    effective_sample_size: Array  # [M], by their weights q / p
    log_normaliser: Array  # [M], the logarithm of their mean weight in nats; with enough candidates it is near 0


class Coder(NamedTuple):
    """A way to pick candidates, and how many there may be."""

    # (key, seed, blocks, q, p) -> what was found; see `mrc`
    encode: Callable[[Key, ArrayLike | int, ArrayLike, Gaussian, Gaussian], Encoded]
    bits: int  # an index is below 2^bits


def mrc(bits: int) -> Coder:
    """Minimal random coding (Havasi, Peharz and Hernandez-Lobato 2018, arXiv 1810.00440, algorithm 1): MIRACLE's.

    One of 2^bits candidates is drawn with a probability in proportion to its weight q / p, and its number takes all the
    bits. The sample follows q the better, the further bits exceed the KL.

    `encode` of this and the other coders takes a key, which is the sender's own and is consumed; the seed of the
    candidates, an integer in [0, 2^32); the numbers of M blocks, uint32 [M]; and posterior and prior, whose leaves
    are [M, W]. It is jitted. A block's candidates and arrivals depend on its number and no other block: they can be
    coded in any groups, and split over devices.

    Raises:
        ValueError: bits outside 1 to 30; in `encode`, no block, or means that are not [M, W].
    """
    return _coder(bits, _independent_arrivals)


def orc(bits: int) -> Coder:
    """Ordered random coding (Theis and Yosri 2022, arXiv 2110.12805): as `mrc`, with indices that tend to be low.

    Arrivals are those of `mrc` in rising order, which leaves the sample's distribution as it was, and an entropy coder
    needs less than `bits` for an index. A race ends early where no later candidate can win.

    Raises:
        ValueError: as `mrc`.
    """
    return _coder(bits, _ordered_arrivals)


def astar(bits: int) -> Coder:
    """A* coding with a global bound (Flamich, Markou and Hernandez-Lobato 2022, arXiv 2201.12857): exact samples of q.

    Candidates arrive by a Poisson process until none that comes later can win, which the largest possible weight
    tells. That takes about exp(max log q / p) of them; indices have an entropy of at most KL + log2(KL + 1) + 4 bits
    (Li and El Gamal 2018). A block that 2^bits candidates leave undecided keeps the best, and `decided` says so.

    Raises:
        ValueError: as `mrc`.
    """
    return _coder(bits, _poisson_arrivals)


class _Arrivals(NamedTuple):
    times: Array  # [M, n], of a chunk of candidates
    next: Array  # [M], before which no later one arrives


# (waits [M, n] of a chunk, the chunk before's `next` [M], numbers of candidates [n], how many there are) -> arrivals
_Process = Callable[[Array, Array, Array, int], _Arrivals]


def _independent_arrivals(waits: Array, before: Array, numbers: Array, count: int) -> _Arrivals:
    return _Arrivals(waits, jnp.where(numbers[-1] + 1 == count, jnp.inf, before))


def _ordered_arrivals(waits: Array, before: Array, numbers: Array, count: int) -> _Arrivals:
    """Order statistics of `count` exponential times: between two of them, those still to come race."""
    times = before[:, None] + jnp.cumsum(waits / (count - numbers).astype(jnp.float32), axis=1)
    return _Arrivals(times, jnp.where(numbers[-1] + 1 == count, jnp.inf, times[:, -1]))


def _poisson_arrivals(waits: Array, before: Array, _: Array, __: int) -> _Arrivals:
    times = before[:, None] + jnp.cumsum(waits, axis=1)
    return _Arrivals(times, times[:, -1])


def _coder(bits: int, process: _Process) -> Coder:
    check_between("bits", bits, 1, MOST_BITS)
    check_count("bits", bits, 1)

    def encode(key: Key, seed: ArrayLike | int, blocks: ArrayLike, q: Gaussian, p: Gaussian) -> Encoded:
        check_rank("q.mean", q.mean, 2)
        if isinstance(seed, int):
            check_between("seed", seed, 0, 2**32 - 1)
        numbers = jnp.asarray(blocks, jnp.uint32)
        if not numbers.size or q.mean.shape[0] != numbers.size:
            raise bad_argument(
                "blocks", f"{numbers.size} for means of shape {q.mean.shape}", "pass one a row, at least one"
            )
        return _race(key, jnp.asarray(seed, jnp.uint32), numbers, q, p, count=2**bits, process=process)

    return Coder(encode, bits)


class _Race(NamedTuple):
    """How races stand after some chunks."""

    chunk: Array  # [] int32, of the next one
    next: Array  # [M], before which no later candidate arrives
    best: Array  # [M], log weight - log time of the one ahead
    winner: Array  # [M] uint32, its number
    decided: Array  # [M] bool
    seen: Array  # [M], candidates
    top: Array  # [M], the largest log weight
    total: Array  # [M], of weights, over exp(top)
    squares: Array  # [M], of their squares, over exp(2 top)


@partial(jax.jit, static_argnames=("count", "process"))
def _race(
    key: Key, seed: Array, blocks: Array, q: Gaussian, p: Gaussian, *, count: int, process: _Process
) -> Encoded:  # fmt: skip
    """Races of M blocks with `count` candidates at most."""
    q, p = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), (q, p))
    delta = (q.mean - p.mean) / p.scale
    ratio = jnp.broadcast_to(q.scale / p.scale, delta.shape)
    bound = _largest_log_weight(delta, ratio)
    own_key = tuple(jax.random.bits(key, (2,), jnp.uint32))
    size = min(count, 1 << max(_CHUNK // len(blocks), 1).bit_length() - 1)

    def advance(race: _Race) -> _Race:
        numbers = race.chunk.astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32)
        log_weights = _log_weights(seed, blocks, numbers, delta, ratio)
        words, _ = threefry.threefry_2x32(own_key, (blocks[:, None], numbers[None]))
        arrivals = process(threefry.exponential_of_word(words), race.next, numbers, count)
        scores = log_weights - jnp.log(arrivals.times)
        score = scores.max(axis=1)
        # Not argmax, which XLA:CPU does one by one
        ahead = jnp.where(scores == score[:, None], numbers, numbers[-1]).min(axis=1)
        better = (score > race.best) & ~race.decided
        best = jnp.where(better, score, race.best)
        top = jnp.maximum(race.top, jnp.where(race.decided, race.top, log_weights.max(axis=1)))
        weights = jnp.where(race.decided[:, None], 0, jnp.exp(log_weights - top[:, None]))
        shrink = jnp.exp(race.top - top)
        ended = jnp.isinf(arrivals.next) | (bound - jnp.log(arrivals.next) < best)
        return _Race(
            race.chunk + 1, arrivals.next, best, jnp.where(better, ahead, race.winner),
            race.decided | ended, race.seen + jnp.where(race.decided, 0, size),
            top, race.total * shrink + weights.sum(axis=1), race.squares * shrink**2 + (weights**2).sum(axis=1),
        )  # fmt: skip

    zeros = jnp.zeros_like(bound)
    start = _Race(
        jnp.zeros((), jnp.int32), zeros, zeros - jnp.inf, jnp.zeros(bound.shape, jnp.uint32), zeros > 0, zeros,
        zeros - jnp.inf, zeros, zeros,
    )  # fmt: skip
    end = jax.lax.while_loop(lambda race: (race.chunk < count // size) & ~jnp.all(race.decided), advance, start)
    return Encoded(end.winner, end.decided, end.total**2 / end.squares, end.top + jnp.log(end.total / end.seen))


def _log_weights(seed: Array, blocks: Array, numbers: Array, delta: Array, ratio: Array) -> Array:
    """Log q / p [M, n] of candidates, in units of the prior, with q = N(delta, ratio^2), both [M, W].

    A scan over pairs of weights, because two words come of one counter and no more is held than the sums.
    """
    odd = delta.shape[1] % 2  # a weight that is as in the prior adds nothing
    pairs = [
        jnp.pad(leaf, ((0, 0), (0, odd)), constant_values=neutral).T.reshape(-1, 2, len(blocks), 1)
        for leaf, neutral in ((delta, 0), (1 / ratio, 1))
    ]

    def add(total: Array, pair: tuple[Array, ...]) -> tuple[Array, None]:
        number, delta, precision = pair
        words = threefry.threefry_2x32((seed, blocks[:, None]), (numbers[None], number))
        for side, word in enumerate(words):
            z = threefry.normal_of_word(word)
            total += 0.5 * (z**2 - ((z - delta[side]) * precision[side]) ** 2)
        return total, None

    zero = jnp.zeros((len(blocks), len(numbers)), delta.dtype)
    total, _ = jax.lax.scan(add, zero, (jnp.arange(len(pairs[0]), dtype=jnp.uint32), *pairs))
    return total - jnp.log(ratio).sum(axis=1, keepdims=True)


def _largest_log_weight(delta: Array, ratio: Array) -> Array:
    """The supremum over z of log q / p [M]: infinite where a scale is the prior's or more, unless all else is equal."""
    below = ratio < 1
    room = jnp.where(below, 1 - ratio**2, 1)
    finite = 0.5 * delta**2 / room - jnp.log(ratio)
    equal = (ratio == 1) & (delta == 0)
    return jnp.where(below, finite, jnp.where(equal, 0, jnp.inf)).sum(axis=1)
