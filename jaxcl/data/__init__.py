"""Data sources: the digits that scikit-learn ships, npz packs, and whatever arrays you have.

A source is a `Split` of `continual.Examples`; arrays from memory need nothing but
``Split(Examples(train_inputs, train_labels), Examples(test_inputs, test_labels))``.
"""

from jaxcl.data.packs import cifar10, cl_text, fsdd, mnist
from jaxcl.data.sources import Split, digits, flat_features, hold_out, load

__all__ = ["Split", "cifar10", "cl_text", "digits", "flat_features", "fsdd", "hold_out", "load", "mnist"]
