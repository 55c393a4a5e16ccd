"""The notebooks, cell by cell in smoke form, as Colab would run them once jaxcl is installed."""

import json
import re
from pathlib import Path

import pytest
from helpers import code_cells, run_notebook

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in (ROOT / "experiments" / "notebooks").glob("*.ipynb")}
SYSTEMS = ["dkvb", "ibm", "mean_kl", "oa_adapter", "simvq"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_notebook_runs(system, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "methods" / f"{system}.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    cells = code_cells(NOTEBOOKS[system])
    assert example.strip() in cells  # which test_docs runs
    cells.remove(example.strip())
    names, shown = run_notebook(cells, tmp_path, monkeypatch)
    assert names["document"]["preset"] == "smoke"
    assert len(shown) == 1 and "<table" in shown[0]


def test_each_system_has_a_notebook_without_outputs():
    assert sorted(NOTEBOOKS) == sorted([*SYSTEMS, "quickstart"])  # test_quickstart runs the last
    for notebook in NOTEBOOKS.values():
        assert not any(cell.get("outputs") for cell in json.loads(notebook.read_text())["cells"])
