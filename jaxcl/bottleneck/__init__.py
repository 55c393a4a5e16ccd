"""The discrete key-value bottleneck: its layer, the optimizer of its values, and care for its keys."""

from jaxcl.bottleneck.affine import fit_simvq_keys
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
from jaxcl.bottleneck.dual import TaskVotes, begin_votes, coincidences, end_votes, train_votes
from jaxcl.bottleneck.layer import (
    Bottleneck,
    KeyState,
    discrete_key_value_bottleneck,
    fit_epoch,
    pair_numbers,
    sample_pairs,
    vote,
)
from jaxcl.bottleneck.optimizer import sparse_sgd
from jaxcl.bottleneck.projection import learn_projection

__all__ = [
    "Bottleneck",
    "KeyCare",
    "KeyHealth",
    "KeyPolicy",
    "KeyState",
    "Reference",
    "TaskVotes",
    "begin_votes",
    "care_for_keys",
    "check_keys",
    "coincidences",
    "describe_care",
    "discrete_key_value_bottleneck",
    "end_votes",
    "fit_epoch",
    "fit_simvq_keys",
    "forget_class",
    "learn_projection",
    "pair_numbers",
    "reference_distances",
    "sample_pairs",
    "sparse_sgd",
    "train_votes",
    "vote",
]
