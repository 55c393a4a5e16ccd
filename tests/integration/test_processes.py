"""Runs over several devices and processes: the same numbers, and an end when one process dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxcl import report

ROOT = Path(__file__).parents[2]
OPTIONS = ["--preset", "smoke", "--data", "digits", "--stream", "class_incremental", "--seeds", "1"]
METHODS = ["ewc", "er"]


def start(out, *options, devices=1, **environment):
    """One process of a run with so many devices; what it says goes to a file beside its folder."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "experiments.baselines", *OPTIONS, "--out", str(out), *options]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with Path(f"{out}.{environment.get('JAX_PROCESS_ID', 0)}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment | cache | {"XLA_FLAGS": flags}, stdout=log, stderr=log
        )


def start_two(out, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"devices": 4, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    options = [*options, "--mesh", "data=4,model=2", "--distributed"]
    return [start(out, *options, **shared, JAX_PROCESS_ID=str(number)) for number in range(2)]


def finish(out, *processes):
    for process in processes:
        assert process.wait(timeout=240) == 0, Path(f"{out}.0.log").read_text()[-3000:]
    return report.read_accuracy_csv(out / "class_incremental" / "accuracy.csv")


def test_devices_and_processes_do_not_change_the_accuracy(tmp_path):
    """Devices of one process are those of test_sharding."""
    one = finish(tmp_path / "one", start(tmp_path / "one", "--methods", *METHODS))
    two = finish(tmp_path / "two", *start_two(tmp_path / "two", "--methods", *METHODS))
    for method in METHODS:
        np.testing.assert_allclose(two[method], one[method], atol=1e-4, err_msg=f"two processes, {method}")


def test_a_process_that_dies_stops_the_other_and_the_run_goes_on_later(tmp_path):
    out = tmp_path / "run"
    options = ["--methods", "naive", "--epochs", "4", "--checkpoint-seconds", "0"]
    for victim in (1, 0):
        saved = newest_checkpoint(out)
        processes = start_two(out, *options)
        deadline = time.monotonic() + 120
        while newest_checkpoint(out) == saved:
            assert time.monotonic() < deadline and processes[0].poll() is None, Path(f"{out}.0.log").read_text()[-3000:]
            time.sleep(0.1)
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[1 - victim].wait(timeout=60) != 0
        processes[victim].wait()
        assert not (out / "class_incremental" / "metrics.json").exists()
    resumed = finish(out, *start_two(out, *options))
    undisturbed = tmp_path / "undisturbed"
    expected = finish(undisturbed, *start_two(undisturbed, *options))
    np.testing.assert_array_equal(resumed["naive"], expected["naive"])


def newest_checkpoint(out):
    saved = (out / "class_incremental" / "checkpoints" / "naive" / "seed_0").glob("*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)
