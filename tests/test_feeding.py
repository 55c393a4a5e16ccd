"""Examples read as they are needed give the very results of those in memory, and say so when they cannot be read."""

import builtins
import gc
import threading

import jax
import methods
import numpy as np
import pytest
from methods import assert_same, run_method

from jaxcl import continual
from jaxcl.continual import Checkpoint, Examples, feeding
from jaxcl.continual.sharding import Layout
from jaxcl.continual.streams import Selection

pytest.importorskip("grain")


class Reader:
    """Rows of an array, as a file would give them; notes which were asked for, and fails at one of them."""

    def __init__(self, array, fails_at=None):
        self.shape, self.dtype, self._array, self._fails_at = array.shape, array.dtype, array, fails_at
        self.asked, self._lock = [], threading.Lock()

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        assert isinstance(rows, np.ndarray) and rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
        assert (rows >= 0).all() and (rows < len(self)).all()
        with self._lock:
            self.asked.append(rows.copy())
        if self._fails_at in rows:
            raise RuntimeError(f"the file ends before row {self._fails_at}")
        return self._array[rows]


def streamed(stream, *, train=True, test=True, **options):
    """The stream with readers in place of arrays."""

    def of(examples, wanted):
        return examples._replace(inputs=Reader(examples.inputs, **options)) if wanted else examples

    return stream._replace(train=of(stream.train, train), test=of(stream.test, test))


@pytest.fixture
def watch(monkeypatch):
    return methods.watch(monkeypatch)


@pytest.fixture(autouse=True)
def no_thread_stays_behind():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(1)
    if any(thread.is_alive() for thread in left):
        gc.collect()  # an error holds on to what it went through; takes seconds where many programs are in memory
    for thread in left:
        thread.join(10)
        assert not thread.is_alive(), thread


CASES = {
    "made_up, refreshed": [3],
    "er": [1, 64],  # told the task
    "key_value_bottleneck": [1, 3, 64],  # of uint16
}


@pytest.mark.parametrize(("name", "steps_per_call"), [(name, steps) for name, each in CASES.items() for steps in each])
def test_streamed_examples_give_the_very_results_of_those_in_memory(name, steps_per_call, watch):
    """Tasks of 8 and 13 examples in batches of 5: ragged batches, and calls of fewer batches than they might have."""
    options = {"batch_size": 5, "evaluation_batch_size": 4, "steps_per_call": steps_per_call}
    stream = methods.method(name).stream
    expected = run_method(name, **options)
    result = run_method(name, stream=streamed(stream), **options)
    assert_same(result, expected)


@pytest.mark.parametrize("of", [{"test": False}, {"train": False}])
def test_only_some_may_be_streamed(of, watch):
    stream = methods.method("naive").stream
    assert_same(run_method("naive", stream=streamed(stream, **of)), run_method("naive"))


def test_a_memmap_is_read_as_it_is_needed(tmp_path, watch):
    stream = methods.method("naive").stream

    def mapped(examples, name):
        file = np.memmap(tmp_path / name, examples.inputs.dtype, "w+", shape=examples.inputs.shape)
        file[:] = examples.inputs
        file.flush()
        return examples._replace(inputs=np.memmap(tmp_path / name, file.dtype, "r", shape=file.shape))

    other = stream._replace(train=mapped(stream.train, "train"), test=mapped(stream.test, "test"))
    assert feeding.is_streamed(other.train) and not feeding.is_streamed(stream.train)
    assert_same(run_method("naive", stream=other), run_method("naive"))


def test_each_program_compiles_once_for_streamed_examples():
    """Over tasks and seeds, calls of all lengths."""
    strategy, tx, params, stream = methods.method.__wrapped__("made_up, refreshed")
    several = [streamed(stream), streamed(methods.stream_of(key=2))]
    results = continual.run_seeds(
        jax.random.split(jax.random.key(0), 2), strategy, tx, [params] * 2, several,
        epochs=2, batch_size=3, evaluation_batch_size=4, steps_per_call=2,
    )  # fmt: skip
    names = ("start", "begin_task", "train", "refresh", "observe", "end_task", "evaluate")
    assert results[0].compilations == dict.fromkeys(names, 1)


@pytest.mark.parametrize("calls", [5, 6, 8, 13])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_stopped_within_an_epoch_goes_on(calls, first, tmp_path, watch):
    """Begun on streamed examples and taken up on those in memory, or the other way round."""
    stream = methods.method("er").stream
    options = [{"stream": streamed(stream)}, {"stream": stream}][:: 1 if first else -1]
    checkpoint = Checkpoint(tmp_path, 0)
    place, _ = watch.stopped(
        lambda: run_method("er", batch_size=2, steps_per_call=2, checkpoint=checkpoint, **options[0]), calls
    )
    assert place
    result = run_method("er", batch_size=2, steps_per_call=2, checkpoint=checkpoint, **options[1])
    assert_same(result, run_method("er", batch_size=2, steps_per_call=2))


@pytest.mark.parametrize("stream_it", [False, True])
def test_a_batch_is_filled_up_with_its_own_examples_seen_as_their_own_tasks(stream_it):
    rows, tasks = np.array([4, 7, 2, 9, 5, 3, 8]), np.array([1, 1, 1, 1, 2, 3, 1])
    examples = Examples(np.arange(10.0), np.arange(10))
    given = examples._replace(inputs=Reader(examples.inputs)) if stream_it else examples
    feeder = feeding.Feeder([given], feeding.Batching(4, 2, 1), shared=True, together=False, layout=Layout(None))
    _, last = feeder.calls([Selection(rows, tasks)])
    inputs, labels, seen_as, weights = last.source.take(last.position)
    np.testing.assert_array_equal(weights, [1, 1, 1, 0])
    np.testing.assert_array_equal(inputs, [5, 3, 8, 5])
    np.testing.assert_array_equal(labels, [5, 3, 8, 5])
    np.testing.assert_array_equal(seen_as, [2, 3, 1, 2])


def test_only_rows_that_are_needed_are_read(watch):
    """Of two classes out of four: each of their rows once an epoch, besides those that fill a batch up."""
    stream = methods.method("naive").stream
    one = stream._replace(train_sets=stream.train_sets[:1], test_sets=stream.test_sets[:1])
    wanted = one.train_sets[0].rows
    lazy = streamed(one)
    run_method("naive", stream=lazy, epochs=3, batch_size=3, steps_per_call=2)
    read = np.concatenate(lazy.train.inputs.asked)
    assert set(read) == set(wanted)
    calls = -(-len(wanted) // 6)
    assert len(lazy.train.inputs.asked) <= 3 * calls + min(calls, feeding._READERS + feeding._READ_AHEAD)
    assert all(len(rows) == 6 for rows in lazy.train.inputs.asked)
    assert set(np.concatenate(lazy.test.inputs.asked)) == set(one.test_sets[0].rows)


@pytest.mark.parametrize("where", ["train", "test"])
def test_what_goes_wrong_in_reading_is_told(where, watch):
    """In whichever thread, at once, with its own message."""
    stream = methods.method("naive").stream
    row = int(getattr(stream, f"{where}_sets")[1].rows[-1])
    broken = streamed(stream, fails_at=row, **{"train": where == "train", "test": where == "test"})
    with pytest.raises(RuntimeError, match=f"the file ends before row {row}"):
        run_method("naive", stream=broken)


def test_without_grain_the_error_says_what_to_install(watch, monkeypatch):
    real = builtins.__import__

    def no_grain(name, *arguments, **options):
        if name == "grain":
            raise ImportError("No module named 'grain'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_grain)
    stream = methods.method("naive").stream
    with pytest.raises(ImportError, match=r'pip install "jaxcl\[data\]"'):
        run_method("naive", stream=streamed(stream))
    run_method("naive")  # which needs none


@pytest.mark.parametrize("of", [{"test": False}, {"train": False}])
def test_seeds_with_streamed_examples_may_train_together(of):
    strategy, tx, params, stream = methods.method("naive")
    in_turn, together = (
        continual.run_seeds(
            jax.random.split(jax.random.key(0), 3), strategy, tx, [params] * 3, [stream] * 3, epochs=1, batch_size=4,
            together=together,
        )
        for stream, together in ((stream, False), (streamed(stream, **of), True))
    )  # fmt: skip
    for ours, theirs in zip(together, in_turn, strict=True):
        assert_same(ours, theirs)


def test_labels_may_be_a_jax_array(watch):
    stream = methods.method("naive").stream
    train = Examples(Reader(stream.train.inputs), jax.numpy.asarray(stream.train.labels))
    assert_same(run_method("naive", stream=stream._replace(train=train)), run_method("naive"))
