"""Batches on their way to the device: all examples laid there once, or a few batches read ahead by the host."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxcl.continual.programs import Resident, Streamed
from jaxcl.continual.sharding import DATA, Layout
from jaxcl.continual.streams import Examples, Selection
from jaxcl.typing import is_resident

_READERS, _READ_AHEAD = 2, 2  # threads, and calls' worth of batches that wait


class Batching(NamedTuple):
    """Batches that a program can take, the same for every task so that it is compiled once."""

    size: int  # B
    batches: int  # P, of the largest task
    per_call: int  # batches in one call, at most


class Call(NamedTuple):
    """What one call of a program works on: batches `position` to `position + steps` of an epoch."""

    source: Resident | Streamed
    position: int
    steps: int


def is_streamed(examples: Examples) -> bool:
    """Whether examples are read as they are needed, not laid on the device: unless they are arrays in memory.

    Several processes always stream, so that each reads only its share.
    """
    return not is_resident(examples.inputs) or jax.process_count() > 1


def one_after_another(parts: Sequence[Selection], size: int) -> Selection:
    """All parts in one, each filled up to whole batches by its last row, so that no batch has examples of two parts."""
    filled = []
    for rows, tasks in parts:
        missing = -len(rows) % size
        filled.append((np.pad(rows, (0, missing), constant_values=~rows[-1]), np.pad(tasks, (0, missing), mode="edge")))
    return Selection(*map(np.concatenate, zip(*filled, strict=True)))


class Feeder:
    """The batches of one set of examples, or of one set a seed where seeds share each step.

    Args:
        examples: one a seed; arrays of equal shapes, or for a single seed anything that `is_streamed`.
        batching: how large batches are, and how many.
        shared: whether all seeds have the same examples.
        together: whether sources have a leading seed axis.
        layout: where batches lie.
    """

    def __init__(
        self, examples: Sequence[Examples], batching: Batching, *, shared: bool, together: bool, layout: Layout
    ) -> None:
        self._examples, self._together, self._layout, self._batching = examples[0], together, layout, batching
        self._streamed = is_streamed(examples[0])
        if not self._streamed:
            whole = examples[0] if shared or not together else jax.tree.map(lambda *each: np.stack(each), *examples)
            self._inputs, self._labels = layout.place(tuple(whole))

    def steps(self, parts: Sequence[Selection]) -> int:
        """The number of batches of the seed that has most."""
        return -(-max(len(part.rows) for part in parts) // self._batching.size)

    def calls(self, parts: Sequence[Selection], first: int = 0) -> Iterator[Call]:
        """The batches of `parts` (one a seed) in their order, from number `first` on, a call's worth at a time.

        Examples are read as the calls are asked for; what lies on the device is laid there at once.
        """
        steps, per_call = self.steps(parts), self._batching.per_call
        rows, tasks = self._filled(parts)
        starts = range(first, steps, per_call)
        if self._streamed:
            return self._read(rows, tasks, starts, steps)
        placed = self._layout.place((rows, tasks), *(None,) * (rows.ndim - 1), DATA)
        source = Resident(self._inputs, self._labels, *placed)
        return (Call(source, position, min(per_call, steps - position)) for position in starts)

    def repeated(self, parts: Sequence[Selection]) -> Callable[[], Iterable[Call]]:
        """`calls` of the same parts again and again; rows are laid on the device only once."""
        if self._streamed:
            return partial(self.calls, parts)
        laid = list(self.calls(parts))
        return lambda: laid

    def _read(self, rows: np.ndarray, tasks: np.ndarray, starts: range, steps: int) -> Iterator[Call]:
        try:
            import grain  # noqa: PLC0415
        except ImportError as error:
            raise ImportError('reading examples as they are needed takes grain: pip install "jaxcl[data]"') from error
        size, _, per_call = self._batching
        shape = per_call, size
        columns = self._layout.own_columns(shape)

        def read(number: int) -> dict[int, Streamed]:
            first = starts[number]
            count = min(per_call, steps - first)
            wanted, seen_as = np.full(shape, ~rows[0, 0], np.int32), np.zeros(shape, np.int32)
            wanted[:count], seen_as[:count] = rows[first : first + count], tasks[first : first + count]
            return {start: self._piece(wanted[:, part], seen_as[:, part], first) for start, part in columns.items()}

        ahead = (
            grain.MapDataset.range(len(starts))
            .map(read)
            .to_iter_dataset(grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_READ_AHEAD))
        )
        for first, pieces in zip(starts, ahead, strict=True):
            yield Call(self._layout.join_columns(pieces, shape), first, min(per_call, steps - first))

    def _piece(self, rows: np.ndarray, tasks: np.ndarray, first: int) -> Streamed:
        """Rows [P, B], as `Resident` has them, read from the examples."""
        real = rows >= 0
        wanted = np.where(real, rows, ~rows).reshape(-1)
        inputs, labels = np.asarray(self._examples.inputs[wanted]), np.asarray(self._examples.labels)[wanted]
        inputs, labels = inputs.reshape(*rows.shape, *inputs.shape[1:]), labels.reshape(rows.shape)
        return Streamed(inputs, labels, tasks, real.astype(np.float32), np.asarray(first, np.int32))

    def _filled(self, parts: Sequence[Selection]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and tasks [P, B], as `Resident` has them; [S, P, B] together.

        An epoch's last batch is filled up with its own examples again, so that statistics of a batch are of these.
        """
        size, batches, _ = self._batching
        rows, tasks = (
            np.full((len(parts), batches * size), -1, np.int32),
            np.zeros((len(parts), batches * size), np.int32),
        )
        for seed, part in enumerate(parts):
            count = len(part.rows)
            last, missing = count - count % size, -count % size
            rows[seed, :count], tasks[seed, :count] = part
            rows[seed, count : count + missing] = ~np.resize(part.rows[last:], missing)
            tasks[seed, count : count + missing] = np.resize(part.tasks[last:], missing)
        shape = (len(parts), batches, size) if self._together else (batches, size)
        return rows.reshape(shape), tasks.reshape(shape)
