"""Learners as files: smoke form, and that a file which answers otherwise is told."""

import json

import numpy as np
import pytest

from experiments import lifelong

SMOKE = ["--preset", "smoke"]


def test_files_answer_as_learners_did_and_their_bytes_are_told(tmp_path):
    methods = ["naive", "dkvb_simvq", "wsn", "ibm", "oa_adapter", "independent"]
    document = lifelong.main([*SMOKE, "--methods", *methods, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert [*written["files"]] == methods == [*document["results"]]
    for name, found in written["files"].items():
        assert found["file_bytes"]["mean"] == (tmp_path / "files" / f"{name}_0.learner").stat().st_size
    bytes_of = {name: found["file_bytes"]["mean"] for name, found in written["files"].items()}
    assert bytes_of["ibm"] < bytes_of["naive"] < bytes_of["independent"]
    assert "bytes of the file that answers" in (tmp_path / "report.html").read_text()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lifelong, "_learn", None)
        assert lifelong.main([*SMOKE, "--methods", *methods, "--out", str(tmp_path)]) == written


def test_a_file_that_answers_otherwise_is_told(tmp_path, monkeypatch):
    def other(path, like):
        found = {"params": {}}
        for name, layer in like["params"].items():
            found["params"][name] = {leaf: -np.ones_like(array) for leaf, array in layer.items()}
        return found

    monkeypatch.setattr(lifelong, "load_tree", other)
    with pytest.raises(RuntimeError, match=r"naive_0.learner answers with \[.*\], where the learner had \["):
        lifelong.main([*SMOKE, "--methods", "naive", "--out", str(tmp_path)])
