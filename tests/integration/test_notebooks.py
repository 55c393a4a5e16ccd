"""The notebooks, cell by cell in smoke form, as Colab would run them once jaxcl is installed."""

import json
from pathlib import Path

import pytest
from helpers import run_notebook

NOTEBOOKS = {path.stem: path for path in (Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb")}
SYSTEMS = ["dkvb", "ibm", "mean_kl", "oa_adapter", "simvq"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_notebook_runs(system, tmp_path, monkeypatch):
    names, shown = run_notebook(NOTEBOOKS[system], tmp_path, monkeypatch)
    assert names["document"]["preset"] == "smoke"
    assert len(shown) == 1 and "<table" in shown[0]


def test_each_system_has_a_notebook_without_outputs():
    assert sorted(NOTEBOOKS) == sorted([*SYSTEMS, "quickstart"])  # test_quickstart runs the last
    for notebook in NOTEBOOKS.values():
        assert not any(cell.get("outputs") for cell in json.loads(notebook.read_text())["cells"])
