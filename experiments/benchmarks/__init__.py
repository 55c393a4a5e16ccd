"""Benchmarks: jaxcl beside its peer, in one run. ``pip install "jaxcl[peers]"`` brings the peers."""
