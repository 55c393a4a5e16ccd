"""Experiments of all five systems, killed at random moments and started again: what they leave, to the bit.

JAXCL_KILLS is how often baselines are killed, and the others a third as often: 3 times if not set; 30, say, goes over
every strategy on every stream.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("JAXCL_KILLS", "3"))
EVERY = "naive", "ewc", "online_ewc", "si", "lwf", "er", "der_plus_plus", "a_gem", "dkvb", "joint"
METHODS = EVERY if KILLS > 3 else ("ewc", "der_plus_plus", "dkvb")
STREAMS = ("class_incremental", "task_incremental", "permuted") if KILLS > 3 else ("class_incremental",)
RUNS = {  # experiments, and options with which they take seconds
    "ibm": "ibm --methods ibm",
    "mean_kl": "miracle --rows mean_kl:150",
    "oa_adapter": "oa_adapter --methods oa_inputs",
    "simvq": "simvq_image --rows simvq:16 --steps 6 --limit 60 --batch-size 4",
} | {stream: f"baselines --stream {stream} --methods {' '.join(METHODS)}" for stream in STREAMS}


def start(out, options):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    experiment, *own = options.split()
    command = [sys.executable, "-m", f"experiments.{experiment}", "--preset", "smoke", "--seeds", "1", *own]
    command += ["--checkpoint-seconds", "0", "--out", str(out)]
    with Path(f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log)


def left_by(out):
    """Results, tables and files of networks, and the last state of each method, as bytes."""
    files = {
        str(path.relative_to(out)): path.read_bytes() for kind in ("csv", "jcl") for path in out.rglob(f"*.{kind}")
    }
    steps: dict[Path, int] = {}
    for path in out.rglob("checkpoints/**/state"):
        steps[path.parents[1]] = max(int(path.parent.name), steps.get(path.parents[1], 0))
    states = {}
    for folder, newest in steps.items():
        state = ocp.StandardCheckpointer().restore((folder / str(newest) / "state").absolute())
        states[str(folder.relative_to(out))] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    assert files and states and all(states.values())
    (document,) = out.rglob("metrics.json")
    return json.loads(document.read_text())["results"], files, states


def saves_in(out):
    """How many checkpoints are there; folders that are renamed meanwhile are passed over."""
    return sum("commit_success.txt" in files for _, _, files in os.walk(out))


def run_with_kills(out, options, moments, most):
    """A run to its end, killed at random moments and started again at most so many times; how many it came to."""
    out.mkdir()
    for kills in range(most):
        process = start(out, options)
        saved = saves_in(out)
        while saves_in(out) == saved and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        if process.poll() is not None:  # it came to its end
            assert process.returncode == 0, Path(f"{out}.log").read_text()[-3000:]
            return kills
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(out, options).wait() == 0, Path(f"{out}.log").read_text()[-3000:]
    return most


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_started_again_an_experiment_leaves_the_same(name, tmp_path):
    moments, undisturbed, kills, runs = random.Random(0), tmp_path / "undisturbed", 0, itertools.count()
    wanted = KILLS if name in STREAMS else -(-KILLS // 3)
    assert start(undisturbed, RUNS[name]).wait() == 0, Path(f"{undisturbed}.log").read_text()[-3000:]
    expected = left_by(undisturbed)
    while kills < wanted:
        out = tmp_path / f"killed_{next(runs)}"
        kills += run_with_kills(out, RUNS[name], moments, wanted - kills)
        assert left_by(out) == expected
