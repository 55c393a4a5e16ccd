"""What must be settled before JAX starts: the tests have eight host devices, stay on CPU and are compiled in haste."""

import gc
import importlib.metadata
import os

import pytest

_given = os.environ.get("XLA_FLAGS")
_flags = {"xla_force_host_platform_device_count": "8"}
if _given is None:  # most of a test's time is the compiler's, for a program that runs once
    _flags |= {
        "xla_backend_optimization_level": "0",
        "xla_llvm_disable_expensive_passes": "true",
        "xla_cpu_parallel_codegen_split_count": "1",
    }
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it, and would end the process
        _flags["xla_cpu_use_fusion_emitters"] = "false"
_added = [f"--{flag}={value}" for flag, value in _flags.items() if flag not in (_given or "")]
os.environ["XLA_FLAGS"] = " ".join([_given or "", *_added]).strip()
# Where libtpu is installed, each process would else try it and write of what it misses.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
gc.set_threshold(50_000, 20, 100)  # JAX keeps objects by the million: collecting them was a tenth of the time


@pytest.fixture
def one_core(monkeypatch):
    """Seeds trained together then share each step, under `vmap`: with a core for each they would not."""
    from jaxcl.continual import loop

    monkeypatch.setattr(loop, "_cores", lambda: 1)
