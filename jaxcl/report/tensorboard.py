"""TensorBoard's event files, written from what the loop tells its callback."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxcl.continual import Progress
from jaxcl.report.files import read_json, write_json
from jaxcl.report.plots import accuracy_matrices
from jaxcl.typing import PyTree

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FLUSH_SECONDS = 5  # an interrupted run loses at most what it wrote in these
LARGEST = 1e19  # beyond, TensorBoard's histograms have no buckets


class TensorBoard:
    """A callback of `jaxcl.continual.run_seeds` that writes event files.

    Each seed is a run of its own in TensorBoard, the folder ``seed_<n>``; seeds that share each step are one run,
    ``seeds_<n>_to_<m>``. All stands against the number of epochs trained, over all stages. After each epoch:
    ``train/<metric>`` and ``train/examples_per_second``. After a stage's last: ``test/task_<j>`` (tasks count from 1)
    and ``test/mean``, the accuracy matrix so far as the image ``test/matrix``, and a histogram of each array,
    ``parameters/<path>``.

    A run that is resumed, or begun again, in the same folder goes on from its first epoch: TensorBoard then hides what
    was written there for that epoch and later ones. The rows of the matrix so far are kept in ``accuracy.json``.

    Close it, or use it in a `with` statement, so that the last events reach the disk.

    Raises:
        ImportError: tensorboardX, or matplotlib for the image, is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from tensorboardX import SummaryWriter  # noqa: PLC0415
        except ImportError as error:
            raise ImportError('TensorBoard files need tensorboardX: pip install "jaxcl[experiments]"') from error
        self._open = SummaryWriter
        self._folder = Path(folder)
        self._writers: dict[Path, SummaryWriter] = {}  # by run; several go on at the same time

    def __call__(self, progress: Progress) -> None:
        """Writes what an epoch has come to, and a stage with its last."""
        step = progress.stage * progress.epochs + progress.epoch + 1
        run = self._folder / _name(progress)
        writer = self._writer_of(run, step)
        speed = {"examples_per_second": progress.examples / progress.seconds}
        for name, value in (progress.metrics | speed).items():
            writer.add_scalar(f"train/{name}", value, step)
        if progress.accuracy is not None:
            for task, value in enumerate(progress.accuracy, 1):
                writer.add_scalar(f"test/task_{task}", value, step)
            writer.add_scalar("test/mean", np.mean(progress.accuracy), step)
            matrix = _matrix(run / "accuracy.json", progress.stage, progress.stages, progress.accuracy)
            writer.add_image("test/matrix", _picture(matrix, run.name), step, dataformats="HWC")
            for path, values in _arrays(progress.params).items():
                writer.add_histogram(f"parameters/{path}", values, step)
        if step == progress.stages * progress.epochs:
            self._writers.pop(run).close()

    def close(self) -> None:
        """Writes what is waiting and closes all files; a later call opens others."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def __enter__(self) -> "TensorBoard":
        """Nothing to open: a run's file comes with its first epoch."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes all files."""
        self.close()

    def _writer_of(self, run: Path, step: int) -> "SummaryWriter":
        if run not in self._writers:
            number = len(list(run.glob("events.*")))  # without it, a file of the same second would be written over
            self._writers[run] = self._open(
                str(run), purge_step=step, flush_secs=FLUSH_SECONDS, filename_suffix=f".{number:04d}"
            )
        return self._writers[run]


def _name(progress: Progress) -> str:
    first, last = progress.seed, progress.seed + progress.seeds - 1
    return f"seed_{first}" if first == last else f"seeds_{first}_to_{last}"


def _matrix(path: Path, stage: int, stages: int, row: np.ndarray) -> np.ndarray:
    """[I, T]: the rows so far, of which `row` [T] is that of `stage`; NaN below, and where an earlier one is lost.

    `path` holds the earlier ones, and then these.
    """
    matrix = np.full((stages, len(row)), np.nan)
    if stage and path.exists():
        earlier = np.asarray(read_json(path), np.float64)[:stage]
        matrix[: len(earlier)] = earlier
    matrix[stage] = row
    write_json(path, matrix[: stage + 1])
    return matrix


def _picture(matrix: np.ndarray, name: str) -> np.ndarray:
    """[height, width, 4], bytes: the figure of an accuracy matrix [I, T]."""
    figure = accuracy_matrices({name: matrix[None]})
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def _arrays(params: PyTree) -> dict[str, np.ndarray]:
    """{path: values [N] that a histogram can hold} of all arrays that have any."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64) for path, leaf in leaves
    }
    kept = {path: values[np.abs(values) < LARGEST] for path, values in arrays.items()}  # leaves out NaN too
    return {path: values for path, values in kept.items() if values.size}
