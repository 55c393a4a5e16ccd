"""Continual learning: streams of tasks, strategies, the loop that runs one on the other, and metrics.

A frozen feature stage is a transformation of the stream before the loop: `streams.map_inputs`.
"""

from jaxcl.continual import metrics, sharding, streams
from jaxcl.continual.checkpoints import Checkpoint
from jaxcl.continual.course import Progress, Result
from jaxcl.continual.loop import run, run_seeds
from jaxcl.continual.strategies import (
    Adapted,
    Batch,
    Objective,
    Strategy,
    a_gem,
    adapted_features,
    adapted_network,
    cared_key_value_bottleneck,
    class_means,
    classification,
    cross_entropy,
    der_plus_plus,
    er,
    ewc,
    gradients_of,
    independent,
    key_decisions,
    key_value_bottleneck,
    linear_probe,
    lwf,
    masked_network,
    naive,
    nearest_class_mean,
    online_ewc,
    ridge_classifier,
    si,
    streaming_lda,
)
from jaxcl.continual.streams import Examples, Stream

__all__ = [
    "Adapted",
    "Batch",
    "Checkpoint",
    "Examples",
    "Objective",
    "Progress",
    "Result",
    "Strategy",
    "Stream",
    "a_gem",
    "adapted_features",
    "adapted_network",
    "cared_key_value_bottleneck",
    "class_means",
    "classification",
    "cross_entropy",
    "der_plus_plus",
    "er",
    "ewc",
    "gradients_of",
    "independent",
    "key_decisions",
    "key_value_bottleneck",
    "linear_probe",
    "lwf",
    "masked_network",
    "metrics",
    "naive",
    "nearest_class_mean",
    "online_ewc",
    "ridge_classifier",
    "run",
    "run_seeds",
    "sharding",
    "si",
    "streaming_lda",
    "streams",
]
