"""Reading what a run left: the inverse of writing it, and one clear error for a file that is not as it was written."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl import report

ANY_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=8)


@st.composite
def accuracies(draw):
    """{method: [S, T, T] or [S, 1, T]} with fractions and NaN, and S seeds."""
    count, tasks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    methods = draw(st.lists(ANY_TEXT, min_size=1, max_size=3, unique=True))
    seeds = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count, unique=True))
    fractions = st.floats(0, 1) | st.just(float("nan"))
    accuracy = {}
    for method in methods:
        shape = (count, draw(st.sampled_from([1, tasks])), tasks)
        size = int(np.prod(shape))
        accuracy[method] = np.reshape(draw(st.lists(fractions, min_size=size, max_size=size)), shape)
    return accuracy, seeds


@settings(max_examples=50, deadline=None)
@given(accuracies())
def test_reading_accuracies_is_the_inverse_of_writing_them(tmp_path_factory, drawn):
    accuracy, seeds = drawn
    path = tmp_path_factory.mktemp("csv") / "accuracy.csv"
    report.write_accuracy_csv(path, accuracy, seeds=seeds)
    read = report.read_accuracy_csv(path)
    assert list(read) == list(accuracy)
    for method, array in accuracy.items():
        assert read[method].dtype == np.float64
        np.testing.assert_array_equal(read[method], array, strict=True)


def test_accuracies_are_read_in_any_order_of_lines(tmp_path):
    path = tmp_path / "accuracy.csv"
    accuracy = {"naive": np.arange(8).reshape(2, 2, 2) / 10, "joint": np.full((1, 1, 2), 0.5)}
    report.write_accuracy_csv(path, {"naive": accuracy["naive"]}, seeds=[0, 1])
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *lines[:4], "joint,0,1,1,0.5", "joint,0,1,0,0.5", *reversed(lines[4:])]))
    read = report.read_accuracy_csv(path)
    np.testing.assert_array_equal(read["naive"], accuracy["naive"])
    np.testing.assert_array_equal(read["joint"], accuracy["joint"])


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "metrics.json"
    report.write_json(path, {"a": [1, 0.1, float("nan")], "ü": {"b": None}})
    assert report.read_json(str(path)) == {"a": [1, 0.1, None], "ü": {"b": None}}


def fails(read, path, fault):
    with pytest.raises(ValueError, match=fault) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"path: got {path} (")
    assert re.search(r"\); (restore the file|name a file that can be read)", message)


@pytest.mark.parametrize("read", [report.read_json, report.read_accuracy_csv])
def test_a_file_that_cannot_be_read_is_named(read, tmp_path):
    fails(read, tmp_path / "missing", "No such file or directory")
    fails(read, tmp_path, "Is a directory")
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe")
    fails(read, path, "can't decode byte 0xff")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Expecting value: line 1 column 1"),
        ('{\n"a": 1,\n', "line 3 column 1"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
    ],
)
def test_malformed_json_says_where(tmp_path, text, fault):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    fails(report.read_json, path, fault)


HEAD = "method,seed,stage,task,accuracy\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "line 0: its first line is not method,seed,stage,task,accuracy"),
        ("method,seed,task,stage,accuracy\n", "line 1: its first line is not"),
        (HEAD, "no method"),
        (HEAD + "a,0,0,0\n", "line 2: not enough values"),
        (HEAD + "a,0,0,0,0.5,1\n", "line 2: too many values"),
        (HEAD + "a,0,0,0,0.5\n\n", "line 3: not enough values"),
        (HEAD + "a,0,0,x,0.5\n", "line 2: invalid literal for int.*'x'"),
        (HEAD + "a,0,0,0,half\n", "line 2: could not convert string to float: 'half'"),
        (HEAD + "a,0,0,0,95.0\n", r"accuracy\['a'\]: got the value 95.0; pass fractions"),
        (HEAD + "a,0,0,0,0.5\na,0,0,0,0.5\n", "line 3: the entry is there twice"),
        (HEAD + 'a,0,0,0,"0.5\n', "line 2: unexpected end of data"),
        (HEAD + "a,0,0,0,0.5\na,0,0,1,0.5\n", "the matrices of 'a' have entries missing or too many"),  # joint is last
        (HEAD + "a,0,0,0,0.5\na,0,0,1,0.5\na,0,1,0,0.5\n", "the matrices of 'a' have entries missing"),
        (HEAD + "a,0,0,0,0.5\na,0,2,0,0.5\n", "the matrices of 'a' have entries missing"),
        (HEAD + "a,0,-1,0,0.5\n", "the matrices of 'a' have entries missing"),
        (HEAD + "a,0,0,0,0.5\nb,0,1,0,0.5\nb,0,1,1,0.5\n", r"accuracy\['b'\]: .* must be 1"),
    ],
)
def test_malformed_accuracies_say_where(tmp_path, text, fault):
    path = tmp_path / "accuracy.csv"
    path.write_text(text)
    fails(report.read_accuracy_csv, path, fault)
