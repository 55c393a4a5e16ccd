"""Finished runs compared, and the list of what can be run, as a user sees them."""

import ast
import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import compare
from experiments import list as listing
from experiments.card import Card
from jaxcl import report
from jaxcl.continual.metrics import average_accuracy, summarise

ROOT = Path(__file__).parents[2]
HOSTILE = "<b>dkvb</b>"


def write_run(folder, accuracy, seeds=2, **settings):
    """What an experiment leaves that `compare` reads: a run of methods with these accuracies."""
    arrays = {
        method: np.full((seeds, 1 if method == "joint" else tasks, tasks), value)
        for method, (value, tasks) in accuracy.items()
    }
    results = {method: {"acc": summarise([average_accuracy(m) for m in array])} for method, array in arrays.items()}
    document = {
        "experiment": "quickstart", "preset": "cpu", "config": {"preset": "cpu", "out": str(folder), **settings},
        "results": results, "costs": {method: {"seconds": summarise([2.0] * seeds)} for method in results},
        "environment": {"jax": "0.10.2", "python": "3.11.9", "devices": ["cpu"]}, "seconds": 9.0,
    }  # fmt: skip
    report.write_json(folder / "metrics.json", document)
    report.write_accuracy_csv(folder / "accuracy.csv", arrays, seeds=range(seeds))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "first", {"naive": (0.2, 5), HOSTILE: (0.9, 5)}, pairs=256, nested={"a": 1})
    second = write_run(
        tmp_path / "second", {"naive": (0.25, 5), "joint": (0.95, 5)}, pairs=64, nested={"a": 1}, new=[1, 2]
    )
    return [str(first), str(second)]


class Cells(HTMLParser):
    """The cells of each table of a page."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if self.inside:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")


TABLE = [
    ["run", "method", "acc %", "seconds"],
    ["first", "naive", "20.0 ± 0.0", "2.0"],
    ["first", HOSTILE, "90.0 ± 0.0", "2.0"],
    ["second", "naive", "25.0 ± 0.0", "2.0"],
    ["second", "joint", "95.0 ± 0.0", "2.0"],
]


def test_the_table_stands_in_the_terminal_and_on_the_page(runs, tmp_path, capsys):
    assert compare.main([*runs, "--out", str(tmp_path / "out")]) == TABLE
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Means over 2 seeds;")
    assert [re.split(" {2,}", line) for line in printed[2:3] + printed[4:8]] == TABLE
    assert printed[-1] == f"Wrote {tmp_path / 'out'}/compare.html."
    page = (tmp_path / "out" / "compare.html").read_text()
    results, settings = Cells(page).tables
    assert results == TABLE
    assert settings == [["setting", "first", "second"], ["pairs", "256", "64"], ["new", "-", "1, 2"]]
    assert page.count("<svg") == 3
    assert HOSTILE not in page
    assert "No figure" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_runs_of_other_lengths_share_the_table_only(runs, tmp_path):
    longer = write_run(tmp_path / "longer", {"naive": (0.1, 10)}, pairs=256, nested={"a": 1})
    rows = compare.main([runs[0], str(longer), "--out", str(tmp_path)])
    assert rows[-1][:3] == ["longer", "naive", "10.0 ± 0.0"]
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert "No figure of accuracy over tasks, whose number differs: 5 in first, 10 in longer." in page
    assert ">None.<" in page  # no setting differs


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run", "c"):
        write_run(tmp_path / folder, {"naive": (0.2, 2)})
    runs = compare.read_runs([Path("a/run"), Path("b/run"), Path("./c/")])
    assert [run.name for run in runs] == ["a/run", "b/run", "c"]


def test_methods_keep_the_order_of_the_results(runs):
    path = Path(runs[0]) / "accuracy.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *reversed(lines)]))
    run, _ = compare.read_runs([Path(folder) for folder in runs])
    assert [*run.accuracy] == [*run.metrics["results"]] == ["naive", HOSTILE]


@pytest.mark.parametrize("folders", [[], [0]])
def test_one_run_is_not_compared(runs, folders):
    with pytest.raises(ValueError, match=r"runs: got \d of them; name the folders of two"):
        compare.main([runs[k] for k in folders])


def test_a_folder_named_twice_is_refused(runs):
    with pytest.raises(ValueError, match=r"runs: got .*first more than once; name each folder once"):
        compare.main([*runs, f"{runs[0]}/../first"])


def test_an_unfinished_run_is_told_from_a_broken_one(runs):
    metrics = Path(runs[1]) / "metrics.json"
    document = json.loads(metrics.read_text())
    del document["costs"]
    for text, message in [
        (json.dumps(document), r"runs: got .*second.metrics.json \(metrics: got no 'costs'; .*\); make it anew"),
        ("[1]", r"runs: got .*second.metrics.json \(metrics: got no 'experiment', "),
        ('{"results": {', r"path: got .*second.metrics.json \(.*line 1 column 14"),
    ]:
        metrics.write_text(text)
        with pytest.raises(ValueError, match=message):
            compare.main(runs)
    metrics.unlink()
    with pytest.raises(ValueError, match=r"runs: got .*second without metrics.json; let the run finish"):
        compare.main(runs)


def test_files_that_disagree_are_refused(runs):
    first, second = (Path(folder) / "accuracy.csv" for folder in runs)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"runs: got .*second, whose metrics.json and accuracy.csv name different"):
        compare.main(runs)
    second.unlink()
    with pytest.raises(ValueError, match=r"runs: got .*second without accuracy.csv; name runs that learn tasks"):
        compare.main(runs)


@pytest.mark.parametrize("tool", [compare, listing])
def test_help_explains(tool, capsys):
    with pytest.raises(SystemExit) as exit_of_help:
        tool.main(["--help"])
    assert exit_of_help.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert tool.__doc__.splitlines()[0][:40] in text


def test_the_list_shows_every_purpose_cost_and_result():
    text = subprocess.run(
        [sys.executable, "-m", "experiments.list"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    shown = " ".join(text.split())
    modules = listing.runnable()
    assert {"experiments.quickstart", "experiments.dkvb", "experiments.benchmarks.nearest"} <= set(modules)
    for name, module in modules.items():
        assert f"python -m {name} {module.__doc__.splitlines()[0]}" in shown
        for options, card in module.CARDS.items():
            assert f"{options or 'without options'}: {card.cost} {card.expected}" in shown
    assert max(map(len, text.splitlines())) <= 80


def can_be_run(source):
    """Whether a module does something when it is run: `if __name__ == "__main__"`."""
    conditions = [ast.unparse(node.test) for node in ast.parse(source).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in conditions


RUNNABLE = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if can_be_run(path.read_text())
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_what_can_be_run_says_what_it_costs_and_gives(name):
    module = importlib.import_module(name)
    assert re.fullmatch(r"\S.*\.", (module.__doc__ or "").splitlines()[0]), "the docstring's first line is no sentence"
    assert getattr(module, "CARDS", None), "no CARDS: see experiments.card"
    for options, card in module.CARDS.items():
        assert isinstance(options, str) and isinstance(card, Card) and all(card)
    if hasattr(module, "preset"):
        named = {options.split()[1] for options in module.CARDS if options.startswith("--preset ")}
        assert named == {"smoke", "cpu", "paper"}
