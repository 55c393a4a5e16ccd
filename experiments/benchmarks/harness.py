"""How all benchmarks measure: ours and the peer alternately in one process, and memory in a process each."""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Step = Callable[[], object]  # does the work once and returns when it is done


@dataclasses.dataclass(frozen=True)
class Case:
    """Two ways to do the same work; each factory makes inputs and parameters and returns the step."""

    ours: Callable[[], Step]
    peer: Callable[[], Step]
    repeats: int = 20
    """Rounds; a round times each step once, the peer's last."""
    ours_per_round: int = 1
    """How often ours runs in a round: more than once where it is far shorter than the peer's."""


def main(benchmark: str, cases: Mapping[str, Case], argv: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Measures every case, prints a table and, last, a line of JSON; returns what that line holds.

    Seconds are medians and ratio is peer / ours. Peaks are resident memory beyond what the process held when inputs
    and parameters stood ready, the first call (for us: compilation) included, each in a process of its own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {_module(benchmark)}", description=main.__doc__)
    parser.add_argument("--repeats", type=int, help="rounds to time (default: each case's own)")
    parser.add_argument("--case", choices=tuple(cases), help="measure only this case")
    parser.add_argument("--peak-of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak_of:
        print(_peak_mib(getattr(cases[options.case], options.peak_of)))
        return []
    rows = []
    print(f"{'case':<44}{'ours':>12}{'peer':>12}{'ratio':>8}{'ours peak':>12}{'peer peak':>12}")
    for name, case in cases.items():
        if options.case not in (None, name):
            continue
        ours, peer = _alternate(case, options.repeats or case.repeats)
        peaks = {side: _peak_elsewhere(benchmark, name, side) for side in ("ours", "peer")}
        rows.append(
            {
                "benchmark": benchmark,
                "case": name,
                "ours_seconds": ours,
                "peer_seconds": peer,
                "ratio": peer / ours,
                "ours_peak_mib": peaks["ours"],
                "peer_peak_mib": peaks["peer"],
            }
        )
        print(
            f"{name:<44}{ours * 1e3:>9.2f} ms{peer * 1e3:>9.2f} ms{peer / ours:>8.1f}"
            f"{peaks['ours']:>8.1f} MiB{peaks['peer']:>8.1f} MiB",
            flush=True,
        )
    print(json.dumps(rows))
    return rows


def _alternate(case: Case, repeats: int) -> tuple[float, float]:
    try:
        ours, peer = case.ours(), case.peer()
    except ImportError as error:
        sys.exit(f'error: {error}; benchmarks need pip install -e ".[peers,text]"')
    ours(), peer()  # compilation, caches
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for step, times, of_each in zip((ours, peer), (case.ours_per_round, 1), seconds, strict=True):
            for _ in range(times):
                began = time.perf_counter()
                step()
                of_each.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _module(benchmark: str) -> str:
    return f"{__package__}.{benchmark}"


def _peak_elsewhere(benchmark: str, case: str, side: str) -> float:
    command = [sys.executable, "-m", _module(benchmark), "--case", case, "--peak-of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _peak_mib(factory: Callable[[], Step]) -> float:
    """Highest resident memory while the step runs three times, less what was resident before (Linux)."""
    step = factory()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = status_kib("VmRSS")
    for _ in range(3):
        step()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(field: str) -> int:
    """A field of /proc/self/status that is given in KiB, such as VmRSS (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])
