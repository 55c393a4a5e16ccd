"""Flax Linen networks."""

from jaxcl.nets.mlp import MLP
from jaxcl.nets.resnet import ResNet18

__all__ = ["MLP", "ResNet18"]
