"""Files that are either whole or absent: text, strict JSON, and the accuracy matrices as CSV."""

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcl.report.tables import check_accuracy
from jaxcl.typing import bad_argument


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that `path` holds, at every moment, the old file or all of the new one.

    Missing parent folders are made. The content goes to a temporary file in the same folder, reaches the disk, and then
    takes the name.

    Raises:
        OSError: the file cannot be written; the old file is then as it was and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], document: object) -> None:
    """Writes `document` as strict JSON, through `write_atomic`.

    Tuples and NumPy arrays become lists, NumPy scalars plain numbers; NaN and infinity, which JSON lacks, become null.

    Raises:
        TypeError: the document holds something else that JSON cannot express.
        OSError: the file cannot be written.
    """
    write_atomic(path, json.dumps(_plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_accuracy_csv(
    path: str | os.PathLike[str], accuracy: Mapping[str, np.ndarray], *, seeds: Sequence[int]
) -> None:
    """Writes every entry of the accuracy matrices, a line each: method, seed, stage, task, accuracy.

    Args:
        path: the file, written through `write_atomic`.
        accuracy: for each method [S, I, T]: seeds, training stages, test tasks. I is T, or 1 for a method that is
            trained on all tasks at once; that one stage is written as the last, T - 1. Stages and tasks count from 0.
            Accuracies, fractions, are written in full precision; NaN as an empty field.
        seeds: the S seeds.

    Raises:
        ValueError: `accuracy` is not as above, or `seeds` has another length than its first axis.
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "stage", "task", "accuracy"])
    for method, array in check_accuracy(accuracy).items():
        if len(seeds) != len(array):
            raise bad_argument("seeds", list(seeds), f"pass {len(array)}, one for each matrix of {method!r}")
        first_stage = array.shape[2] - array.shape[1]
        for (s, i, j), value in np.ndenumerate(array):
            number = float(value)
            writer.writerow([method, seeds[s], first_stage + i, j, "" if math.isnan(number) else repr(number)])
    write_atomic(path, text.getvalue())


def _plain(value: object) -> object:
    """`value` with Python's own types only, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
