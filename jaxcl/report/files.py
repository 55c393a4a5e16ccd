"""Strict JSON and the accuracy matrices as CSV, in files that are either whole or absent; and reading them back."""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxcl.files import write_atomic
from jaxcl.report.tables import check_accuracy
from jaxcl.typing import bad_argument

COLUMNS = ["method", "seed", "stage", "task", "accuracy"]


def write_json(path: str | os.PathLike[str], document: object) -> None:
    """Writes `document` as strict JSON, through `files.write_atomic`.

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
        path: the file, written through `files.write_atomic`.
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
    writer.writerow(COLUMNS)
    for method, array in check_accuracy(accuracy).items():
        if len(seeds) != len(array):
            raise bad_argument("seeds", list(seeds), f"pass {len(array)}, one for each matrix of {method!r}")
        first_stage = array.shape[2] - array.shape[1]
        for (s, i, j), value in np.ndenumerate(array):
            number = float(value)
            writer.writerow([method, seeds[s], first_stage + i, j, "" if math.isnan(number) else repr(number)])
    write_atomic(path, text.getvalue())


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a strict JSON file holds, as `write_json` writes it; what was NaN there is None.

    Raises:
        ValueError: the file cannot be read or is not strict JSON; names file, place and fault.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    text = _read(path)
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, error) from error


def read_accuracy_csv(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The accuracy matrices in a file that `write_accuracy_csv` wrote.

    Returns:
        For each method [S, I, T], float64: seeds in the file's order, training stages, test tasks. I is T, or 1 for a
        method that was trained on all tasks at once. NaN where the field is empty.

    Raises:
        ValueError: the file cannot be read, or is not as `write_accuracy_csv` writes it; names file and fault.
    """
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    entries: dict[str, dict[tuple[int, int, int], float]] = {}  # {method: {(seed, stage, task): accuracy}}
    try:
        if next(reader, []) != COLUMNS:
            raise ValueError(f"its first line is not {','.join(COLUMNS)}")
        for row in reader:
            method, seed, stage, task, accuracy = row
            place = int(seed), int(stage), int(task)
            if place in entries.setdefault(method, {}):
                raise ValueError("the entry is there twice")
            entries[method][place] = float(accuracy or "nan")
    except (ValueError, csv.Error) as error:
        raise _malformed(path, f"line {reader.line_num}: {error}") from error
    try:
        return check_accuracy({method: _matrices(method, of_method) for method, of_method in entries.items()})
    except ValueError as error:
        raise _malformed(path, error) from error


def _matrices(method: str, entries: Mapping[tuple[int, int, int], float]) -> np.ndarray:
    """[S, I, T] from {(seed, stage, task): accuracy}."""
    seeds, stages, tasks = (list(dict.fromkeys(numbers)) for numbers in zip(*entries, strict=True))
    first_stage = 0 if len(stages) > 1 else len(tasks) - 1  # a joint method's one stage is the last
    wanted = list(itertools.product(seeds, range(first_stage, len(tasks)), range(len(tasks))))
    if set(wanted) != set(entries):
        raise ValueError(f"the matrices of {method!r} have entries missing or too many")
    return np.asarray([entries[place] for place in wanted]).reshape(len(seeds), -1, len(tasks))


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise bad_argument("path", f"{os.fspath(path)} ({error.strerror})", "name a file that can be read") from error
    except UnicodeDecodeError as error:
        raise _malformed(path, error) from error


def _malformed(path: str | os.PathLike[str], fault: object) -> ValueError:
    return bad_argument("path", f"{os.fspath(path)} ({fault})", "restore the file, or make it anew by running again")


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
