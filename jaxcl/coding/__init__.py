"""Relative entropy coding: weights as indices of candidates that encoder and decoder share, and files of them.

`layout_of` says how a parameter tree lies in blocks; a coder (`mrc`, `orc`, `astar`) finds an index for each block of a
posterior; `Message` is what travels, `save` and `load` put it into a file and back, and `decode` gives the weights, the
same bits on every machine. `python -m jaxcl.coding --help` looks into files and decodes them.
"""

from jaxcl.coding.candidates import chosen_candidates, exact_normal_of_word
from jaxcl.coding.coders import Coder, Encoded, astar, mrc, orc
from jaxcl.coding.layout import Layout, Leaf, Places, layout_of, places, tree_of_values
from jaxcl.coding.storage import Message, decode, load, save, storable, values

__all__ = [
    "Coder", "Encoded", "Layout", "Leaf", "Message", "Places", "astar", "chosen_candidates", "decode",
    "exact_normal_of_word", "layout_of", "load", "mrc", "orc", "places", "save", "storable", "tree_of_values", "values",
]  # fmt: skip
