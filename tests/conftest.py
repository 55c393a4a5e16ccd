"""Gives the tests eight host devices and keeps them on CPU: JAX must be told before it starts its backends."""

import os

import pytest

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Where libtpu is installed, each process would else try it and write of what it misses.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def one_core(monkeypatch):
    """Seeds trained together then share each step, under `vmap`: with a core for each they would not."""
    from jaxcl.continual import loop

    monkeypatch.setattr(loop, "_cores", lambda: 1)
