"""The quickstart: five systems, one table, one page."""

import json
import re
from pathlib import Path

import pytest
from helpers import code_cells, run_notebook

from experiments import quickstart

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """By its notebook."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        names, (page,) = run_notebook(code_cells(NOTEBOOK), tmp_path_factory.mktemp("notebook"), monkeypatch)
    out = names["OUT"] / "quickstart"
    assert page == (out / "report.html").read_text()
    return out, names["document"]


def test_every_system_has_its_rows(smoke):
    out, document = smoke
    assert json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)["systems"].keys() == {
        "dkvb", "ibm", "simvq", "mean_kl", "oa_adapter",
    }  # fmt: skip
    rows = {name: {row["method"]: row for row in of_system} for name, of_system in document["systems"].items()}
    assert {name: [*of_system] for name, of_system in rows.items()} == {
        "dkvb": ["naive", "dkvb", "joint"], "ibm": ["naive", "wsn", "ibm"], "simvq": ["vq:1024", "simvq:1024"],
        "mean_kl": ["mean_kl:400"], "oa_adapter": ["frozen", "lora", "oa_inputs"],
    }  # fmt: skip
    for name in ("dkvb", "ibm", "oa_adapter"):
        results = json.loads((out / name / "metrics.json").read_text())["results"]
        for method, row in rows[name].items():
            assert row["accuracy"] == results[method]["acc"]["mean"] and row["seconds"] > 0
    assert rows["ibm"]["ibm"]["bytes"] == (out / "ibm" / "masks" / "ibm_0.masks").stat().st_size
    assert rows["ibm"]["ibm"]["forgetting"] == 0
    assert rows["mean_kl"]["mean_kl:400"]["bytes"] == (out / "mean_kl" / "files" / "mean_kl-400-0.jcl").stat().st_size
    assert re.fullmatch(r"\d+\.\d % of codes in use, \d+\.\d dB", rows["simvq"]["simvq:1024"]["beside"])
    assert rows["oa_adapter"]["oa_inputs"]["beside"].endswith("ranks a site and task")


def test_the_page_needs_no_other_but_leads_to_each_systems_own(smoke):
    out, _ = smoke
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "<table" in page
    links = re.findall(r'<a href="([^"]*)"', page)
    assert len(links) == 5 and all((out / link).is_file() for link in links)


def test_a_finished_run_is_told_and_an_interrupted_one_goes_on(smoke, capsys, monkeypatch):
    out, document = smoke
    monkeypatch.setattr(quickstart, "SHOWS", None)
    assert quickstart.main(["--preset", "smoke", "--out", str(out)])["systems"] == document["systems"]
    assert "finished" in (told := capsys.readouterr().out) and "oa_inputs" in told
    monkeypatch.undo()
    (out / "metrics.json").unlink()
    again = quickstart.main(["--preset", "smoke", "--out", str(out)])  # which each system's folder tells
    assert again["systems"] == document["systems"]


def test_one_system_can_be_shown_alone(tmp_path):
    document = quickstart.main(["--preset", "smoke", "--systems", "mean_kl", "--out", str(tmp_path)])
    assert [*document["systems"]] == ["mean_kl"]


def test_there_is_no_published_quickstart():
    with pytest.raises(ValueError, match="preset: got paper; nothing is published for digits"):
        quickstart.main(["--preset", "paper"])
