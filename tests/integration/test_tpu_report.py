"""The report on TPUs: the loop's own programs compile for them, with none at hand, and numbers are those of a step."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import tpu_report
from jaxcl import report

ROOT = Path(__file__).parents[2]
BATCH, IMAGES, DEVICES = 4096, 1024, 8
# Multiplications and additions a training step: twice the weights forward, backward, and for the weights' gradients,
# but for the first layer's inputs, which need none.
MLP_FLOPS = 2 * BATCH * (3 * (784 * 256 + 256 * 256 + 256 * 10) - 784 * 256)
RESNET18_FLOPS = 3 * 2 * IMAGES * 0.556e9  # a forward pass on 32 x 32 x 3 is known to take 0.56 G multiplications

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='compiling for TPUs takes libtpu: pip install "jaxcl[tpu]"'
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.tpu_report", *arguments], capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip


@needs_libtpu
def test_the_loops_programs_compile_for_a_tpu_and_share_the_work(tmp_path):
    steps = [
        "mlp_naive_train", "mlp_ewc_train", "mlp_ewc_observe", "resnet18_naive_train", "alexnet_ibm_train",
        "lenet5_mean_kl_train", "lenet5_encode_20_bits",
    ]  # fmt: skip
    done = run("--topologies", "v5e:2x4", "--steps", *steps, "--effort", "-1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    entries = {entry["step"]: entry for entry in report.read_json(tmp_path / "tpu_report.json")["programs"]}
    assert [*entries] == steps
    for name, entry in entries.items():
        assert entry["topology"] == "v5e:2x4"
        assert entry["devices"] == DEVICES
        numbers = [value for value in entry.values() if isinstance(value, int | float)]
        assert np.isfinite(numbers).all()
        for part in ("argument_bytes", "output_bytes", "memory_bytes", "flops", "bytes_accessed", "seconds"):
            assert entry[part] > 0, (name, part)
        assert 0 < entry["roofline"] <= 1
        assert entry["limited_by"] == ("arithmetic" if entry["roofline"] == 1 else "memory")
        assert entry["memory_bytes"] < 16 * 2**30 / 2
        assert entry["collectives"].get("all-reduce", 0) > 0, name
        assert name in done.stdout
    for name in ("mlp_naive_train", "mlp_ewc_train"):
        assert entries[name]["flops"] == pytest.approx(MLP_FLOPS / DEVICES, rel=0.05)
    # The compiler leaves out products with the zeros around an image.
    assert entries["resnet18_naive_train"]["flops"] == pytest.approx(RESNET18_FLOPS / DEVICES, rel=0.2)
    # An anchor and an importance a parameter.
    assert entries["mlp_ewc_train"]["memory_bytes"] > entries["mlp_naive_train"]["memory_bytes"]
    assert entries["lenet5_encode_20_bits"]["temporary_bytes"] < 8 * 2**20  # of 2^20 candidates of each of 111 blocks
    loops = {name: entry["loops"] for name, entry in entries.items()}
    assert loops["mlp_naive_train"] == 0 < loops["mlp_ewc_observe"]
    observed = next(line for line in done.stdout.splitlines() if "mlp_ewc_observe" in line)
    assert observed.count("+") == 3


@needs_libtpu
def test_a_search_of_many_codes_never_holds_all_scores(tmp_path):
    """Data-parallel, and with codes split over devices; a device's scores alone would fill 8 and 512 GiB."""
    steps = ["nearest_262144", "nearest_262144_codes_split", "nearest_16777216_codes_split"]
    done = run("--topologies", "v5e:2x4", "--steps", *steps, "--effort", "-1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    entries = {entry["step"]: entry for entry in report.read_json(tmp_path / "tpu_report.json")["programs"]}
    for name in steps:
        assert entries[name]["temporary_bytes"] < 32 * 2**20, name
        assert bool(entries[name]["collectives"]) == name.endswith("codes_split"), name


@needs_libtpu
def test_a_program_that_fails_is_shown_and_told_by_the_exit_code():
    done = run("--topologies", "v5e:3x5", "--steps", "mlp_naive_train", "nearest")
    assert done.returncode == 1
    rows = [line for line in done.stdout.splitlines() if line.startswith("v5e:3x5")]
    assert len(rows) == 2
    assert all("not divisible" in row for row in rows)
    assert "Traceback" not in done.stderr


def test_numbers_stand_in_the_table():
    entry = {
        "topology": "v5e:2x4", "step": "nearest", "devices": 8, "argument_bytes": 3 * 2**20, "temporary_bytes": 2**19,
        "output_bytes": 0, "memory_bytes": 2**20, "flops": 2.5e9, "bytes_accessed": 2**30, "seconds": 0.0123,
        "roofline": 0.25, "limited_by": "memory", "collectives": {"all-reduce": 2, "all-gather": 1}, "loops": 0,
        "full_precision_products": 0,
    }  # fmt: skip
    numbers = ["3.0", "0.5", "0.0", "1.0", "2.500", "1,024.0", "12.300", "25", "3", "memory"]
    table = tpu_report.table_of([entry, entry | {"full_precision_products": 1}]).splitlines()
    assert table[2].split() == ["v5e:2x4", "nearest", *numbers]
    assert table[3].split()[6:9] == ["2.500+", "1,024.0+", "12.300+"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "mlp"], r"steps: got 'mlp'; choose one of 'mlp_naive_train', "),
        (["--topologies", "h100:8"], r"topologies: got h100:8; write it as v5e:2x4; chips are v2, v3"),
        (["--effort", "2"], r"effort: got 2.0; pass a number from -1 to 1"),
    ],
)
def test_what_it_does_not_know_is_refused_before_anything_is_compiled(arguments, message):
    with pytest.raises(ValueError, match=message):
        tpu_report.main(arguments)


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "jaxcl\[tpu\]"'):
        tpu_report.compile_only()


def test_jax_on_another_platform_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match="JAX runs on gpu already: run this in a process of its own"):
        tpu_report.compile_only()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_of_help:
        tpu_report.main(["--help"])
    assert exit_of_help.value.code == 0
    shown = capsys.readouterr().out
    for text in (*tpu_report.STEPS, "--topologies", "--effort", "--out", "roofline", "v5e:2x4"):
        assert text in shown


@needs_libtpu
def test_the_bottleneck_compiles_with_its_batch_or_its_codebooks_split(tmp_path):
    """Whole codebooks on each of eight devices: an eighth of the keys, which are read but once, and no exchange."""
    steps = ["dkvb_train", "dkvb_lookup", "dkvb_train_codebooks_split", "dkvb_lookup_codebooks_split"]
    done = run("--topologies", "v5e:2x4", "--steps", *steps, "--effort", "-1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    entries = {entry["step"]: entry for entry in report.read_json(tmp_path / "tpu_report.json")["programs"]}
    assert [*entries] == steps
    for name in ("dkvb_train", "dkvb_lookup"):
        assert entries[f"{name}_codebooks_split"]["memory_bytes"] < entries[name]["memory_bytes"]
    assert not entries["dkvb_lookup_codebooks_split"]["collectives"]
    assert entries["dkvb_lookup_codebooks_split"]["argument_bytes"] < entries["dkvb_lookup"]["argument_bytes"] / 6
