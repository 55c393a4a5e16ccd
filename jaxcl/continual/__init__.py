"""Continual learning: streams of tasks, strategies, the loop that runs one on the other, and metrics.

A frozen feature stage is a transformation of the stream before the loop: `streams.map_inputs`.
"""

from jaxcl.continual import metrics, streams
from jaxcl.continual.loop import Progress, Result, run, run_seeds
from jaxcl.continual.strategies import (
    Batch,
    Strategy,
    cross_entropy,
    gradients_of,
    key_value_bottleneck,
    linear_probe,
    naive,
)
from jaxcl.continual.streams import Examples, Stream

__all__ = [
    "Batch",
    "Examples",
    "Progress",
    "Result",
    "Strategy",
    "Stream",
    "cross_entropy",
    "gradients_of",
    "key_value_bottleneck",
    "linear_probe",
    "metrics",
    "naive",
    "run",
    "run_seeds",
    "streams",
]
