"""Checkpoints: a run that is stopped anywhere and started again leaves what an undisturbed one does, to the bit."""

import functools
import itertools
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from methods import Stopped, assert_same, bits, run_method, run_together

from jaxcl import continual
from jaxcl.continual import Checkpoint, checkpoints, course, loop, streams
from jaxcl.continual.sharding import Layout

# Orbax leaves threads of saves that failed behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MEMBERS = ["begin_task", "train", "refresh", "observe", "end_task", "evaluate"]


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(loop, "_cores", lambda: 2)
    return methods.watch(monkeypatch)


def saved_steps(folder):
    """The numbers of the checkpoints below a folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*/*") if path.name.isdigit())


@functools.cache
def undisturbed(name):
    return [run_method(name)]


def assert_all_same(left, right):
    for ours, theirs in zip(left if isinstance(left, list) else [left], right, strict=True):
        assert_same(ours, theirs)


# Stopped and started again


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_run_may_be_stopped_before_any_call_of_any_program(steps_per_call, tmp_path, watch):
    """One call further each time: so it is taken up from every checkpoint, and stopped before every call.

    Of two tasks, each of two epochs of two batches and three; at last there is nothing left to do.
    """
    name = "made_up, refreshed"
    start = functools.partial(
        run_method, name, checkpoint=Checkpoint(tmp_path, 0), steps_per_call=steps_per_call, batch_size=5
    )
    expected, calls, places, newest = run_method(name, steps_per_call=1, batch_size=5), 2, [], 0
    while True:
        place, result = watch.stopped(start, calls)
        if result:
            break
        places.append(place)
        steps = saved_steps(tmp_path)
        calls = 2 if steps and steps[-1] > newest else calls + 1
        newest = steps[-1] if steps else 0
    assert_same(result, expected)
    assert {place for place in places if place != "start"} == set(MEMBERS)
    assert len(places) >= (24 if steps_per_call == 1 else 16), places


@pytest.mark.parametrize(
    ("name", "runs"),
    [(name, run_method) for name in methods.NAMES] + [(name, run_together) for name in ("ewc", "key_value_bottleneck")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_run_that_is_stopped_a_few_times_is_the_undisturbed_run(name, runs, tmp_path, watch):
    expected, stops = runs(name), 0
    for calls in itertools.cycle([8, 12] if runs is run_method else [22, 16]):
        _, results = watch.stopped(lambda: runs(name, checkpoint=Checkpoint(tmp_path, 0)), calls)
        if results:
            break
        stops += 1
    assert stops >= 2
    assert_all_same(results, expected if isinstance(expected, list) else [expected])


def three_seeds(*, fresh=False, **options):
    strategy, tx, params, stream = (methods.method.__wrapped__ if fresh else methods.method)("er")
    keys = jax.random.split(jax.random.key(5), 3)
    return continual.run_seeds(keys, strategy, tx, [params] * 3, [stream] * 3, epochs=2, batch_size=4, **options)


def test_each_seed_in_turn_has_checkpoints_of_its_own(tmp_path, watch):
    """Stopped in each of them; and what is finished is not trained again."""
    expected, trained = three_seeds(), 0
    for calls in itertools.cycle([13, 8]):
        _, results = watch.stopped(lambda: three_seeds(checkpoint=Checkpoint(tmp_path, 0)), calls)
        trained += watch.calls.count("train")
        if results:
            break
    assert_all_same(results, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed_0", "seed_1", "seed_2"]
    assert trained == 3 * 2 * (2 + 4)  # no step twice, since each is saved: 8 and 13 examples in batches of 4


def test_a_run_goes_on_in_its_groups_on_another_number_of_cores(tmp_path, monkeypatch, watch):
    monkeypatch.setattr(loop, "_cores", lambda: 2)
    expected = three_seeds(together=True, checkpoint=Checkpoint(tmp_path))
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["seeds_0_to_1", "seeds_2_to_2"]
    monkeypatch.setattr(loop, "_cores", lambda: 1)
    watch.calls.clear()
    assert_all_same(three_seeds(together=True, checkpoint=Checkpoint(tmp_path)), expected)
    assert "train" not in watch.calls and sorted(path.name for path in tmp_path.iterdir()) == folders
    with pytest.raises(ValueError, match=r"checkpoint.folder: got .*, of seeds in groups of 2; choose another folder"):
        three_seeds(checkpoint=Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"), [({"keep": 0}, "keep: got 0"), ({"every_seconds": -1}, "every_seconds")]
)
def test_checkpoints_that_would_keep_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint\.{message}"):
        three_seeds(checkpoint=Checkpoint(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_seeds_taken_up_and_seeds_begun_share_one_compilation(tmp_path, monkeypatch):
    """The first seed is finished, the second half done, the third not begun."""
    with monkeypatch.context() as patched:
        place, _ = methods.watch(patched).stopped(lambda: three_seeds(checkpoint=Checkpoint(tmp_path, 0)), 24)
    assert place == "train" and (tmp_path / "seed_1").exists() and not (tmp_path / "seed_2").exists()
    results = three_seeds(checkpoint=Checkpoint(tmp_path, 0), fresh=True)
    assert results[0].compilations == {"start": 1, "train": 1, "evaluate": 1}


@pytest.mark.parametrize("runs", [run_method, run_together], ids=["in_turn", "together"])
def test_a_callback_that_raises_stops_a_run_that_goes_on_later(runs, tmp_path, watch):
    """In each epoch of each group of seeds once. What the callback is told in the end is what it would have been."""
    told, expected = {}, {}

    def note(progress):
        expected[progress[:6]] = progress

    results = runs("ewc", callback=note)
    results = results if isinstance(results, list) else [results]

    def callback(progress):
        if progress[:6] not in told:
            told[progress[:6]] = progress
            raise Stopped

    again, stops = None, 0
    while again is None:
        try:
            again = runs("ewc", callback=callback, checkpoint=Checkpoint(tmp_path, 0))
        except Stopped:
            stops += 1
    assert_all_same(again, results)
    assert 4 <= stops <= len(expected) == len(told)
    for place, progress in expected.items():
        assert progress.metrics == told[place].metrics
        assert progress.examples == told[place].examples
        np.testing.assert_array_equal(progress.accuracy, told[place].accuracy)


def test_a_finished_run_trains_and_compiles_nothing(tmp_path, watch, monkeypatch):
    checkpoint = Checkpoint(tmp_path)
    first = run_method("made_up, refreshed", checkpoint=checkpoint)
    watch.calls = []
    again = run_method("made_up, refreshed", checkpoint=checkpoint, callback=lambda progress: pytest.fail("told"))
    assert set(watch.calls) <= {"start"}  # for its shapes
    monkeypatch.undo()
    new = run_method("made_up, refreshed", checkpoint=checkpoint, fresh=True)
    assert again.compilations == new.compilations == {}
    for result in (again, new):
        assert_same(result, first)
        assert result.seconds == pytest.approx(first.seconds, abs=60) and result.seconds >= first.seconds


def test_steps_a_call_may_change_on_the_way(tmp_path, watch):
    place, _ = watch.stopped(lambda: run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), 5)
    assert place == "train"
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0), steps_per_call=3), *undisturbed("naive"))


# What a checkpoint holds


@pytest.mark.parametrize("name", ["made_up, refreshed", "key_value_bottleneck"])
def test_what_is_saved_is_the_state_at_the_time(name, tmp_path, watch, monkeypatch):
    """Buffers are donated to the next step while the background still writes: all checkpoints are read at the end."""
    states, save = [], checkpoints.Checkpoints.save

    def noting_save(self, state, record):
        states.append([np.array(bits(leaf)) for leaf in jax.tree.leaves(state) if leaf.size])
        save(self, state, record)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", noting_save)
    run_method(name, checkpoint=Checkpoint(tmp_path, 0, keep=1000), epochs=3)
    steps = saved_steps(tmp_path)
    assert len(steps) == len(states) >= 15
    with ocp.CheckpointManager(tmp_path / "seed_0") as manager:
        for step, state in zip(steps, states, strict=True):
            found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
            written = sorted((leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for leaf in found.values())
            assert written == sorted((leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in state)


def test_a_record_may_be_changed_while_it_is_written(tmp_path, monkeypatch):
    """It is written only after the change."""
    changed, write = threading.Event(), ocp.JsonCheckpointHandler._save_fn

    async def late(self, document, directory):
        assert changed.wait(60)
        await write(self, document, directory)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    keeper = checkpoints.Checkpoints(Checkpoint(tmp_path, 0), "seed_0", {}, alone=True)
    record = {"step": 3, "history": [{"loss": 0.5}]}
    keeper.save(jnp.ones(2), record)
    record["step"] = record["history"][0]["loss"] = 4
    changed.set()
    keeper.close()
    again = checkpoints.Checkpoints(Checkpoint(tmp_path, 0), "seed_0", {}, alone=True)
    _, found = again.restore(jax.ShapeDtypeStruct((2,), jnp.float32), Layout(None))
    assert found == {"step": 3, "history": [{"loss": 0.5}]}


def test_the_newest_are_kept(tmp_path, watch):
    keep = 3
    run_method("naive", checkpoint=Checkpoint(tmp_path, 0, keep=keep))
    steps = saved_steps(tmp_path)
    assert steps == list(range(steps[-1] - keep + 1, steps[-1] + 1)) and steps[-1] >= 12


def test_checkpoints_keep_their_distance(tmp_path, watch):
    """Within an hour only the end of the run is saved."""
    run_method("naive", checkpoint=Checkpoint(str(tmp_path), 3600))
    assert saved_steps(tmp_path) == [1]


# Other runs


def relabelled(stream):
    return stream._replace(train=stream.train._replace(labels=np.roll(stream.train.labels, 1)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"key": jax.random.key(8)}, r"keys: \[\[0, 3\]\] \(now \[\[0, 8\]\]\)"),
        ({"epochs": 3}, r"epochs: 2 \(now 3\)"),
        ({"batch_size": 3}, r"batch_size: 4 \(now 3\)"),
        ({"stream": streams.joint(methods.stream_of())}, r"stages: 2 \(now 1\)"),
        ({"stream": relabelled(methods.stream_of())}, r"labels and rows: \[[0-9]+\] \(now \[[0-9]+\]\)"),
        ({"epochs": 1, "batch_size": 6}, r"epochs: 2 \(now 1\), batch_size: 4 \(now 6\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes, named, tmp_path, watch):
    run_method("naive", checkpoint=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match=rf"^checkpoint.folder: got {tmp_path}/seed_0, of a run with {named}; choose"):
        run_method("naive", checkpoint=Checkpoint(tmp_path), **changes)
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path)), *undisturbed("naive"))


def run_with(tmp_path, *, params=None, tx=None):
    strategy, usual_tx, usual_params, stream = methods.method("naive")
    return continual.run(
        jax.random.key(3), strategy, tx or usual_tx, params or usual_params, stream,
        epochs=2, batch_size=4, checkpoint=Checkpoint(tmp_path),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"params": methods.network_params(hidden=8)}, ".params['first']: float32[8, 16] (now float32[8, 8])"),
        ({"params": {"more": jnp.zeros(3)} | methods.network_params()}, ".params['more']: None (now float32[3])"),
        (
            {"params": methods.network_params() | {"bias": jnp.zeros(4, jnp.bfloat16)}},
            ".params['bias']: float32[4] (now bfloat16[4])",
        ),
        ({"tx": optax.sgd(0.1)}, ".opt_state[0].count: int32[] (now None)"),
    ],
    ids=["width", "layer", "dtype", "optimizer"],
)
def test_a_checkpoint_of_another_network_or_optimizer_is_refused(changes, named, tmp_path, watch):
    run_with(tmp_path)
    with pytest.raises(ValueError, match=rf"^checkpoint.folder: got {tmp_path}/seed_0, of a run with ") as caught:
        run_with(tmp_path, **changes)
    assert str(caught.value).endswith("; choose another folder") and len(str(caught.value)) < 500 + len(str(tmp_path))
    assert named in str(caught.value)
    assert_same(run_with(tmp_path), *undisturbed("naive"))


# Damage


def stop_half_way(tmp_path, watch):
    """Two checkpoints of an unfinished run; the folder of the newest."""
    place, _ = watch.stopped(lambda: run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), 9)
    assert place
    old, new = saved_steps(tmp_path)
    assert new == old + 1
    return tmp_path / "seed_0" / str(new)


@pytest.mark.parametrize("damaged", ["state/**/d/*", "state/manifest.ocdbt", "record/metadata", "state/_METADATA"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_damaged_checkpoint_is_one_clear_error_and_its_removal_mends_it(damaged, share, tmp_path, watch):
    newest = stop_half_way(tmp_path, watch)
    files = [path for path in newest.glob(damaged) if path.is_file()]
    assert files
    for path in files:
        os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(OSError, match=rf"^cannot read checkpoints in {tmp_path}/seed_0: ") as caught:
        run_method("naive", checkpoint=Checkpoint(tmp_path, 0))
    assert "\n" not in str(caught.value) and f"delete {newest}" in str(caught.value)
    shutil.rmtree(newest)
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), *undisturbed("naive"))


@pytest.mark.parametrize("missing", ["commit_success.txt", "state", "record"])
def test_a_half_written_checkpoint_is_not_used(missing, tmp_path, watch):
    """It goes by another name until all of it is there; the next run takes it away."""
    newest = stop_half_way(tmp_path, watch)
    written = newest.rename(newest.with_name(f"{newest.name}.orbax-checkpoint-tmp"))
    if missing == "commit_success.txt":
        (written / missing).unlink()
    else:
        shutil.rmtree(written / missing)
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), *undisturbed("naive"))
    assert not written.exists()


def test_temporary_folders_and_other_files_are_ignored(tmp_path, watch):
    newest = stop_half_way(tmp_path, watch)
    number = int(newest.name)
    shutil.copytree(newest, newest.with_name(f"{number + 1}.orbax-checkpoint-tmp-7"))
    (newest.parent / "notes.txt").write_text("mine")
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), *undisturbed("naive"))
    assert (newest.parent / "notes.txt").read_text() == "mine"


# Folders that cannot be written


def test_a_folder_that_cannot_be_made_is_named(tmp_path, watch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"^cannot make checkpoints in {tmp_path}/file/runs/seed_0: ") as caught:
        run_method("naive", checkpoint=Checkpoint(tmp_path / "file" / "runs"))
    assert "\n" not in str(caught.value)
    assert "train" not in watch.calls


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_leave_to_write_is_named(tmp_path, watch):
    stop_half_way(tmp_path, watch)
    (tmp_path / "seed_0").chmod(0o500)
    with pytest.raises(OSError, match=rf"^cannot write checkpoints in {tmp_path}/seed_0: "):
        run_method("naive", checkpoint=Checkpoint(tmp_path, 0))
    (tmp_path / "seed_0").chmod(0o700)
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), *undisturbed("naive"))


def test_a_full_disk_is_named_and_earlier_checkpoints_still_serve(tmp_path, watch):
    """Files may not grow beyond a few hundred bytes: as on a full disk, writing fails half way."""
    stop_half_way(tmp_path, watch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match=rf"^cannot write checkpoints in {tmp_path}/seed_0: ") as caught:
            run_method("naive", checkpoint=Checkpoint(tmp_path, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "make room" in str(caught.value)
    assert_same(run_method("naive", checkpoint=Checkpoint(tmp_path, 0)), *undisturbed("naive"))


def test_no_checkpoint_no_folder(tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course.Checkpoints, "due", lambda self: pytest.fail("asked"))
    assert_same(run_method("naive"), *undisturbed("naive"))
    assert list(tmp_path.iterdir()) == []
