"""Files that are whole or absent, whatever happens while they are written."""

import os

import pytest

from jaxcl import files


@pytest.mark.parametrize("content", ["naïve ±\n", b"\x00\xff"])
def test_write_atomic_makes_folders_and_replaces(tmp_path, content):
    path = tmp_path / "a" / "b.txt"
    files.write_atomic(path, "before")
    files.write_atomic(str(path), content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, step):
    path = tmp_path / "metrics.json"
    files.write_atomic(path, "old")
    files_at_failure = []

    def fail(*_):
        files_at_failure.extend(os.listdir(tmp_path))
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, "new")
    assert len(files_at_failure) == 2  # the failure came while there was a temporary file beside the old one
    assert os.listdir(tmp_path) == ["metrics.json"]
    assert path.read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
