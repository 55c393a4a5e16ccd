"""Experiments and the README, as a user runs them."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import class_incremental, dkvb, ibm
from experiments.benchmarks import harness
from experiments.common import run_command
from jaxcl import continual
from jaxcl.typing import bad_argument

ROOT = Path(__file__).parents[2]
METHODS = {"naive", "joint", "linear_probe", "dkvb"}
METRICS = {"acc", "bwt", "fwt", "forgetting", "learning_accuracy", "average_anytime_accuracy", "parameters", "bytes"}
COSTS = {"seconds", "examples_per_second", "peak_memory", "compilations"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("dkvb")
    return out, dkvb.main(["--preset", "smoke", "--out", str(out)])


def test_metrics_have_the_promised_form(smoke):
    out, document = smoke
    written = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN
    assert set(written) == {"experiment", "preset", "config", "results", "costs", "environment", "seconds"}
    assert (written["experiment"], written["preset"]) == ("dkvb", "smoke")
    assert set(written["environment"]) == {"jax", "python", "devices"}
    assert set(written["results"]) == METHODS
    for method, results in written["results"].items():
        assert set(results) == METRICS and set(written["costs"][method]) == COSTS
        for summary in (*results.values(), *written["costs"][method].values()):
            assert set(summary) == {"mean", "std", "ci95", "values"} and len(summary["values"]) == 2
        assert results["acc"]["values"] == document["results"][method]["acc"]["values"]
        assert 0 <= results["acc"]["mean"] <= 1
    assert written["results"]["joint"]["forgetting"]["mean"] is None
    assert json.loads((out / "config.json").read_text()) == written["config"]


def test_accuracy_csv_holds_every_matrix_and_yields_the_metrics(smoke):
    out, document = smoke
    with (out / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    matrices = {method: np.full((2, 5, 5), np.nan) for method in METHODS}
    for row in rows:
        seed, stage, task = (int(row[name]) for name in ("seed", "stage", "task"))
        matrices[row["method"]][seed, stage, task] = float(row["accuracy"])
    assert np.isfinite(matrices["dkvb"]).all()
    for method in ("naive", "dkvb"):
        expected = [continual.metrics.forgetting(matrix) for matrix in matrices[method]]
        np.testing.assert_allclose(document["results"][method]["forgetting"]["values"], expected)


def test_report_is_one_page_with_table_and_plots(smoke):
    page = (smoke[0] / "report.html").read_text()
    assert page.count("<svg") == 6 and "<table" in page  # two figures of accuracy, four of keys
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_one_compilation_of_training_and_evaluation_whatever_the_seeds(smoke):
    # start, train and evaluate: no program of these strategies compiles twice.
    for costs in smoke[1]["costs"].values():
        assert costs["compilations"]["values"] == [3, 3]


def test_the_same_settings_give_the_same_numbers(smoke, tmp_path):
    dkvb.main(["--preset", "smoke", "--out", str(tmp_path)])
    again, before = (json.loads((out / "metrics.json").read_text())["results"] for out in (tmp_path, smoke[0]))
    assert again == before
    for name in ("accuracy.csv", "history.csv"):
        assert (tmp_path / name).read_bytes() == (smoke[0] / name).read_bytes()


def test_a_finished_run_is_told_and_not_repeated(smoke, capsys, monkeypatch):
    monkeypatch.setattr(continual, "run_seeds", None)
    again = dkvb.main(["--preset", "smoke", "--out", str(smoke[0])])
    assert again["results"] == json.loads((smoke[0] / "metrics.json").read_text())["results"]
    assert "finished" in (told := capsys.readouterr().out) and "dkvb" in told


def test_other_settings_in_the_same_folder_are_refused_by_name(smoke):
    with pytest.raises(ValueError, match=r"out: got .* epochs 2 \(now 3\), pairs 32 \(now 16\); choose another folder"):
        dkvb.main(["--preset", "smoke", "--out", str(smoke[0]), "--epochs", "3", "--pairs", "16"])


@pytest.mark.parametrize("mesh", ["data", "data=two", "data=2,data=3,4"])
def test_a_malformed_mesh_is_named(tmp_path, mesh):
    with pytest.raises(ValueError, match=f"mesh: got {mesh}; write it as data=4,model=2"):
        dkvb.main(["--preset", "smoke", "--out", str(tmp_path), "--mesh", mesh])


def test_several_processes_without_a_mesh_are_refused(tmp_path):
    with pytest.raises(ValueError, match="distributed: got True; say with --mesh"):
        dkvb.main(["--preset", "smoke", "--out", str(tmp_path), "--distributed"])


def test_on_a_mesh_seeds_train_in_turn(tmp_path):
    arguments = ["--preset", "smoke", "--limit", "200", "--mesh", "data=8", "--out", str(tmp_path)]
    assert set(dkvb.main(arguments)["results"]) == METHODS


def test_tensorboard_and_history_are_left(tmp_path):
    dkvb.main(["--preset", "smoke", "--seeds", "1", "--tensorboard", "--out", str(tmp_path)])
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == METHODS
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Two epochs of each of five tasks, or of one for joint training; loss and accuracy.
    assert {method: sum(row["method"] == method for row in rows) for method in METHODS} == {
        "naive": 20, "linear_probe": 20, "dkvb": 20, "joint": 4,
    }  # fmt: skip


@pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="JAXCL_DATA is not set")
def test_dkvb_runs_on_the_mnist_pack(tmp_path):
    dkvb.main(["--data", "mnist", "--preset", "smoke", "--seeds", "1", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["experiment"] == "dkvb" and document["config"]["data"] == "mnist"
    assert document["results"]["dkvb"]["acc"]["std"] is None  # one seed has no spread


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_paper_preset_has_the_published_settings(data):
    config = dkvb.preset("paper", data)
    # Träuble et al. 2023, CIFAR-10: 256 codebooks, 4,096 pairs, keys of 14, lr 0.3, batches of 256, 2,000 epochs.
    published = (256, 4096, 14, 0.3, 256, 2000, 1)
    assert published == (
        config.codebooks, config.pairs, config.key_width, config.learning_rate, config.batch_size, config.epochs,
        config.top_k,
    )  # fmt: skip


def test_options_override_the_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(class_incremental, "run", lambda config, experiment: seen.append(config) or {})
    dkvb.main(["--preset", "smoke", "--codebooks", "3", "--data", "mnist"])
    assert (seen[0].codebooks, seen[0].data, seen[0].preset, seen[0].pairs) == (3, "mnist", "smoke", 32)


@pytest.mark.parametrize("name", ["quickstart", "dkvb", "baselines"])
def test_help_explains(name):
    text = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert "--preset" in text and "--seeds" in text and "minute" in text


def test_each_preset_and_data_set_has_a_folder(monkeypatch):
    seen = []
    monkeypatch.setattr(class_incremental, "run", lambda config, experiment: seen.append(str(config.out)) or {})
    for arguments in ("", "--preset smoke", "--data mnist", "--data mnist --preset paper", "--data mnist --out a"):
        dkvb.main(arguments.split())
    assert seen == ["runs/dkvb", "runs/dkvb_smoke", "runs/dkvb_mnist", "runs/dkvb_mnist_paper", "a"]


@pytest.mark.parametrize(
    ("main", "data"), [(dkvb.main, "imagenet"), (dkvb.main, "mnist:train"), (ibm.main, "folder"), (ibm.main, "folder:")]
)
def test_another_data_set_is_refused(main, data):
    with pytest.raises(ValueError, match=f"data: got '{data}'; choose one of digits, mnist, cifar10, "):
        main(["--data", data])


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (bad_argument("pairs", 0, "pass 1 or more"), "error: pairs: got 0; pass 1 or more"),
        (ImportError("digits need scikit-learn"), "error: digits need scikit-learn"),
        (KeyboardInterrupt(), "\ninterrupted: the same command goes on from what was saved"),
    ],
)
def test_mistakes_at_the_command_line_end_in_a_line(error, shown):
    def main():
        raise error

    with pytest.raises(SystemExit, match=f"^{shown}$"):
        run_command(main)


def test_other_errors_keep_their_traceback():
    def main():
        raise ValueError

    with pytest.raises(ValueError):
        run_command(main)


def test_another_experiments_folder_is_said_to_be_one(smoke):
    with pytest.raises(ValueError, match=r"which holds a run with other settings than this experiment has; choose"):
        ibm.main(["--preset", "smoke", "--out", str(smoke[0])])


def test_bad_seeds_are_named():
    with pytest.raises(ValueError, match=r"seeds: got 0; pass 1 or more"):
        dkvb.main(["--seeds", "0"])


def test_the_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 20
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)  # our own file
    assert names["accuracy"] > 0.9  # what the text beside the example promises


def test_the_harness_measures_both_sides_and_ends_with_json(monkeypatch, capsys):
    calls = []
    case = harness.Case(lambda: lambda: calls.append("ours"), lambda: lambda: calls.append("peer"), ours_per_round=2)
    monkeypatch.setattr(harness, "_peak_elsewhere", lambda benchmark, case, side: {"ours": 1.0, "peer": 2.0}[side])
    rows = harness.main("nearest", {"a": case}, ["--repeats", "3"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows
    assert set(rows[0]) == {
        "benchmark", "case", "ours_seconds", "peer_seconds", "ratio", "ours_peak_mib", "peer_peak_mib",
    }  # fmt: skip
    assert rows[0]["ratio"] == rows[0]["peer_seconds"] / rows[0]["ours_seconds"]
    assert calls == ["ours", "peer"] + ["ours", "ours", "peer"] * 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_the_harness_sees_memory_beyond_the_inputs():
    def factory():
        inputs = np.ones(8 * 2**20, np.uint8)
        return lambda: np.ones(64 * 2**20, np.uint8).sum() + inputs[0]

    assert 60 < harness._peak_mib(factory) < 80  # the step's 64 MiB, not the inputs' 8
