"""The discrete key-value bottleneck: its layer, and the optimizer of its values."""

from jaxcl.bottleneck.layer import (
    Bottleneck,
    KeyState,
    discrete_key_value_bottleneck,
    fit_epoch,
    pair_numbers,
    vote,
)
from jaxcl.bottleneck.optimizer import sparse_sgd

__all__ = [
    "Bottleneck",
    "KeyState",
    "discrete_key_value_bottleneck",
    "fit_epoch",
    "pair_numbers",
    "sparse_sgd",
    "vote",
]
