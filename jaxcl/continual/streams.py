"""Streams of tasks over in-memory examples.

A stream never copies its examples: a task is a set of row numbers, and what differs between domains (a permutation, a
rotation) is a pure function applied to each batch as it is read. So every task has the same shapes, and one compiled
program serves them all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.continual.views import as_they_are, permute, rotate, rotation
from jaxcl.typing import (
    Array,
    ArrayLike,
    Key,
    PyTree,
    RandomAccess,
    bad_argument,
    check_array,
    check_between,
    check_count,
    check_finite,
    check_labels,
    check_rank,
    is_resident,
)

View = Callable[[PyTree, Array, Array], Array]
Prepare = Callable[[Array], Array]  # inputs [B, ...] -> inputs [B, ...]
Augment = Callable[[Key, Array], Array]  # (key, inputs [B, ...]) -> inputs [B, ...]


class Examples(NamedTuple):
    """Inputs and their classes."""

    inputs: ArrayLike | RandomAccess  # [N, ...]; what is no array in memory is read as it is needed
    labels: ArrayLike  # [N] integers in [0, K)


class Selection(NamedTuple):
    """Which examples, each seen as an example of which task."""

    rows: np.ndarray  # [M] int32
    tasks: np.ndarray  # [M] int32


class Pipeline(NamedTuple):
    """What is done to the batches of a stream, and whether the method is told their task at test time."""

    prepare: Prepare | None
    view: View
    augment: Augment | None
    task_known: bool


class Stream(NamedTuple):
    """Tasks that come one after another."""

    train: Examples
    test: Examples
    train_sets: tuple[Selection, ...]  # one a training stage: T of them, or one if trained jointly
    test_sets: tuple[Selection, ...]  # one a task
    eligible: np.ndarray  # [T, K] bool, the classes an answer may come from in each task
    task_known: bool  # whether the method is told the task at test time
    view: View  # (view_table, inputs [B, ...], tasks [B]) -> inputs [B, ...], as their tasks show them
    view_table: PyTree  # arrays that `view` reads
    prepare: Prepare | None = None  # what is done to each batch on the device, before `view`: normalisation, say
    augment: Augment | None = None  # what is done to it in training steps only, after `view`
    trained: np.ndarray | None = None  # [T, K] bool, as `eligible`, in training steps; None is the same as there

    @property
    def eligible_in_training(self) -> np.ndarray:
        """[T, K] bool, the classes the answer of a training step may come from."""
        return self.eligible if self.trained is None else self.trained

    @property
    def pipeline(self) -> Pipeline:
        """The stream without its data."""
        return Pipeline(self.prepare, self.view, self.augment, self.task_known)


def class_incremental(
    key: Key | None, train: Examples, test: Examples, *, classes_per_task: int | Sequence[int]
) -> Stream:
    """Each task brings new classes; at test time any class may be the answer and no task is told.

    Args:
        key: decides the order of classes; None leaves them in numerical order.
        train: examples to learn from; there are as many classes as the largest label says.
        test: examples to be tested on.
        classes_per_task: one number for all tasks, or one a task; they must add up to the number of classes.

    Raises:
        ValueError: labels out of range, NaN in the inputs, lengths that differ, or a task without examples.
    """
    return _by_class(key, train, test, classes_per_task, told=False)


def task_incremental(
    key: Key | None, train: Examples, test: Examples, *, classes_per_task: int | Sequence[int]
) -> Stream:
    """As `class_incremental`, but the task is told at test time and only its own classes may be the answer.

    One output a class of each task, the others left out of the loss and of the answer, is a head a task.
    """
    return _by_class(key, train, test, classes_per_task, told=True)


def blurry(key: Key, train: Examples, test: Examples, *, classes_per_task: int | Sequence[int], share: float) -> Stream:
    """As `class_incremental`, but with no clean borders: a share of each task's training examples comes in others.

    Those examples, drawn at random, are dealt out evenly over the other tasks ("Blurry-M", Bang et al. 2021, where
    `share` is M / 100). Test sets are those of `class_incremental`.

    Args:
        key: as in `class_incremental`, and decides which examples come in which task.
        train: as in `class_incremental`.
        test: as in `class_incremental`.
        classes_per_task: as in `class_incremental`; two tasks or more.
        share: from 0 to 1.

    Raises:
        ValueError: as `class_incremental`; fewer than two tasks, a share out of range, or a task left without examples.
    """
    check_between("share", share, 0, 1)
    order_key, deal_key = jax.random.split(key)
    stream = class_incremental(order_key, train, test, classes_per_task=classes_per_task)
    tasks = len(stream.train_sets)
    check_count("tasks", tasks, 2)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(deal_key)))
    parts: list[list[np.ndarray]] = [[] for _ in range(tasks)]
    for own, selection in enumerate(stream.train_sets):
        rows = rng.permutation(selection.rows)
        moved = round(share * len(rows))
        others = [task for task in range(tasks) if task != own]
        parts[own].append(rows[moved:])
        for task, dealt in zip(rng.permutation(others), np.array_split(rows[:moved], tasks - 1), strict=True):
            parts[task].append(dealt)
    sets = []
    for task, of_task in enumerate(parts):
        rows = np.sort(np.concatenate(of_task))
        if not len(rows):
            raise bad_argument("share", share, f"task {task} is left without examples: pass a smaller one")
        sets.append(Selection(rows, np.full(len(rows), task, np.int32)))
    return stream._replace(train_sets=tuple(sets))


def permuted(key: Key, train: Examples, test: Examples, *, tasks: int) -> Stream:
    """Domain-incremental: in each task the same examples with their input values in another order; the first as it is.

    Arguments and errors as in `class_incremental`; `tasks` is T.
    """
    check_count("tasks", tasks, 1)
    classes = _check_split(train, test)
    width = int(np.prod(train.inputs.shape[1:]))
    orders = jax.vmap(lambda key: jax.random.permutation(key, width))(jax.random.split(key, tasks))
    return _by_domain(train, test, classes, tasks, permute, orders.at[0].set(jnp.arange(width)))


def rotated(train: Examples, test: Examples, *, degrees: Sequence[float]) -> Stream:
    """Domain-incremental: in each task the same images, turned counter-clockwise about their middle by some degrees.

    Values between pixels are interpolated linearly; what comes from outside the image is 0. Images are [N, H, W] or
    [N, H, W, channels]. Other arguments and errors as in `class_incremental`.
    """
    classes = _check_split(train, test)
    check_count("degrees, their number", len(degrees), 1)
    check_finite("degrees", np.asarray(degrees, np.float64))
    check_rank("train.inputs", train.inputs, 3, 4)
    tables = [rotation(angle, *train.inputs.shape[1:3]) for angle in degrees]
    places, weights = (jnp.asarray(np.stack(table)) for table in zip(*tables, strict=True))
    return _by_domain(train, test, classes, len(degrees), rotate, (places, weights))


def data_sets(tasks: Sequence[tuple[Examples, Examples]], *, classes: int) -> Stream:
    """Each task is a data set of its own, in one space of labels that they may share; no task is told.

    Args:
        tasks: what each is to learn from and to be tested on, in memory; inputs all of one shape but for their number.
        classes: K.

    Raises:
        ValueError: as `class_incremental`; no tasks.
    """
    check_count("tasks, their number", len(tasks), 1)

    def together(parts: Sequence[Examples]) -> tuple[Examples, tuple[Selection, ...]]:
        whole = Examples(
            np.concatenate([np.asarray(part.inputs) for part in parts]),
            np.concatenate([np.asarray(part.labels, np.int32) for part in parts]),
        )
        ends = np.cumsum([len(part.labels) for part in parts])
        rows = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
        return whole, tuple(Selection(own, np.full(len(own), task, np.int32)) for task, own in enumerate(rows))

    for number, pair in enumerate(tasks):
        for name, part in zip((f"tasks[{number}], train", f"tasks[{number}], test"), pair, strict=True):
            check_examples(name, part, classes)
            if part.inputs.shape[1:] != tasks[0][0].inputs.shape[1:]:
                raise bad_argument(name, f"inputs {part.inputs.shape}", "make all of one shape but for their number")
    (train, train_sets), (test, test_sets) = (together(parts) for parts in zip(*tasks, strict=True))
    everything = np.ones((len(tasks), classes), bool)
    return Stream(train, test, train_sets, test_sets, everything, False, as_they_are, ())


def reordered(stream: Stream, order: Sequence[int]) -> Stream:
    """The stream with its tasks in another order: first that of number ``order[0]``, and so on; data are shared.

    Raises:
        ValueError: `order` does not have each task once, or the stream is joint.
    """
    tasks = len(stream.test_sets)
    if sorted(order) != list(range(tasks)) or len(stream.train_sets) != tasks:
        raise bad_argument("order", list(order), f"pass each of 0 to {tasks - 1} once, and a stream of tasks in turn")

    def moved(parts: tuple[Selection, ...]) -> tuple[Selection, ...]:
        return tuple(
            Selection(parts[old].rows, np.full_like(parts[old].tasks, new)) for new, old in enumerate(order)
        )  # fmt: skip

    of_tasks = np.asarray(order)
    return stream._replace(
        train_sets=moved(stream.train_sets), test_sets=moved(stream.test_sets), eligible=stream.eligible[of_tasks],
        view_table=jax.tree.map(lambda leaf: leaf[of_tasks], stream.view_table),
        trained=None if stream.trained is None else stream.trained[of_tasks],
    )  # fmt: skip


def trained_apart(stream: Stream) -> Stream:
    """The stream in whose training steps only classes of an example's own task may be the answer.

    So a task's loss neither raises nor lowers what other tasks' classes come to; at test time nothing is restricted.
    """
    labels = np.asarray(stream.train.labels)
    trained = np.zeros_like(stream.eligible)
    for rows, tasks in stream.train_sets:
        trained[tasks, labels[rows]] = True
    return stream._replace(trained=trained)


def joint(stream: Stream) -> Stream:
    """One training stage over all tasks of `stream` at once, tested on each: the ceiling for learning in turn."""
    rows = np.concatenate([selection.rows for selection in stream.train_sets])
    tasks = np.concatenate([selection.tasks for selection in stream.train_sets])
    return stream._replace(train_sets=(Selection(rows, tasks),), trained=None)


def map_inputs(stream: Stream, function: Callable[[Array], ArrayLike], *, batch_size: int = 1024) -> Stream:
    """The stream with `function` applied to all inputs once: a frozen encoder, or the look-up of keys.

    Where each task shows the inputs in its own way (permuted, rotated), the new stream has every example once for each
    task, so T times as many.

    Args:
        stream: any stream without `augment`, which would see features.
        function: inputs [B, ...] -> outputs [B, ...], called on batches of one shape: pass it jitted.
        batch_size: B; the last batch is filled up with its last example, and cut.

    Raises:
        ValueError: the stream has `augment`.
    """
    if stream.augment:
        raise bad_argument("stream", "one with `augment`", "map a stream without, since its inputs are seen only once")
    check_count("batch_size", batch_size, 1)
    tasks = range(1 if stream.view is as_they_are else len(stream.eligible))

    def apply(examples: Examples) -> Examples:
        inputs, parts = examples.inputs, []
        for task in tasks:
            for start in range(0, len(inputs), batch_size):
                rows = np.minimum(np.arange(start, start + batch_size), len(inputs) - 1)
                batch = jnp.asarray(inputs[rows])
                if stream.prepare:
                    batch = stream.prepare(batch)
                shown = stream.view(stream.view_table, batch, jnp.full(batch_size, task))
                parts.append(np.asarray(function(shown))[: len(inputs) - start])
        labels = examples.labels if len(tasks) == 1 else np.tile(np.asarray(examples.labels), len(tasks))
        return Examples(np.concatenate(parts), labels)

    def move(selections: tuple[Selection, ...], count: int) -> tuple[Selection, ...]:
        """Task t's copies of the examples begin at t times their number."""
        if len(tasks) == 1:
            return selections
        return tuple(part._replace(rows=part.rows + part.tasks * np.int32(count)) for part in selections)

    return stream._replace(
        train=apply(stream.train),
        test=apply(stream.test),
        train_sets=move(stream.train_sets, len(stream.train.labels)),
        test_sets=move(stream.test_sets, len(stream.test.labels)),
        view=as_they_are,
        view_table=(),
        prepare=None,
    )


def check_examples(argument: str, examples: Examples, classes: int) -> None:
    """Raises ValueError unless there are as many inputs as labels, at least one, and labels are in `[0, classes)`.

    Inputs in memory must be finite.
    """
    _check_kinds(argument, examples)
    counts = f"{len(examples.inputs)} inputs and {len(examples.labels)} labels"
    if not len(examples.labels):
        raise bad_argument(argument, counts, "pass one example or more")
    check_labels(f"{argument}.labels", examples.labels, classes)
    if len(examples.inputs) != len(examples.labels):
        raise bad_argument(argument, counts, "pass one label an input")
    if is_resident(examples.inputs):  # all else is too large to be read through
        check_finite(f"{argument}.inputs", np.asarray(examples.inputs))


def _check_kinds(argument: str, examples: Examples) -> None:
    if not isinstance(examples, Examples):
        raise bad_argument(argument, f"type {type(examples).__name__}", "pass continual.Examples(inputs, labels)")
    for name, part in examples._asdict().items():
        check_array(f"{argument}.{name}", part)
        if isinstance(part, np.ndarray) and not part.dtype.isnative:
            raise bad_argument(f"{argument}.{name}", f"dtype {part.dtype}", "pass it in the machine's byte order")


def _check_split(train: Examples, test: Examples) -> int:
    """The number of classes, after all checks of the examples."""
    _check_kinds("train", train)
    labels = np.asarray(train.labels)
    classes = int(labels.max()) + 1 if labels.size and np.issubdtype(labels.dtype, np.integer) else 0
    check_examples("train", train, classes)
    check_examples("test", test, classes)
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise bad_argument(
            "test.inputs", f"shape {tuple(test.inputs.shape)}", f"its examples must be {tuple(train.inputs.shape[1:])}"
        )
    return classes


def _by_class(
    key: Key | None, train: Examples, test: Examples, classes_per_task: int | Sequence[int], *, told: bool
) -> Stream:
    classes = _check_split(train, test)
    sizes = _task_sizes(classes_per_task, classes)
    order = np.arange(classes) if key is None else np.asarray(jax.random.permutation(key, classes))
    groups = np.split(order, np.cumsum(sizes)[:-1])
    own = np.zeros((len(groups), classes), bool)
    for task, group in enumerate(groups):
        own[task, group] = True

    def select(argument: str, labels: np.ndarray) -> tuple[Selection, ...]:
        selections = []
        for task, group in enumerate(groups):
            rows = np.flatnonzero(own[task][labels]).astype(np.int32)
            if not len(rows):
                raise bad_argument(
                    argument, f"no example of task {task}, classes {[int(c) for c in group]}",
                    "leave those classes out or pass examples of them",
                )  # fmt: skip
            selections.append(Selection(rows, np.full(len(rows), task, np.int32)))
        return tuple(selections)

    return Stream(
        train=train,
        test=test,
        train_sets=select("train.labels", np.asarray(train.labels)),
        test_sets=select("test.labels", np.asarray(test.labels)),
        eligible=own if told else np.ones_like(own),
        task_known=told,
        view=as_they_are,
        view_table=(),
    )


def _task_sizes(classes_per_task: int | Sequence[int], classes: int) -> list[int]:
    if isinstance(classes_per_task, int | np.integer):
        check_count("classes_per_task", classes_per_task, 1)
        sizes = [int(classes_per_task)] * (classes // int(classes_per_task))
    else:
        if np.ndim(classes_per_task) != 1:
            raise bad_argument("classes_per_task", classes_per_task, "pass a whole number, or one for each task")
        sizes = list(classes_per_task)
        check_count("classes_per_task", min(sizes, default=0), 1)
    if sum(sizes) != classes:
        raise bad_argument("classes_per_task", classes_per_task, f"the tasks must use up all {classes} classes")
    return sizes


def _by_domain(train: Examples, test: Examples, classes: int, tasks: int, view: View, table: PyTree) -> Stream:
    def select(examples: Examples) -> tuple[Selection, ...]:
        rows = np.arange(len(examples.labels), dtype=np.int32)
        return tuple(Selection(rows, np.full(len(rows), task, np.int32)) for task in range(tasks))

    everything = np.ones((tasks, classes), bool)
    return Stream(train, test, select(train), select(test), everything, False, view, table)
