"""Adapters: low-rank changes to a frozen network, one more with each task, kept off what earlier tasks need."""

from jaxcl.adapters.bank import AdapterState, budget
from jaxcl.adapters.contract import (
    Adapter,
    Budget,
    Change,
    Factors,
    LayerFunction,
    Site,
    added,
    layer_function,
    merge,
    second_moments,
    sites_of,
)
from jaxcl.adapters.lora import LowRank, incremental_lora, lora, o_lora
from jaxcl.adapters.orthogonal import Gated, OrthogonalState, oa_adapter, soft_gate, switches
from jaxcl.adapters.subspaces import Protected, cosines, kept_off, nothing_protected, overlap, protect

__all__ = [
    "Adapter",
    "AdapterState",
    "Budget",
    "Change",
    "Factors",
    "Gated",
    "LayerFunction",
    "LowRank",
    "OrthogonalState",
    "Protected",
    "Site",
    "added",
    "budget",
    "cosines",
    "incremental_lora",
    "kept_off",
    "layer_function",
    "lora",
    "merge",
    "nothing_protected",
    "o_lora",
    "oa_adapter",
    "overlap",
    "protect",
    "second_moments",
    "sites_of",
    "soft_gate",
    "switches",
]
