"""Gives the tests eight host devices and keeps them on CPU: JAX must be told before it starts its backends."""

import os

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Where libtpu is installed, each process would else try it and write of what it misses.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
