"""TensorBoard's event files, read back: what they hold, and what a resumed run leaves to see."""

import io
import struct
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from jaxcl import continual, nets, report
from jaxcl.continual import Examples, Progress, streams

pytest.importorskip("tensorboardX")


def events(folder):
    """The events of a folder's files, in order; of each record: length, its checksum, content, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            yield Event.FromString(content[position + 12 : position + 12 + length])
            position += length + 16


def shown(folder):
    """{tag: {step: value}} as TensorBoard shows it: a session's start hides what came before from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    tags = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            tags = {tag: {step: v for step, v in values.items() if step < event.step} for tag, values in tags.items()}
        for value in event.summary.value:
            assert event.step not in tags.setdefault(value.tag, {}), "a step twice"
            tags[value.tag][event.step] = getattr(value, value.WhichOneof("value"))
    return tags


def progress(stage, epoch, *, loss=1.0, **changed):
    fields = {
        "seed": 0, "seeds": 1, "stage": stage, "stages": 3, "epoch": epoch, "epochs": 2, "examples": 300,
        "metrics": {"loss": loss, "accuracy": 0.5}, "seconds": 1.5, "accuracy": None, "params": None, "state": None,
    }  # fmt: skip
    return Progress(**fields | changed)


@pytest.fixture
def drawn(monkeypatch):
    """The matrices that images were made of, [1, I, T] by name, in order."""
    drawn, draw = [], report.accuracy_matrices
    monkeypatch.setattr(
        "jaxcl.report.tensorboard.accuracy_matrices", lambda accuracy: drawn.append(accuracy) or draw(accuracy)
    )
    return drawn


ROWS = np.asarray([[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.4, 0.6, 0.8]])


def run_stage(board, stage, **options):
    board(progress(stage, 0, **options))
    board(progress(stage, 1, accuracy=ROWS[stage], **options))


def test_scalars_stand_against_epochs(tmp_path):
    with report.TensorBoard(tmp_path) as board:
        for seed in (0, 1):
            for stage in range(3):
                run_stage(board, stage, seed=seed, loss=10.0 * seed + stage)
    for seed in (0, 1):
        tags = shown(tmp_path / f"seed_{seed}")
        assert tags["train/loss"] == {1 + 2 * s + e: 10.0 * seed + s for s in range(3) for e in range(2)}
        assert tags["train/examples_per_second"] == dict.fromkeys(range(1, 7), 200.0)
        for task in range(3):
            read = tags[f"test/task_{task + 1}"]
            assert list(read) == [2, 4, 6]
            np.testing.assert_allclose(list(read.values()), ROWS[:, task], rtol=1e-6)
        np.testing.assert_allclose(list(tags["test/mean"].values()), ROWS.mean(axis=1), rtol=1e-6)
        assert set(tags) == {
            "train/loss", "train/accuracy", "train/examples_per_second", "test/mean", "test/matrix",
            *(f"test/task_{task}" for task in (1, 2, 3)),
        }  # fmt: skip


def test_the_image_is_the_matrix_so_far(tmp_path, drawn):
    with report.TensorBoard(tmp_path) as board:
        for stage in range(3):
            run_stage(board, stage, seed=4)
    assert [list(accuracy) for accuracy in drawn] == [["seed_4"]] * 3
    np.testing.assert_array_equal(drawn[0]["seed_4"], [[ROWS[0], [np.nan] * 3, [np.nan] * 3]])
    np.testing.assert_array_equal(drawn[2]["seed_4"], ROWS[None])
    images = shown(tmp_path / "seed_4")["test/matrix"]
    assert list(images) == [2, 4, 6]
    pixels = matplotlib.image.imread(io.BytesIO(images[6].encoded_image_string), format="png")
    assert pixels.shape[:2] == (images[6].height, images[6].width)
    assert np.ptp(pixels[..., :3]) > 0.5  # something is drawn


def test_a_joint_stage_is_one_row(tmp_path):
    with report.TensorBoard(tmp_path) as board:
        run_stage(board, 0, stages=1)
    tags = shown(tmp_path / "seed_0")
    assert list(tags["test/matrix"]) == [2]
    assert tags["test/mean"] == {2: pytest.approx(ROWS[0].mean())}


def test_histograms_hold_the_finite_parameters_at_the_end_of_a_stage(tmp_path):
    params = {
        "dense": [{"kernel": jnp.asarray([[1.0, 2.0], [3.0, 6.0]])}, jnp.ones(3, jnp.bfloat16)],
        "diverged": jnp.asarray([jnp.nan, jnp.inf, -4.0, 1e30]),
        "lost": jnp.full(2, jnp.nan),
        "empty": jnp.zeros(0),
        "steps": jnp.int32(7),
    }
    with report.TensorBoard(tmp_path) as board:
        run_stage(board, 0, params=params)
    tags = {tag: values for tag, values in shown(tmp_path / "seed_0").items() if tag.startswith("parameters/")}
    assert all(list(values) == [2] for values in tags.values())
    read = {tag.removeprefix("parameters/"): values[2] for tag, values in tags.items()}
    summary = {path: (h.num, h.sum, h.sum_squares, h.min, h.max) for path, h in read.items()}
    assert summary == {
        "dense/0/kernel": (4, 12, 50, 1, 6), "dense/1": (3, 3, 3, 1, 1), "diverged": (1, -4, 16, -4, -4),
        "steps": (1, 7, 49, 7, 7),
    }  # fmt: skip
    assert sum(read["dense/0/kernel"].bucket) == 4


def test_a_resumed_run_hides_what_it_does_again(tmp_path, drawn):
    first = report.TensorBoard(tmp_path)
    run_stage(first, 0)
    run_stage(first, 1)
    first(progress(2, 0, loss=5.0))
    first.close()  # interrupted here; the last checkpoint is that of the first stage
    with report.TensorBoard(tmp_path) as again:
        run_stage(again, 1, loss=2.0)
        run_stage(again, 2, loss=3.0)
    tags = shown(tmp_path / "seed_0")
    assert tags["train/loss"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 3.0, 6: 3.0}
    assert list(tags["test/mean"]) == list(tags["test/matrix"]) == [2, 4, 6]
    np.testing.assert_array_equal(drawn[2]["seed_0"][0, :2], ROWS[:2])  # the first row is of the interrupted run
    np.testing.assert_array_equal(drawn[-1]["seed_0"], ROWS[None])


def test_a_run_begun_again_hides_the_old_one(tmp_path):
    for loss in (1.0, 2.0):
        with report.TensorBoard(tmp_path) as board:
            run_stage(board, 0, loss=loss)
    assert shown(tmp_path / "seed_0")["train/loss"] == {1: 2.0, 2: 2.0}


def test_a_matrix_whose_first_rows_are_lost_has_gaps(tmp_path, drawn):
    for stage in (1, 2):  # as after two resumptions
        with report.TensorBoard(tmp_path) as board:
            run_stage(board, stage)
    np.testing.assert_array_equal(drawn[1]["seed_0"], [[[np.nan] * 3, ROWS[1], ROWS[2]]])


def test_a_closed_board_goes_on_and_an_unused_one_leaves_nothing(tmp_path):
    board = report.TensorBoard(tmp_path / "used")
    board.close()
    assert not (tmp_path / "used").exists()
    run_stage(board, 0)
    board.close()
    run_stage(board, 1)
    board.close()
    assert list(shown(tmp_path / "used" / "seed_0")["train/loss"]) == [1, 2, 3, 4]


def test_the_loop_tells_it_what_it_leaves(tmp_path):
    inputs = np.random.default_rng(0).standard_normal((24, 3)).astype(np.float32)
    examples = Examples(inputs, np.arange(24, dtype=np.int32) % 4)
    keys = jax.random.split(jax.random.key(0), 2)
    stream = streams.class_incremental(keys[0], examples, examples, classes_per_task=2)
    net = nets.MLP((4,), classes=4)
    params = [net.init(key, inputs[:1]) for key in keys]
    with report.TensorBoard(tmp_path) as board:
        results = continual.run_seeds(
            keys, continual.naive(net.apply), optax.sgd(0.1), params, [stream] * 2, epochs=2, batch_size=8,
            callback=board,
        )  # fmt: skip
    for seed, result in enumerate(results):
        tags = shown(tmp_path / f"seed_{seed}")
        read = [[tags[f"test/task_{task}"][step] for task in (1, 2)] for step in (2, 4)]
        np.testing.assert_allclose(read, result.accuracy, rtol=1e-6)
        losses = [entry["loss"] for entry in result.history]
        np.testing.assert_allclose(list(tags["train/loss"].values()), losses, rtol=1e-6)
        largest = max(float(leaf.max()) for leaf in jax.tree.leaves(result.params))
        histograms = [values[4] for tag, values in tags.items() if tag.startswith("parameters/")]
        assert max(histogram.max for histogram in histograms) == pytest.approx(largest)


def test_seeds_trained_together_are_one_run(tmp_path):
    with report.TensorBoard(tmp_path) as board:
        run_stage(board, 0, seeds=5)
    assert list(shown(tmp_path / "seeds_0_to_4")["train/loss"]) == [1, 2]


def test_missing_tensorboardx_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcl\[experiments\]"'):
        report.TensorBoard(tmp_path)
