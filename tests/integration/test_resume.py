"""An experiment killed at random moments and started again: what it leaves, to the bit.

JAXCL_KILLS is how often it is killed: 3 times over some strategies if not set; 30, say, goes over every strategy on
every stream.
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

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("JAXCL_KILLS", "3"))
OPTIONS = ["--preset", "smoke", "--data", "digits", "--seeds", "1", "--checkpoint-seconds", "0"]
EVERY = "naive", "ewc", "online_ewc", "si", "lwf", "er", "der_plus_plus", "a_gem", "dkvb", "joint"
METHODS = EVERY if KILLS > 3 else ("ewc", "der_plus_plus", "dkvb")
STREAMS = ("class_incremental", "task_incremental", "permuted") if KILLS > 3 else ("class_incremental",)


def start(out, stream):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "experiments.baselines", *OPTIONS, "--stream", stream, "--out", str(out)]
    command += ["--methods", *METHODS]
    with Path(f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log)


def left_by(out):
    """Results, both CSV files, and the final state of each method, as bytes."""
    files = {name: (out / name).read_bytes() for name in ("accuracy.csv", "history.csv")}
    states = {}
    for folder in sorted((out / "checkpoints").glob("*/seed_*")):
        newest = max(int(path.name) for path in folder.glob("*") if path.name.isdigit())
        state = ocp.StandardCheckpointer().restore(folder.absolute() / str(newest) / "state")
        states[str(folder.relative_to(out))] = {name: np.asarray(leaf).tobytes() for name, leaf in state.items()}
    assert len(states) == len(METHODS) and all(states.values())
    return json.loads((out / "metrics.json").read_text())["results"], files, states


def saves_in(out):
    """How many checkpoints are there; folders that are renamed meanwhile are passed over."""
    return sum("commit_success.txt" in files for _, _, files in os.walk(out))


def run_with_kills(out, stream, moments, most):
    """A run to its end, killed at random moments and started again at most so many times; how many it came to."""
    out.mkdir()
    for kills in range(most):
        process = start(out, stream)
        saved = saves_in(out)
        while saves_in(out) == saved and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        if process.poll() is not None:  # it came to its end
            assert process.returncode == 0, Path(f"{out}.log").read_text()[-3000:]
            return kills
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(out, stream).wait() == 0, Path(f"{out}.log").read_text()[-3000:]
    return most


def test_killed_and_started_again_an_experiment_leaves_the_same(tmp_path):
    moments = random.Random(0)
    for stream in STREAMS:
        undisturbed, kills, wanted = tmp_path / stream / "undisturbed", 0, -(-KILLS // len(STREAMS))
        runs = itertools.count()
        undisturbed.mkdir(parents=True)
        assert start(undisturbed, stream).wait() == 0, Path(f"{undisturbed}.log").read_text()[-3000:]
        while kills < wanted:
            out = tmp_path / stream / f"killed_{next(runs)}"
            kills += run_with_kills(out, stream, moments, wanted - kills)
            for found, expected in zip(left_by(out / stream), left_by(undisturbed / stream), strict=True):
                assert jax.tree.all(jax.tree.map(lambda ours, theirs: ours == theirs, found, expected))
        print(f"{stream}: killed {kills} times")
