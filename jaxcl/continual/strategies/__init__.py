"""Continual-learning methods: the contract, and one factory a method."""

from jaxcl.continual.strategies.adapted import (
    Adapted,
    Features,
    Objective,
    adapted_features,
    adapted_network,
    classification,
)
from jaxcl.continual.strategies.closed_form import nearest_class_mean, ridge_classifier, streaming_lda
from jaxcl.continual.strategies.contract import (
    Apply,
    Batch,
    Metrics,
    Strategy,
    cross_entropy,
    does_nothing,
    gradients_of,
    in_microbatches,
    predict_by,
)
from jaxcl.continual.strategies.heads import Answered, ClassMeans, against_means, answered_by, class_means
from jaxcl.continual.strategies.key_value import (
    CaredKeys,
    Momentum,
    cared_key_value_bottleneck,
    key_decisions,
    key_value_bottleneck,
)
from jaxcl.continual.strategies.masked import MaskedTasks, masked_network
from jaxcl.continual.strategies.regularisation import ewc, lwf, online_ewc, si, squared_gradients
from jaxcl.continual.strategies.replay import a_gem, der_plus_plus, er
from jaxcl.continual.strategies.sequential import Networks, independent, linear_probe, naive

__all__ = [
    "Adapted",
    "Answered",
    "Apply",
    "Batch",
    "CaredKeys",
    "ClassMeans",
    "Features",
    "MaskedTasks",
    "Metrics",
    "Momentum",
    "Networks",
    "Objective",
    "Strategy",
    "a_gem",
    "adapted_features",
    "adapted_network",
    "against_means",
    "answered_by",
    "cared_key_value_bottleneck",
    "class_means",
    "classification",
    "cross_entropy",
    "der_plus_plus",
    "does_nothing",
    "er",
    "ewc",
    "gradients_of",
    "in_microbatches",
    "independent",
    "key_decisions",
    "key_value_bottleneck",
    "linear_probe",
    "lwf",
    "masked_network",
    "naive",
    "nearest_class_mean",
    "online_ewc",
    "predict_by",
    "ridge_classifier",
    "si",
    "squared_gradients",
    "streaming_lda",
]
