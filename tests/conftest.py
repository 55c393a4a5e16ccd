"""What must be settled before JAX starts: the tests have eight host devices, stay on CPU and are compiled in haste."""

import importlib.util
import mmap
import os
from pathlib import Path

import pytest

# Most of a test's time is the compiler's, for a program that runs once. Whoever sets XLA_FLAGS gets just those.
_HASTE = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _known(flag):
    """Whether the installed XLA has a flag: one that it does not know would end the process."""
    package = importlib.util.find_spec("jaxlib").submodule_search_locations[0]
    path = Path(package) / "libjax_common.so"
    if not path.exists():
        return False
    with path.open("rb") as library:
        return mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ).find(flag.encode()) >= 0


if "XLA_FLAGS" not in os.environ:
    _flags = {"xla_force_host_platform_device_count": "8"} | {flag: _HASTE[flag] for flag in _HASTE if _known(flag)}
    os.environ["XLA_FLAGS"] = " ".join(f"--{flag}={value}" for flag, value in _flags.items())
# Where libtpu is installed, each process would else try it and write of what it misses.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def one_core(monkeypatch):
    """Seeds trained together then share each step, under `vmap`: with a core for each they would not."""
    from jaxcl.continual import loop

    monkeypatch.setattr(loop, "_cores", lambda: 1)
