"""The compression experiment, as a user runs it, interrupts it and goes on."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from experiments import images, miracle
from jaxcl import coding, data, nets, trees
from jaxcl.continual import Examples

SMOKE = ["--preset", "smoke", "--epochs", "2", "--coding-epochs", "1"]


def written(out):
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_images_of_three_channels_are_cropped_and_coded(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = [Examples(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 10) for n in (32, 20)]
    monkeypatch.setattr(images.data, "load", lambda name: data.Split(*parts))
    document = miracle.main([
        "--data", "cifar10", "--network", "mlp", "--hidden", "4", "--rows", "mean_kl:300", "--bits", "6", "--epochs",
        "1", "--coding-epochs", "1", "--rounds", "2", "--batch-size", "16", "--values", "params/Dense_0/kernel=90",
        "--out", str(tmp_path),
    ])  # fmt: skip
    assert document["results"]["mean_kl:300"]["bytes"]["mean"] <= 300
    leaves = trees.leaves_by_path(coding.decode(coding.load(tmp_path / "files" / "mean_kl-300-0.jcl")))
    assert leaves["params/Dense_0/kernel"].shape == (3072, 4)


@pytest.mark.parametrize(("name", "weights"), [("cpu", 923_130), ("paper", 14_724_042)])
def test_vgg16_is_laid_out_within_its_bytes(name, weights):
    config = miracle.preset(name, "cifar10")
    shapes = jax.eval_shape(
        nets.VGG16(10, config.vgg_width).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    )
    for row in config.rows:
        layout = miracle._layout(config, shapes, row, 0)
        assert layout.weights == weights and sum(leaf.values for leaf in layout.leaves) < weights / 2
        assert layout.blocks * miracle._index_bits(config) < 8 * int(row.partition(":")[2])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("miracle")
    miracle.main([*SMOKE, "--out", str(out)])
    return out


def test_what_is_left_has_the_promised_form(smoke):
    document = written(smoke)
    assert [*document["results"]] == ["mean_kl:150", "mean_var:150"]
    for row, of_row in document["results"].items():
        path = smoke / "files" / f"{row.replace(':', '-')}-0.jcl"
        assert of_row["bytes"]["mean"] == path.stat().st_size
        assert 100 < of_row["bytes"]["mean"] <= 150
        assert 0 <= of_row["error"]["mean"] <= 1 <= of_row["effective_sample_size"]["mean"]
        assert 1 <= of_row["epochs_to_loss"]["mean"] <= 3
        leaves = trees.leaves_by_path(coding.decode(coding.load(path)))
        assert leaves["params/Dense_0/kernel"].shape == (64, 16)
        assert len(np.unique(leaves["params/Dense_0/kernel"])) == 300
    assert document["results"]["mean_kl:150"]["kl_bits"]["mean"] == pytest.approx(6, rel=1e-4)
    assert set(document["costs"]["mean_kl:150"]) == {"seconds"}
    page = (smoke / "report.html").read_text()
    assert page.count("<svg") == 6 and "mean_var:150" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    lines = (smoke / "history.csv").read_text().splitlines()
    assert lines[0] == "row,step,metric,value" and sum(line.startswith("mean_kl:150,") for line in lines) == 6


@pytest.mark.parametrize("step", [3, 9])
def test_an_interrupted_run_goes_on_bit_for_bit(smoke, tmp_path, monkeypatch, step):
    """Broken off before anything is coded, and between two parts; with a checkpoint after each step."""
    arguments = [*SMOKE, "--checkpoint-seconds", "0", "--out", str(tmp_path)]
    record, seen = miracle._Compression._record, []

    def breaking(self, now, *others):
        if (self._row, now) == ("mean_kl:150", step):
            raise KeyboardInterrupt
        record(self, now, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(miracle._Compression, "_record", breaking)
        miracle.main(arguments)
    monkeypatch.setattr(
        miracle._Compression, "_record", lambda self, now, *others: seen.append(now) or record(self, now, *others)
    )
    miracle.main(arguments)
    assert seen[0] == step
    assert written(tmp_path)["results"] == written(smoke)["results"]
    for name in ("history.csv", "files/mean_kl-150-0.jcl", "files/mean_var-150-0.jcl"):
        assert (tmp_path / name).read_bytes() == (smoke / name).read_bytes()


def test_a_finished_row_is_not_trained_again_and_a_finished_run_is_told(smoke, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(smoke, tmp_path / "run")
    (run / "metrics.json").unlink()
    monkeypatch.setattr(miracle._Compression, "_train", None)
    miracle.main([*SMOKE, "--out", str(run)])
    assert written(run)["results"] == written(smoke)["results"]
    monkeypatch.setattr(miracle, "_Compression", None)
    assert miracle.main([*SMOKE, "--out", str(run)]) == written(run) and "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "mean_kn:150"], "rows: got 'mean_kn'; choose one of 'mean_kl', 'mean_var'"),
        (["--rows", "mean_kl"], "rows: got mean_kl; write it as mean_kl:1500"),
        (["--rows", "mean_kl:150", "mean_kl:40"], "rows: got mean_kl:40; this network's file has [0-9]+ bytes beside"),
        (["--bits", "30"], r"bits: got 30\.0; pass a number from 0\.1 to 29"),
        (["--epochs", "0"], "epochs: got 0; pass 1 or more"),
        (["--values", "params/Dense_0/kernel"], "values: got .*; write it as params/Dense_0/kernel=8000"),
        (["--values", "params/kernel=7"], r"values: got paths \['params/kernel'\]; choose from"),
        (["--batch-size", "400"], "batch_size: got 400; pass a number from 1 to 300"),
        (["--batch-size", "0"], "batch_size: got 0; pass 1 or more"),
        (["--spare-bits", "-6"], "spare_bits: got -6; pass 0 or more"),
        (["--penalty", "0"], r"penalty: got 0\.0; pass 1e-30 or more"),
        (["--hidden", "0"], "hidden: got 0; pass 1 or more"),
        (["--rows"], "rows: got none; write one or more, as mean_kl:1500"),
        (["--network", "lenet5"], "network: got lenet5 with digits; pass --data mnist, or --network mlp"),
    ],
)
def test_bad_settings_are_told(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        miracle.main([*SMOKE, *arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # so that the command can be put right


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(miracle._Compression, "_loss", lambda self, params, batch: float("nan") * batch[0].sum())
    with pytest.raises(FloatingPointError, match="loss: got nan in step 1; lower --learning-rate"):
        miracle.main([*SMOKE, "--out", str(tmp_path)])
    assert not list((tmp_path / "checkpoints").glob("*/[0-9]*"))


def test_pruning_sets_the_smallest_weights_to_zero():
    params = {"a": np.float32([3, -1, 0.5]), "b": np.float32([[-4, 2]])}
    pruned = miracle._pruned(params, 0.5)
    np.testing.assert_array_equal(pruned["a"], [3, 0, 0])
    np.testing.assert_array_equal(pruned["b"], [[-4, 2]])
    assert all(np.array_equal(params[name], leaf) for name, leaf in miracle._pruned(params, 0).items())
