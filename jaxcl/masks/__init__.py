"""Sub-networks of one network, one a task: the weights that a task keeps never move again."""

from jaxcl.masks.contract import FREE, Bank, Masked, MaskMethod, is_free, separate_rates, task_mask
from jaxcl.masks.information_bottleneck import (
    Committed,
    InformationBottleneckState,
    decomposition_ratio,
    ib_masks,
    refresh_ratios,
)
from jaxcl.masks.noise import Noise, draw_noise, information, log_alpha, noisy
from jaxcl.masks.packnet import PackNetState, packnet
from jaxcl.masks.ranks import kth_smallest
from jaxcl.masks.scales import FewScales, ScaleRule, folded_scales, stored_scales
from jaxcl.masks.storage import StoredBank, TaskCost, huffman_bits, load_bank, save_bank
from jaxcl.masks.usage import mask_overlap, weight_usage
from jaxcl.masks.winning_subnetwork import (
    WinningSubnetworkState,
    masked_by_scores,
    winning_mask,
    winning_subnetwork,
)

__all__ = [
    "FREE",
    "Bank",
    "Committed",
    "FewScales",
    "InformationBottleneckState",
    "MaskMethod",
    "Masked",
    "Noise",
    "PackNetState",
    "ScaleRule",
    "StoredBank",
    "TaskCost",
    "WinningSubnetworkState",
    "decomposition_ratio",
    "draw_noise",
    "folded_scales",
    "huffman_bits",
    "ib_masks",
    "information",
    "is_free",
    "kth_smallest",
    "load_bank",
    "log_alpha",
    "mask_overlap",
    "masked_by_scores",
    "noisy",
    "packnet",
    "refresh_ratios",
    "save_bank",
    "separate_rates",
    "stored_scales",
    "task_mask",
    "weight_usage",
    "winning_mask",
    "winning_subnetwork",
]
