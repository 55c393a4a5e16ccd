"""Relative entropy coding: weights as indices of candidates that encoder and decoder share, and files of them.

`layout_of` says how a parameter tree lies in blocks. A posterior over these (`mean_kl_posterior`, `mean_var_posterior`)
is trained, and `encode_next` codes it with one of the coders `mrc`, `orc` and `astar`. A `Message` is what travels:
`save` and `load` put it into a file and back, and `decode` gives the weights, the same bits on every machine.
`python -m jaxcl.coding --help` looks into files and decodes them.
"""

from jaxcl.coding.candidates import chosen_candidates, exact_normal_of_word
from jaxcl.coding.coders import MOST_BITS, Coder, Encoded, astar, mrc, orc
from jaxcl.coding.layout import Layout, Leaf, Places, layout_of, places, tree_of_values
from jaxcl.coding.progressive import (
    Posterior,
    Progress,
    Told,
    Trainer,
    TrainState,
    Variables,
    encode_next,
    mean_kl_posterior,
    mean_var_posterior,
    message,
    nothing_coded,
    sample_values,
    trainer,
    with_storable_priors,
)
from jaxcl.coding.storage import Message, decode, header_bytes, load, save, storable, values

__all__ = [
    "MOST_BITS", "Coder", "Encoded", "Layout", "Leaf", "Message", "Places", "Posterior", "Progress", "Told",
    "TrainState", "Trainer", "Variables", "astar",
    "chosen_candidates", "decode", "encode_next", "exact_normal_of_word", "header_bytes", "layout_of", "load",
    "mean_kl_posterior", "mean_var_posterior", "message", "mrc", "nothing_coded", "orc", "places", "sample_values",
    "save", "storable", "trainer", "tree_of_values", "values", "with_storable_priors",
]  # fmt: skip
