"""The README's table of results is that of the kept runs, made by the commands beside them."""

import json
from pathlib import Path

import pytest

from experiments import results
from experiments.common import different_settings

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_table_of_the_kept_runs():
    text = (ROOT / "README.md").read_text()
    assert results.with_table(text) == text


@pytest.mark.parametrize("claim", results.CLAIMS, ids=lambda claim: f"{claim.run}-{claim.metric}")
def test_a_kept_run_has_the_settings_of_its_command(claim):
    assert not different_settings(results.read_run(claim.run)["config"], results.settings_of(claim.command))


def test_every_kept_run_has_its_row():
    assert {path.stem for path in results.PUBLISHED.glob("*.json")} == {claim.run for claim in results.CLAIMS}


def test_a_run_is_kept_under_its_name_and_told(tmp_path, monkeypatch):
    claim = results.CLAIMS[0]
    document = results.read_run(claim.run)
    (tmp_path / "run").mkdir()
    costs = {"ibm": {"seconds": {"values": [20.0, 40.0]}}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(document | {"costs": costs}))
    (tmp_path / "README.md").write_text("before\n" + "".join(results.MARKS) + "after\n")
    for kept in results.PUBLISHED.glob("*.json"):
        (tmp_path / kept.name).write_bytes(kept.read_bytes())
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    results.main(["--keep", f"{claim.run}={tmp_path / 'run'}", "--readme", str(tmp_path / "README.md")])
    kept = json.loads((tmp_path / f"{claim.run}.json").read_text())
    assert kept["results"] == document["results"] and kept["config"]["out"] == f"runs/{claim.run}"
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert f"| 1 | `python -m {claim.command}` |" in text


def test_a_run_of_another_command_is_not_kept(tmp_path, monkeypatch):
    claim = results.CLAIMS[0]
    document = results.read_run(claim.run)
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    for other, message in (
        ({"config": document["config"] | {"seeds": 77}}, "with other seeds; keep what python -m experiments"),
        ({"results": {}}, "with other no config"),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message):
            results.main(["--keep", f"{claim.run}={tmp_path}"])
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "nothing"], r"keep: got nothing; write it as NAME=FOLDER, with a NAME of \["),
        (["--keep", "other=runs"], "keep: got other=runs; write it as"),
        (["--keep", f"{results.CLAIMS[0].run}=nowhere"], "keep: got .* without metrics.json; let the run finish"),
        (["--readme", __file__], "readme: got one without the marks; put <!-- results: begin"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        results.main(arguments)
