"""The discrete key-value bottleneck: its layer, the optimizer of its values, and care for its keys."""

from jaxcl.bottleneck.care import (
    KeyCare,
    KeyHealth,
    KeyPolicy,
    Reference,
    care_for_keys,
    check_keys,
    describe_care,
    forget_class,
    reference_distances,
)
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
    "KeyCare",
    "KeyHealth",
    "KeyPolicy",
    "KeyState",
    "Reference",
    "care_for_keys",
    "check_keys",
    "describe_care",
    "discrete_key_value_bottleneck",
    "fit_epoch",
    "forget_class",
    "pair_numbers",
    "reference_distances",
    "sparse_sgd",
    "vote",
]
