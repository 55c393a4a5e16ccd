"""Training values that vote, for many epochs on one task, without touching their table: the same rule in its dual.

A step of gradient descent moves each value by the updates of the examples that fetch it. So what a task has made of the
values is known from one row an example, the sum of its updates; and the votes of example n have moved by the rows of
all examples i, each taken as often as n and i fetch the same pair, over C. Those counts never change. A step is then a
product [B, N] x [N, K] in place of B C reads and B C writes at random in a table.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.bottleneck.layer import pair_numbers, vote
from jaxcl.trees import Rows, add_rows
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_between, check_labels, check_rank

_ROWS = 256  # examples whose coincidences are counted at a time


class TaskVotes(NamedTuple):
    """A task's examples, and what training on them has moved."""

    indices: Array  # [N, C, top_k]
    labels: Array  # [N] int32
    coincidences: Array  # [N, N] uint16, in how many codebooks (and places of top_k) two examples fetch the same pair
    before: Array  # [N, K], votes when the task began
    moves: Array  # [N, K], the sum of each example's updates of every value that it fetches


@jax.jit
def coincidences(indices: Array) -> Array:
    """How many pairs each two examples both fetch: [N, N] uint16 from indices [N, C, top_k]."""
    count, codebooks, top_k = indices.shape
    columns = jnp.asarray(indices).reshape(count, -1)
    # What is compared: in each codebook, each place of top_k with each.
    first, others = np.repeat(np.arange(top_k), top_k), np.tile(np.arange(top_k), top_k)
    starts = top_k * np.arange(codebooks)[:, None]
    ours, theirs = columns[:, (starts + first).reshape(-1)], columns[:, (starts + others).reshape(-1)].T

    def of_example(fetched: Array) -> Array:
        def add(number: Array | int, counts: Array) -> Array:
            return counts + (fetched[number] == theirs[number]).astype(jnp.uint16)

        # Several comparisons in one pass over the counts.
        return lax.fori_loop(0, len(theirs), add, jnp.zeros(count, jnp.uint16), unroll=16)

    return lax.map(of_example, ours, batch_size=_ROWS)


def begin_votes(params: PyTree, indices: ArrayLike, labels: ArrayLike, *, classes: int) -> TaskVotes:
    """The task before any training on it; the counts take 2 N^2 bytes.

    Args:
        params: of a bottleneck, values [C, J, V].
        indices: what each of the task's examples fetches, [N, C, top_k], as `Bottleneck.lookup` gives it.
        labels: [N].
        classes: K, at most V.

    Raises:
        ValueError: an argument of another shape, or more than 65,535 pairs an example, which the counts cannot hold.
    """
    indices, values = jnp.asarray(indices), params["values"]
    check_rank("indices", indices, 3)
    check_between("classes", classes, 1, values.shape[-1])
    if len(labels) != len(indices):
        raise bad_argument("labels", f"{len(labels)} of them", f"pass one for each of {len(indices)} examples")
    check_labels("labels", labels, classes)
    check_between("C * top_k", indices.shape[1] * indices.shape[2], 1, 2**16 - 1)
    table = values.reshape(-1, values.shape[-1])
    before = vote(table[pair_numbers(indices, values.shape[1])])[:, :classes]
    return TaskVotes(indices, jnp.asarray(labels, jnp.int32), coincidences(indices), before, jnp.zeros_like(before))


@partial(jax.jit, donate_argnums=0)
def train_votes(
    votes: TaskVotes, order: Array, *, learning_rate: float, label_smoothing: float = 0.1
) -> tuple[TaskVotes, Array]:
    """Steps of gradient descent on the cross entropy of the vote, in one compiled call.

    As `continual.key_value_bottleneck` with `sparse_sgd`, to rounding. The published clipping, to a norm of 1, is left
    out: the norm of such a gradient is at most ``sqrt(2 top_k / C)``.

    Args:
        votes: the task; consumed.
        order: [P, B] int32, the examples of each step, distinct; -1 fills up, whole steps too, which then do nothing:
            other sizes compile anew.
        learning_rate: constant; 0.3 is published.
        label_smoothing: 0.1 is published.

    Returns:
        (the task after P steps, the mean loss over them [] in nats).
    """
    codebooks, classes = votes.indices.shape[1], votes.moves.shape[1]

    def step(number: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        moves, loss = carry
        rows = order[number]
        real = rows >= 0
        rows = jnp.where(real, rows, len(moves))  # out of range: read as anything, written nowhere
        counts, before, labels = (
            part.at[rows].get(mode="clip") for part in (votes.coincidences, votes.before, votes.labels)
        )
        moved = jnp.matmul(counts.astype(jnp.float32), moves, precision=lax.Precision.HIGHEST)[:, :classes]
        logits = before + moved / codebooks
        target = jax.nn.one_hot(labels, classes) * (1 - label_smoothing) + label_smoothing / classes
        share = (real / jnp.maximum(real.sum(), 1))[:, None]
        loss -= jnp.sum(target * jax.nn.log_softmax(logits) * share).astype(jnp.float32)
        gradients = (jax.nn.softmax(logits) - target) * share / codebooks  # of the values that each example fetches
        update = jnp.pad(-learning_rate * gradients, ((0, 0), (0, moves.shape[1] - classes)))
        return moves.at[rows].add(update, mode="drop"), loss

    # With whole cache lines a step takes nine tenths of the time on CPU (10 classes, measured).
    moves = jnp.pad(votes.moves, ((0, 0), (0, -classes % 16)))
    moves, loss = lax.fori_loop(0, len(order), step, (moves, jnp.float32(0)))
    steps = jnp.maximum((order >= 0).any(axis=1).sum(), 1)
    return votes._replace(moves=moves[:, :classes]), loss / steps


@jax.jit
def end_votes(params: PyTree, votes: TaskVotes) -> PyTree:
    """The params with the values as training on the task left them."""
    values = params["values"]
    columns = jnp.pad(votes.moves, ((0, 0), (0, values.shape[-1] - votes.moves.shape[1])))
    moved = jnp.broadcast_to(columns[:, None, None], (*votes.indices.shape, values.shape[-1]))
    return params | {"values": add_rows(values, Rows(pair_numbers(votes.indices, values.shape[1]), moved))}
