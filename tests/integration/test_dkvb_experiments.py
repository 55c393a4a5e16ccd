"""The experiments with the key-value bottleneck: training in the dual, grids, key care, deleting a class."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest

from experiments import dkvb, forget_class, key_care, keys
from experiments.sweep import run_grid
from jaxcl import bottleneck, report

SMOKE = ["--preset", "smoke", "--seeds", "1", "--methods", "dkvb"]


def run_dkvb(out, *options):
    return dkvb.main([*SMOKE, "--out", str(out), *options])


def results_in(folder):
    return json.loads((folder / "metrics.json").read_text())["results"]


def test_training_in_the_dual_is_training_in_the_loop(tmp_path):
    """The same order of batches, so the same accuracy after each task, and the same values."""
    run_dkvb(tmp_path / "loop", "--epochs", "4")
    dual = run_dkvb(tmp_path / "dual", "--epochs", "4", "--dual")
    assert results_in(tmp_path / "dual") == results_in(tmp_path / "loop")
    accuracies = [report.read_accuracy_csv(tmp_path / name / "accuracy.csv")["dkvb"] for name in ("loop", "dual")]
    np.testing.assert_array_equal(*accuracies)
    assert dual["costs"]["dkvb"]["compilations"]["mean"] == 3  # counts, steps and the end of a task


DUAL = ["--epochs", "21", "--dual", "--checkpoint-seconds", "0"]  # three calls a task


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run_dkvb(out, *DUAL)
    return out


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_a_run_in_the_dual_that_is_stopped_goes_on(tmp_path, monkeypatch, undisturbed, calls):
    """Stopped in the first task, in a later one, and between two: the results are those of an undisturbed run."""
    train, left = bottleneck.train_votes, [calls]

    def stopping(*args, **settings):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return train(*args, **settings)

    monkeypatch.setattr(keys.bottleneck, "train_votes", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_dkvb(tmp_path / "stopped", *DUAL)
    fitted = []
    monkeypatch.setattr(keys.bottleneck, "train_votes", train)
    monkeypatch.setattr(keys.bottleneck, "fit_epoch", lambda *args, **settings: fitted.append(args))
    run_dkvb(tmp_path / "stopped", *DUAL)
    assert not fitted  # keys were kept
    assert results_in(tmp_path / "stopped") == results_in(undisturbed)
    assert (tmp_path / "stopped" / "history.csv").read_bytes() == (undisturbed / "history.csv").read_bytes()


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "dkvb"
    folder.mkdir(parents=True)
    (folder / "keys_0.npz").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"out: got .*keys_0.npz, which cannot be read .*; remove it"):
        run_dkvb(tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        ["--projection", "learned", "--key-source", "noise"],
        ["--decoder", "linear", "--learning-rate", "30"],
        ["--decoder", "mlp", "--train-decoder", "--blurry", "0.2"],
        ["--classes-per-task", "1", "--epochs", "1", "--top-k", "2"],
    ],
)
def test_options_of_the_method_run(tmp_path, options):
    document = run_dkvb(tmp_path, *options)
    assert document["results"]["dkvb"]["acc"]["mean"] > 0.05
    page = (tmp_path / "report.html").read_text()
    for caption in ("How many of its keys", "Which keys of the first codebook", "Keys of the first codebook among"):
        assert caption in page


def test_what_the_dual_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dual: got True; a decoder is trained without it"):
        run_dkvb(tmp_path / "decoder", "--dual", "--decoder", "linear")
    with pytest.raises(ValueError, match="dual: got True; it trains on one device"):
        run_dkvb(tmp_path / "tensorboard", "--dual", "--tensorboard")
    with pytest.raises(ValueError, match="mesh: got None; keys are cared for on one device"):
        key_care.main(["--preset", "smoke", "--tensorboard", "--out", str(tmp_path / "care")])


def test_a_grid_runs_each_point_once_and_compares_them(tmp_path, capsys, monkeypatch):
    options = ["--sweep", "codebooks=4,8", "pairs=16,32"]
    document = run_dkvb(tmp_path, *options)
    folders = [f"codebooks={codebooks},pairs={pairs}" for codebooks in (4, 8) for pairs in (16, 32)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*folders, "compare.html"])
    for name in folders:
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert f"codebooks={config['codebooks']},pairs={config['pairs']}" == name
    assert document["config"]["pairs"] == 32
    printed = capsys.readouterr().out
    assert all(printed.count(name) > 1 for name in folders)  # as it begins, and in the table of all
    monkeypatch.setattr(dkvb.class_incremental, "prepare", None)
    run_dkvb(tmp_path, *options)  # finished before: nothing runs again


@pytest.mark.parametrize(
    "entry", ["codebooks", "codebooks=", "widths=3", "out=a", "codebooks=4 codebooks=5", "codebooks=4,4"]
)
def test_a_grid_of_another_form_is_refused(tmp_path, entry):
    with pytest.raises(ValueError, match=r"sweep: got .*write each setting and value once, as codebooks=16,64"):
        run_dkvb(tmp_path, "--sweep", *entry.split())


def test_a_grid_is_read_whole_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(dkvb.class_incremental, "run", lambda config, experiment: pytest.fail("a point ran"))
    with pytest.raises(SystemExit):
        run_dkvb(tmp_path, "--sweep", "pairs=4,x")


def test_a_bottleneck_that_cannot_be_is_told_before_others_train(tmp_path):
    """And leaves the folder to the command as it should be."""
    with pytest.raises(ValueError, match="codebooks: got -3; pass 1 or more"):
        run_dkvb(tmp_path / "run", "--codebooks", "-3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dual --decoder mlp", "dual: got True; a decoder is trained without it"),
        ("--value-width 4", "value_width: got 4; pass 10 or more"),
        ("--keys simvq --key-epochs 0", "key_epochs: got 0; pass 1 or more"),
        ("--key-epochs -1", "key_epochs: got -1; pass 0 or more"),
        ("--projection learned --projection-share 2", r"projection_share: got 2\.0; pass a number from"),
        ("--key-source mnist", "key_source: got mnist, 784 wide; choose one 64 wide, as digits"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_others_train(options, message, tmp_path):
    if "mnist" in options and "JAXCL_DATA" not in os.environ:
        pytest.skip("needs the packs of JAXCL_DATA")
    with pytest.raises(ValueError, match=message):
        run_dkvb(tmp_path / "run", "--methods", "naive", "dkvb", *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_a_grid_turns_flags_on_and_off(tmp_path, text, value):
    config = dataclasses.replace(dkvb.preset("smoke", "digits"), dual=not value, sweep=(f"dual={text}",), out=tmp_path)
    (point,) = run_grid(config, lambda point: point)
    assert point.dual is value


def test_a_deleted_class_is_gone_and_others_stay(tmp_path):
    document = forget_class.main(["--seeds", "1", "--out", str(tmp_path)])
    found = document["deletion"]
    assert found["accuracy_of_the_deleted"]["mean"] == 0
    assert found["largest_fall_of_another"]["mean"] < 0.05 > found["largest_rise_of_another"]["mean"]
    assert document["results"]["dkvb"]["acc"]["mean"] > 0.9


def test_key_care_places_keys_where_it_is_on(tmp_path):
    found = key_care.main(["--preset", "smoke", "--seeds", "1", "--out", str(tmp_path)])["key_care"]
    assert found["care"]["placed"]["mean"] > 0
    assert found["all_keys"]["placed"]["mean"] == found["spare_asleep"]["placed"]["mean"] == 0
    for method in key_care.METHODS:
        assert 0 < found[method]["old"]["mean"] <= 1 and 0 < found[method]["new"]["mean"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "How far heads of test examples are" in page and "How far the data shifted" in page
    with (tmp_path / "decisions.csv").open() as file:
        decisions = list(csv.DictReader(file))
    assert sum(int(row["placed"]) for row in decisions) == 8 * found["care"]["placed"]["mean"]  # codebooks
    assert all((int(row["placed"]) > 0) == ("of heads are far" in row["cause"]) for row in decisions)
