"""The loop: one compiled program for training and one for evaluation, whatever the number of tasks.

A run is a fold of pure programs over one pytree, `LoopState`. The host only decides what comes next: which rows (a
function of key, task and epoch, never of an iterator's memory), which task, how many steps a call. So a run that was
interrupted goes on, bit for bit, from the state and the place in the stream that its checkpoint holds.
"""

import os
import re
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcl.continual.checkpoints import Checkpoint, Checkpoints
from jaxcl.continual.compilations import count_compilations
from jaxcl.continual.course import Course, Plan, Progress, Result, Seeds
from jaxcl.continual.feeding import Batching, is_streamed
from jaxcl.continual.programs import Programs, compile_programs
from jaxcl.continual.sharding import DATA, Layout
from jaxcl.continual.strategies import Strategy
from jaxcl.continual.streams import Stream
from jaxcl.trees import byte_count
from jaxcl.typing import Key, PyTree, bad_argument, check_count

# Steps a call. On CPU a convolution inside a compiled loop is 8 to 16 times slower than outside (XLA runs it on one
# thread, unvectorised), and a call costs only some tens of microseconds; on accelerators launching dominates.
_STEPS_PER_CALL = {"cpu": 1}
_STEPS_PER_CALL_ELSEWHERE = 32
# Seeds share each step on CPU while the parameters of all those take no more bytes than this. Then the loop costs more
# than the arithmetic, and four seeds take 2.5 times as long as one; larger ones drive each other out of a core's cache
# at every step, and are faster by themselves.
_SHARED_STEP_BYTES = 2**17
# What is done at these times may factorise a matrix. On CPU a factorisation waits for work that it gives to the very
# threads it runs on (seen on JAX 0.10.2): as many of them at once as there are threads wait for ever.
_ONE_AT_A_TIME = ("begin_task", "refresh", "end_task")


def run(
    key: Key,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: PyTree,
    stream: Stream,
    *,
    epochs: int,
    batch_size: int,
    steps_per_call: int | None = None,
    evaluation_batch_size: int = 1024,
    mesh: Mesh | None = None,
    checkpoint: Checkpoint | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Trains on a stream's tasks in turn and tests on all of them after each.

    Args:
        key: decides data order and all that the strategy draws; consumed.
        strategy: the continual-learning method.
        tx: the optimizer; it starts afresh with the run, and with each task where the strategy asks for that.
        params: initial parameters; not consumed.
        stream: the tasks.
        epochs: passes over a task's training set.
        batch_size: B; an epoch's last batch may hold fewer examples.
        steps_per_call: training steps in one call of the compiled program. None takes the backend's default: 1 on CPU,
            where a convolution inside a compiled loop is many times slower, 32 elsewhere. Small networks without
            convolutions are faster with more on CPU too. The results are the same.
        evaluation_batch_size: test examples at a time, at most.
        mesh: what `sharding.make_mesh` made, to split batches and parameters over devices; None uses one device.
        checkpoint: where to keep the run's state. If it holds a part of this run, the run goes on from there. A run is
            known by its keys, sizes, the shapes of its state, and which examples of which labels its tasks have: what
            the strategy's and the optimizer's options are, or the inputs' values, is for you to keep the same.
        callback: told the `Progress` after each epoch.

    Raises:
        ValueError: a size below 1, a stage or task without examples, a batch that the mesh does not divide, or a
            checkpoint of another run.
        FloatingPointError: the mean of the metric "loss" over an epoch is not finite.
        OSError: a checkpoint cannot be written or read.
    """
    return run_seeds(
        jnp.stack([key]),
        strategy,
        tx,
        [params],
        [stream],
        epochs=epochs,
        batch_size=batch_size,
        steps_per_call=steps_per_call,
        evaluation_batch_size=evaluation_batch_size,
        mesh=mesh,
        checkpoint=checkpoint,
        callback=callback,
    )[0]


def run_seeds(
    keys: Key,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: Sequence[PyTree],
    streams: Sequence[Stream],
    *,
    epochs: int,
    batch_size: int,
    together: bool = False,
    steps_per_call: int | None = None,
    evaluation_batch_size: int = 1024,
    mesh: Mesh | None = None,
    checkpoint: Checkpoint | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> list[Result]:
    """`run` for several seeds that share one compilation: one after another, or at the same time.

    Args:
        keys: [S]; consumed.
        strategy: as in `run`.
        tx: as in `run`.
        params: one tree a seed.
        streams: one a seed, with examples and test sets of equal shapes.
        epochs: as in `run`.
        batch_size: as in `run`.
        together: trains seeds at the same time: on CPU on as many threads as there are cores, several small networks in
            one step; elsewhere all in one step, under `vmap`. The numbers are those of one seed after another, up to
            rounding. On a mesh, seeds are trained in turn; and a strategy with `refresh_every`, or examples that are
            not in memory, have their steps to themselves.
        steps_per_call: as in `run`.
        evaluation_batch_size: as in `run`.
        mesh: as in `run`.
        checkpoint: as in `run`, with a folder for each seed or group of seeds.
        callback: as in `run`; called by one thread at a time.

    Returns:
        One `Result` a seed.

    Raises:
        ValueError: as in `run`; lengths of `keys`, `params` and `streams` that differ; streams that are not alike.
        FloatingPointError: as in `run`.
        OSError: as in `run`.
    """
    check_count("epochs", epochs, 1)
    check_count("batch_size", batch_size, 1)
    check_count("evaluation_batch_size", evaluation_batch_size, 1)
    if steps_per_call is None:
        steps_per_call = _STEPS_PER_CALL.get(jax.default_backend(), _STEPS_PER_CALL_ELSEWHERE)
    check_count("steps_per_call", steps_per_call, 1)
    if not len(keys) == len(params) == len(streams):
        raise bad_argument(
            "keys, params, streams", f"{len(keys)}, {len(params)} and {len(streams)} of them", "pass one of each a seed"
        )
    check_count("streams, their number", len(streams), 1)
    _check_kinds(keys, strategy, tx, streams, checkpoint)
    _check_streams(streams)
    if strategy.tasks is not None and len(streams[0].train_sets) > strategy.tasks:
        stages = len(streams[0].train_sets)
        raise bad_argument("strategy", f"one for {strategy.tasks} tasks", f"make it for {stages}, those of the stream")
    parts = 1 if mesh is None else mesh.shape[DATA]
    if batch_size % parts:
        raise bad_argument("batch_size", batch_size, f"pass a multiple of the mesh's data axis, {parts}")
    largest_test = max(len(part.rows) for stream in streams for part in stream.test_sets)
    evaluation_batch_size = -(-min(evaluation_batch_size, largest_test) // parts) * parts
    test_batches = max(sum(-(-len(part.rows) // evaluation_batch_size) for part in s.test_sets) for s in streams)
    largest = max(len(part.rows) for stream in streams for part in stream.train_sets)
    shared = all(stream.train is streams[0].train and stream.test is streams[0].test for stream in streams)
    layout, first = Layout(mesh), streams[0]
    alone = strategy.refresh_every > 0 or is_streamed(first.train) or is_streamed(first.test)
    size, threads = _grouping(
        len(streams), byte_count(params[0]), checkpoint, in_turn=mesh is not None or not together, alone=alone
    )
    # Groups of one size share a compilation: the last one is filled up with the last seed.
    groups = [
        [min(seed, len(streams) - 1) for seed in range(start, start + size)] for start in range(0, len(streams), size)
    ]
    programs = compile_programs(
        strategy,
        tx,
        first.pipeline,
        steps_per_call=steps_per_call,
        layout=layout,
        together=size > 1,
        shared=shared,
    )
    plan = Plan(
        strategy.refresh_every,
        epochs,
        Batching(batch_size, -(-largest // batch_size), steps_per_call),
        # Test batches may be far larger than those of training: where they are read as needed, one at a time.
        Batching(evaluation_batch_size, test_batches, 1 if is_streamed(first.test) else steps_per_call),
        layout,
        size > 1,
        shared,
    )

    lock = threading.Lock()

    def tell(progress: Progress) -> None:
        with lock:
            if callback:
                callback(progress)

    def run_group(programs: Programs, numbers: Sequence[int]) -> list[Result]:
        bits = [np.ravel(jax.random.key_data(keys[seed])).tolist() for seed in numbers]
        seeds = Seeds(
            numbers[0],
            keys[np.asarray(numbers)],
            # numpy's generator takes a key's bits: data order depends on key, stage and epoch alone.
            bits,
            [params[seed] for seed in numbers],
            [streams[seed] for seed in numbers],
            len(set(numbers)),
        )
        checkpoints = None
        if checkpoint:
            identity = {
                "keys": bits, "epochs": epochs, "batch_size": batch_size, "stages": len(first.train_sets),
                "labels and rows": [_checksum(stream) for stream in seeds.streams],
            }  # fmt: skip
            name = f"seeds_{numbers[0]}_to_{numbers[-1]}" if size > 1 else f"seed_{numbers[0]}"
            checkpoints = Checkpoints(checkpoint, name, identity, alone=threads == 1)
        return Course(seeds, programs, plan, checkpoints, tell).results()

    with count_compilations(programs._fields) as compilations:
        if threads == 1:
            by_group = [run_group(programs, numbers) for numbers in groups]
        else:
            by_group = _in_threads(run_group, programs, groups, threads)
    results = [result for of_group in by_group for result in of_group][: len(streams)]
    return [result._replace(compilations=dict(compilations)) for result in results]


def _grouping(
    seeds: int, bytes_of_params: int, checkpoint: Checkpoint | None, *, in_turn: bool, alone: bool
) -> tuple[int, int]:
    """How many seeds share each step, and on how many threads groups of so many run.

    A run that goes on has groups as it began with, on however many cores that was.
    """
    on_cpu, size = jax.default_backend() == "cpu", 1
    if not in_turn and not on_cpu and not alone:
        size = seeds
    elif not in_turn and on_cpu:
        share = -(-seeds // _cores())
        rounds = share if alone else -(-share // max(1, _SHARED_STEP_BYTES // max(1, bytes_of_params)))
        size = -(-share // rounds)
    if checkpoint and (before := _size_before(checkpoint.folder) or size) != size:
        if in_turn or alone or before > seeds:
            kept = f"{checkpoint.folder}, of seeds in groups of {before}"
            raise bad_argument(
                "checkpoint.folder", kept, "choose another folder, or train these seeds together as then"
            )
        size = before
    return size, min(_cores(), -(-seeds // size)) if on_cpu and not in_turn else 1


def _size_before(folder: Path) -> int | None:
    """How many seeds share each step in a run that `folder` holds a part of; None if it holds none."""
    if not (names := [path.name for path in Path(folder).glob("seed*_0*")]):
        return None
    last = re.fullmatch(r"seeds_0_to_(\d+)", names[0])
    return 1 + int(last[1]) if last else 1


def _checksum(stream: Stream) -> int:
    """Of labels, and of the rows of each task, to train on and to be tested on."""
    found = 0
    for examples, sets in ((stream.train, stream.train_sets), (stream.test, stream.test_sets)):
        for array in (examples.labels, *(part.rows for part in sets)):
            found = zlib.crc32(np.asarray(array).tobytes(), found)
    return found


def _in_threads(
    run_group: Callable[[Programs, Sequence[int]], list[Result]],
    programs: Programs,
    groups: Sequence[Sequence[int]],
    threads: int,
) -> list[list[Result]]:
    """The groups' results; whatever one of them raises ends the others too, as does an interruption by the user."""
    stop, alone = threading.Event(), threading.Lock()
    programs = Programs._make(
        program and _for_threads(program, stop, alone if name in _ONE_AT_A_TIME else None)
        for name, program in programs._asdict().items()
    )
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run_group, programs, numbers) for numbers in groups]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what that group raised
        finally:
            stop.set()
    return [future.result() for future in futures]


def _for_threads(
    program: Callable[..., Any], stop: threading.Event, alone: AbstractContextManager[Any] | None
) -> Callable[..., Any]:
    """The program for several threads: the first call, which compiles it, is through before there is a second.

    With `alone`, a call runs to its end while no other one holds that lock.
    """
    lock, compiled = threading.Lock(), threading.Event()

    def call(*arguments: Any) -> Any:
        if alone:
            with alone:
                return jax.block_until_ready(compiled_once(*arguments))
        return compiled_once(*arguments)

    def compiled_once(*arguments: Any) -> Any:
        if stop.is_set():
            raise CancelledError
        if compiled.is_set():
            return program(*arguments)
        with lock:
            result = program(*arguments)
            compiled.set()
            return result

    return call


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_kinds(keys: Any, strategy: Any, tx: Any, streams: Sequence[Any], checkpoint: Any) -> None:
    """Raises ValueError for what is easily taken for something else."""
    if not isinstance(keys, jax.Array) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        given = f"dtype {keys.dtype}" if hasattr(keys, "dtype") else f"type {type(keys).__name__}"
        raise bad_argument("key", given, "pass jax.random.key(0), or another number's")
    for name, value, kind, fix in (
        ("strategy", strategy, Strategy, "call what makes one, as naive(network.apply)"),
        ("tx", tx, optax.GradientTransformation, "pass an optimizer, as optax.adam(1e-3)"),
        *(("stream", stream, Stream, "make one by continual.streams, as class_incremental") for stream in streams),
        ("checkpoint", checkpoint, Checkpoint | None, "pass continual.Checkpoint(folder)"),
    ):
        if not isinstance(value, kind):
            raise bad_argument(name, f"type {type(value).__name__}", fix)


def _check_streams(streams: Sequence[Stream]) -> None:
    first = streams[0]
    for stream in streams:
        for name, parts in (("train_sets", stream.train_sets), ("test_sets", stream.test_sets)):
            if not parts:
                raise bad_argument(f"stream.{name}", "no task", "pass a stream of one task or more")
            for task, part in enumerate(parts):
                if not len(part.rows):
                    raise bad_argument(
                        f"stream.{name}[{task}]", "no examples", "leave the task out or give it examples"
                    )
        if stream.pipeline != first.pipeline:
            raise bad_argument("streams", "streams of several kinds", "make them all by the same function")
        if len(stream.train_sets) != len(first.train_sets) or stream.eligible.shape != first.eligible.shape:
            raise bad_argument("streams", "different numbers of tasks or classes", "make them alike but for their keys")
