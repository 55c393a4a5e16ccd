"""The course of one seed, or of seeds that share each step, from the start or from a checkpoint to the end."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.continual.checkpoints import Checkpoints
from jaxcl.continual.feeding import Batching, Call, Feeder, one_after_another
from jaxcl.continual.programs import LoopState, Programs, Tables
from jaxcl.continual.sharding import Layout
from jaxcl.continual.streams import Selection, Stream
from jaxcl.trees import byte_count, parameter_count
from jaxcl.typing import Key, PyTree


class Progress(NamedTuple):
    """What the loop tells its callback at the end of each epoch."""

    seed: int  # position in the run of the seed, or of the first of those that share each step
    seeds: int  # how many seeds this speaks of
    stage: int
    stages: int
    epoch: int
    epochs: int
    metrics: dict[str, float]  # means over the epoch's examples (and over seeds that share each step)
    examples: int  # trained on in this epoch
    seconds: float  # that this epoch took, since the process began or took up the run
    accuracy: np.ndarray | None  # [T], after a stage's last epoch: on each task (mean over seeds that share steps)
    params: PyTree  # as they stand; valid during the call
    state: PyTree  # the strategy's, as `params`


class Result(NamedTuple):
    """What a run leaves."""

    accuracy: np.ndarray  # [I, T]: on task j's test set after training stage i; I is T, or 1 if trained jointly
    untrained: np.ndarray  # [T], before any training
    history: list[dict[str, float]]  # one entry an epoch: "stage", "epoch" and the strategy's metrics
    params: PyTree
    strategy_state: PyTree
    parameters: int  # scalars that the optimizer trains
    bytes: int  # of parameters and the strategy's state, at the end
    examples: int  # trained on, each as often as it was
    seconds: float  # wall time, compilation included; of seeds that share each step, an equal part
    compilations: dict[str, int]  # programs compiled, by name, over all seeds of the run


class Plan(NamedTuple):
    """What all groups of seeds have in common besides the programs."""

    refresh_every: int
    epochs: int
    training: Batching
    testing: Batching
    layout: Layout
    together: bool
    shared: bool


class Seeds(NamedTuple):
    """Seeds that share each step, or a single one."""

    first: int  # position in the run
    keys: Key  # [S]
    bits: list[list[int]]  # of the keys
    params: list[PyTree]
    streams: list[Stream]
    distinct: int  # how many they are; the others repeat the last, to fill a group up


class _Cursor(NamedTuple):
    """What comes next: a batch of an epoch of a stage; after the last epoch, the stage's end."""

    stage: int
    epoch: int
    position: int


class _Record(NamedTuple):
    """What has been measured so far, of S seeds of the group."""

    untrained: np.ndarray  # [S, T]
    accuracy: list[np.ndarray]  # of the stages so far, each [S, T]
    history: list[tuple[int, int, dict[str, list[float]]]]  # stage, epoch, {metric: [S]}
    examples: list[int]  # [S], trained on so far
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As plain data, which goes into a checkpoint."""
        arrays = {"untrained": self.untrained.tolist(), "accuracy": [of_stage.tolist() for of_stage in self.accuracy]}
        return self._asdict() | arrays

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> "_Record":
        """The record whose plain data this is."""
        accuracy = [np.asarray(of_stage) for of_stage in plain["accuracy"]]
        return cls(**plain | {"untrained": np.asarray(plain["untrained"]), "accuracy": accuracy})


class Course:
    """The course of one group of seeds."""

    def __init__(
        self,
        seeds: Seeds,
        programs: Programs,
        plan: Plan,
        checkpoints: Checkpoints | None,
        tell: Callable[[Progress], None],
    ) -> None:
        self._seeds, self._programs, self._plan, self._checkpoints, self._tell = (
            seeds,
            programs,
            plan,
            checkpoints,
            tell,
        )
        self._key = plan.layout.place_key(seeds.keys if plan.together else seeds.keys[0])
        self._stages = len(seeds.streams[0].train_sets)
        tables = [
            Tables._make((stream.eligible, stream.eligible_in_training, stream.view_table)) for stream in seeds.streams
        ]
        self._tables = plan.layout.place(self._stack(tables))
        self._training, self._testing = (
            Feeder(examples, batching, shared=plan.shared, together=plan.together, layout=plan.layout)
            for examples, batching in (
                ([stream.train for stream in seeds.streams], plan.training),
                ([stream.test for stream in seeds.streams], plan.testing),
            )
        )
        tests = [stream.test_sets for stream in seeds.streams]
        self._test_calls = self._testing.repeated([one_after_another(parts, plan.testing.size) for parts in tests])
        self._test_sizes = np.array([[len(part.rows) for part in parts] for parts in tests])  # [S, T]
        self._began = time.perf_counter()

    def results(self) -> list[Result]:
        """Trains from wherever the checkpoint stands to the end."""
        try:
            state, record = self._run()
        finally:  # a run that is stopped here may be taken up in this very process
            if self._checkpoints:
                self._checkpoints.close()
        return [self._result(state, record, seed) for seed in range(len(self._seeds.streams))]

    def _run(self) -> tuple[LoopState, _Record]:
        state, cursor, record = self._take_up()
        while cursor.stage < self._stages:
            state, record = self._run_stage(state, cursor, record)
            cursor = _Cursor(cursor.stage + 1, 0, 0)
            if cursor.stage < self._stages:
                self._save_if_due(state, cursor, record)
        jax.block_until_ready(state)
        record = self._timed(record)
        if self._checkpoints and self._began_at != cursor:
            self._checkpoints.save(state, {"cursor": cursor, **record.plain()})
        return state, record

    def _take_up(self) -> tuple[LoopState, _Cursor, _Record]:
        """The state to go on from: that of the newest checkpoint, or the initial one."""
        params = self._plan.layout.place_state(self._stack(self._seeds.params))
        source = next(self._calls(0, 0)).source
        arguments = self._key, params, self._tables, source
        saved = None
        if self._checkpoints:
            saved = self._checkpoints.restore(jax.eval_shape(self._programs.start, *arguments), self._plan.layout)
        if saved:
            state, plain = saved
            self._began_at = _Cursor(*plain.pop("cursor"))
            record = _Record.of_plain(plain)
        else:
            state, self._began_at = self._programs.start(*arguments), _Cursor(0, 0, 0)
            seeds = len(self._seeds.streams)
            record = _Record(self._evaluate(state), [], [], [0] * seeds, 0.0)
        self._seconds_before = record.seconds
        return state, self._began_at, record

    def _run_stage(self, state: LoopState, cursor: _Cursor, record: _Record) -> tuple[LoopState, _Record]:
        """Trains the rest of a stage, ends it and tests on all tasks."""
        stage, epochs = cursor.stage, self._plan.epochs
        if self._programs.begin_task and (cursor.epoch, cursor.position) == (0, 0):
            state = self._programs.begin_task(self._key, state, np.int32(stage))
        epoch_began = time.perf_counter()
        calls = self._calls(*cursor)
        for epoch in range(cursor.epoch, epochs):
            state = self._run_epoch(state, stage, epoch, calls, record)
            if epoch + 1 < epochs or self._programs.observe:
                calls = self._calls(stage, epoch + 1)  # laid out while the device still works
            record = self._recorded(state, stage, epoch, record)
            if epoch + 1 < epochs:
                self._report(state, record, time.perf_counter() - epoch_began)
                epoch_began = time.perf_counter()
            self._save_if_due(state, _Cursor(stage, epoch + 1, 0), record)
        if self._programs.observe:
            for source, position, count in calls:
                state = self._programs.observe(
                    self._key, state, self._tables, source, np.int32(stage), np.int32(position), np.int32(count)
                )
        if self._programs.end_task:
            state = self._programs.end_task(self._key, state, np.int32(stage))
        accuracy = self._evaluate(state)
        record = record._replace(accuracy=[*record.accuracy, accuracy])
        self._report(state, record, time.perf_counter() - epoch_began, accuracy)
        return state, record

    def _run_epoch(self, state: LoopState, stage: int, epoch: int, calls: Iterable[Call], record: _Record) -> LoopState:
        """The rest of an epoch's steps."""
        steps = self._training.steps([stream.train_sets[stage] for stream in self._seeds.streams])
        for source, position, ahead in calls:
            end, every = position + ahead, self._plan.refresh_every
            here = position
            while here < end:
                taken = epoch * steps + here
                count = min(end - here, every - taken % every) if every else end - here
                state = self._programs.train(
                    self._key, state, self._tables, source, np.int32(stage), np.int32(here), np.int32(count)
                )
                here += count
                if self._programs.refresh and (taken + count) % every == 0:
                    last = np.int32(here - 1)
                    state = self._programs.refresh(self._key, state, self._tables, source, np.int32(stage), last)
            if end < steps:
                self._save_if_due(state, _Cursor(stage, epoch, end), record)
        return state

    def _evaluate(self, state: LoopState) -> np.ndarray:
        """Accuracy [S, T] on all tasks."""
        right = [
            self._programs.evaluate(state, self._tables, source, np.int32(position), np.int32(count))
            for source, position, count in self._test_calls()
        ]
        return np.atleast_2d(sum(jax.device_get(right))) / self._test_sizes

    def _calls(self, stage: int, epoch: int, first: int = 0) -> Iterator[Call]:
        """The batches of an epoch in the order they are seen, from number `first` on."""
        parts = []
        for key, stream in zip(self._seeds.bits, self._seeds.streams, strict=True):
            rows, tasks = stream.train_sets[stage]
            order = np.random.default_rng([*key, stage, epoch]).permutation(len(rows))
            parts.append(Selection(rows[order], tasks[order]))
        return self._training.calls(parts, first)

    def _recorded(self, state: LoopState, stage: int, epoch: int, record: _Record) -> _Record:
        """The record with an epoch's means in it."""
        trained = [len(stream.train_sets[stage].rows) for stream in self._seeds.streams]
        means = {name: (np.atleast_1d(total) / trained).tolist() for name, total in state.totals.items()}
        for seed, loss in enumerate(means.get("loss", [])):
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"loss: got {loss} in epoch {epoch + 1} of task {stage + 1}, seed {self._seeds.first + seed}; "
                    "lower the learning rate, or look for inputs that are not finite"
                )
        return record._replace(
            history=[*record.history, (stage, epoch, means)],
            examples=[before + new for before, new in zip(record.examples, trained, strict=True)],
        )

    def _report(self, state: LoopState, record: _Record, seconds: float, accuracy: np.ndarray | None = None) -> None:
        stage, epoch, means = record.history[-1]
        distinct = self._seeds.distinct
        self._tell(
            Progress(
                self._seeds.first,
                distinct,
                stage,
                self._stages,
                epoch,
                self._plan.epochs,
                {name: float(np.mean(of_seeds[:distinct])) for name, of_seeds in means.items()},
                sum(len(stream.train_sets[stage].rows) for stream in self._seeds.streams[:distinct]),
                seconds,
                None if accuracy is None else np.mean(accuracy[:distinct], axis=0),
                state.params,
                state.strategy_state,
            )
        )

    def _timed(self, record: _Record) -> _Record:
        return record._replace(seconds=self._seconds_before + time.perf_counter() - self._began)

    def _save_if_due(self, state: LoopState, cursor: _Cursor, record: _Record) -> None:
        if self._checkpoints and self._checkpoints.due():
            self._checkpoints.save(state, {"cursor": cursor, **self._timed(record).plain()})

    def _result(self, state: LoopState, record: _Record, seed: int) -> Result:
        params, strategy_state = state.params, state.strategy_state
        if self._plan.together:
            params, strategy_state = jax.tree.map(lambda leaf: leaf[seed], (params, strategy_state))
        return Result(
            accuracy=np.asarray(record.accuracy)[:, seed],
            untrained=record.untrained[seed],
            history=[
                {"stage": stage, "epoch": epoch} | {name: of_seeds[seed] for name, of_seeds in means.items()}
                for stage, epoch, means in record.history
            ],
            params=params,
            strategy_state=strategy_state,
            parameters=parameter_count(params),
            bytes=byte_count((params, strategy_state)),
            examples=record.examples[seed],
            seconds=record.seconds / self._seeds.distinct,
            compilations={},
        )

    def _stack(self, trees: Sequence[PyTree]) -> PyTree:
        """The seeds' trees on a new leading axis; a single seed's tree as it is."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees) if self._plan.together else trees[0]
