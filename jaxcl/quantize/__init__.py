"""Vector quantizers as pure functions, and the statistics of how well a codebook is used.

A quantizer is a `Quantizer` made by a factory whose arguments are its hyper-parameters. What learns by gradients is in
`params` (give it to optax); what is averaged from data is in `state` (give it to `update`). Losses come back unreduced,
one a vector, and unweighted.
"""

from jaxcl.quantize.averages import (
    EMAState,
    draw_replacements,
    ema_vq,
    initial_averages,
    place_codes,
    replace_codes,
    update_averages,
)
from jaxcl.quantize.composed import grouped, projected, residual
from jaxcl.quantize.contract import NO_CODE, Quantized, Quantizer, rotate
from jaxcl.quantize.learned import simvq, vq
from jaxcl.quantize.scalar import fsq, lfq, lfq_entropies
from jaxcl.quantize.statistics import dead_codes, perplexity, usage, utilisation

__all__ = [
    "NO_CODE",
    "EMAState",
    "Quantized",
    "Quantizer",
    "dead_codes",
    "draw_replacements",
    "ema_vq",
    "fsq",
    "grouped",
    "initial_averages",
    "lfq",
    "lfq_entropies",
    "perplexity",
    "place_codes",
    "projected",
    "replace_codes",
    "residual",
    "rotate",
    "simvq",
    "update_averages",
    "usage",
    "utilisation",
    "vq",
]
