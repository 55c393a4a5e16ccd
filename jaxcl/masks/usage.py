"""What tasks have kept of a network: weights new, re-used and still free, and how far masks overlap."""

import numpy as np

from jaxcl.masks.contract import Bank, unpacked_masks


def weight_usage(bank: Bank, tasks: int) -> dict[str, np.ndarray]:
    """By path of a masked leaf, [T, 3]: shares of its weights that a task was first to keep, re-used, and left free.

    Args:
        bank: on the host or a device.
        tasks: T, how many are committed.
    """
    found = {}
    for path, masks in unpacked_masks(bank, tasks).items():
        before = np.logical_or.accumulate(np.vstack([np.zeros_like(masks[:1]), masks]), axis=0)
        shares = (masks & ~before[:-1], masks & before[:-1], ~before[1:])
        found[path] = np.stack([share.mean(axis=1) for share in shares], axis=1)
    return found


def mask_overlap(bank: Bank, tasks: int) -> np.ndarray:
    """[T, T]: of the weights that either of two tasks keeps, the share that both keep; 1 where that is of none."""
    flat = np.concatenate(list(unpacked_masks(bank, tasks).values()), axis=1).astype(np.float32)
    both = flat @ flat.T
    either = flat.sum(axis=1)[:, None] + flat.sum(axis=1) - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)
