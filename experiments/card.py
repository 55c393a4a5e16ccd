"""What is known about a module of this package before it is run; `experiments.list` shows it."""

from typing import NamedTuple


class Card(NamedTuple):
    """What a command costs and gives; a module's CARDS holds one for each set of options, {options: Card}."""

    cost: str  # wall time of all of it on two cores
    expected: str  # the result
