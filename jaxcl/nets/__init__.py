"""Flax Linen networks."""

from jaxcl.nets.mlp import MLP

__all__ = ["MLP"]
