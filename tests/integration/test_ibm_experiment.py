"""The experiment with mask methods, as a user runs it."""

import numpy as np
import pytest

from experiments import ibm
from jaxcl import masks, report

pytest.importorskip("constriction")

SMOKE = ["--preset", "smoke", "--seeds", "1"]


def test_mask_methods_forget_nothing_and_leave_their_files(tmp_path):
    document = ibm.main([*SMOKE, "--methods", "packnet", "wsn", "ibm", "--out", str(tmp_path)])
    for name, accuracy in report.read_accuracy_csv(tmp_path / "accuracy.csv").items():
        for task in range(3):
            np.testing.assert_array_equal(accuracy[0, task:, task], accuracy[0, task, task])
        assert document["results"][name]["bwt"]["mean"] == 0
        found = {part: values["mean"] for part, values in document["masks"][name].items()}
        assert 0 < found["kept_by_a_task"] <= found["kept_by_any"] <= 1 and found["bits"] > 0
        stored = masks.load_bank(tmp_path / "masks" / f"{name}_0.masks")
        assert stored.tasks == 3 and bool(stored.bank.scales) == (name == "ibm")
        usage = masks.weight_usage(stored.bank, 3)["params/Dense_0/kernel"]
        assert set(masks.weight_usage(stored.bank, 3)) == {"params/Dense_0/kernel"}  # not the head
        assert usage[:, :2].sum(axis=1).mean() == pytest.approx(found["kept_by_a_task"])
    page = (tmp_path / "report.html").read_text()
    for caption in (
        "What tasks keep of each layer, ibm", "How far masks of tasks overlap, wsn", "that are still free",
        "What a task adds", "layer ratios", "Information that IBM",
    ):  # fmt: skip
        assert caption in page


def test_permuted_pixels_are_no_images(tmp_path):
    with pytest.raises(ValueError, match="network: got mixer; permuted pixels are no images"):
        ibm.main([*SMOKE, "--network", "mixer", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="tasks: got 3; pass a divisor of 10"):
        ibm.main([*SMOKE, "--stream", "split", "--out", str(tmp_path / "split")])


@pytest.mark.parametrize(
    "options",
    [
        ["--stream", "split", "--tasks", "5", "--methods", "ibm", "independent", "--ibm-scales", "authors"],
        [
            "--stream",
            "rotated",
            "--methods",
            "ibm",
            "joint",
            "--no-ibm-ratios",
            "--no-ibm-reuse",
            "--ibm-redraw",
            "all",
        ],
    ],
)
def test_streams_and_ablations_run(options, tmp_path):
    document = ibm.main([*SMOKE, "--epochs", "1", *options, "--out", str(tmp_path)])
    assert 0 <= document["results"]["ibm"]["acc"]["mean"] <= 1
    if "split" in options:
        assert document["masks"]["ibm"]["reused_by_a_task"]["mean"] > 0
    else:
        assert document["masks"]["ibm"]["reused_by_a_task"]["mean"] == 0


def test_ewc_is_refused_beside_batch_normalisation(tmp_path):
    with pytest.raises(ValueError, match="methods: got ewc; EWC takes one example at a time"):
        ibm.main([*SMOKE, "--stream", "rotated", "--network", "alexnet", "--methods", "ewc", "--out", str(tmp_path)])
    assert "ewc" not in ibm.preset("paper", "cifar100").methods


def test_the_published_settings_run_on_cifar100(tmp_path, monkeypatch):
    """On a few images, drawn at random, and for one epoch."""
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    (tmp_path / "cifar-100-binary").mkdir()
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        rows = rng.integers(0, 256, (200, 3074), np.uint8)
        rows[:, 0], rows[:, 1] = 0, np.arange(200) % 100
        (tmp_path / "cifar-100-binary" / f"{part}.bin").write_bytes(rows.tobytes())
    config = ibm.preset("paper", "cifar100")
    assert (config.network, config.epochs, config.ibm_travel) == ("resnet18", 300, pytest.approx(1e-3 * 6000))
    document = ibm.main([
        "--preset", "paper", "--data", "cifar100", "--network", "mlp", "--hidden", "8", "--epochs", "1", "--seeds", "1",
        "--methods", "ibm", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert document["config"]["tasks"] == 10 and document["results"]["ibm"]["bwt"]["mean"] == 0
    with pytest.raises(ValueError, match="data: got mnist; published are cifar100"):
        ibm.preset("paper", "mnist")
