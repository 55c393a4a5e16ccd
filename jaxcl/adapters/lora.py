"""LoRA, one for all tasks or one more with each, and O-LoRA, whose new ones are kept off the old ones' subspaces."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.adapters.bank import AdapterState, begin_state, commit_factors
from jaxcl.adapters.contract import Adapter, Change, Factors, Placement, Site, no_metrics, product, same_state, sites_of
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_choice, check_count


class LowRank(NamedTuple):
    """What is trained at a site."""

    down: Array  # [D, R]
    up: Array  # [R, E]


def lora(
    covers: Callable[[str], bool],
    rank: int,
    *,
    alpha: float | None = None,
    placement: Placement = "parallel",
) -> Adapter:
    """LoRA (Hu et al. 2021, arXiv 2106.09685), one adapter that all tasks train in turn: x -> (alpha / R) x down up.

    `down` begins uniform in +-1 / sqrt(D), as the authors' code has it, and `up` as 0, so that the network answers as
    before. There is no dropout.

    Args:
        covers: see `sites_of`.
        rank: R.
        alpha: None is `rank`, so that the factor is 1.
        placement: "parallel" takes what goes into the layer, as LoRA does; "sequential" what comes out of it: an
            adapter after the layer (Houlsby et al. 2019) without a non-linearity.

    Raises:
        ValueError: a rank below 1, or another placement.
    """
    check_count("rank", rank, 1)
    check_choice("placement", placement, ("parallel", "sequential"))
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        return _fresh(key, sites_of(params, covers, placement), rank), ()

    def changes(adapter: dict[str, LowRank], state: PyTree) -> dict[str, Change]:
        return {path: Change(None, own.down, scale * own.up) for path, own in adapter.items()}

    def commit(key: Key, adapter: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        return adapter, state

    return Adapter(init, changes, no_metrics, same_state, None, commit, placement, None)


def incremental_lora(
    covers: Callable[[str], bool],
    rank: int,
    tasks: int,
    *,
    alpha: float | None = None,
    placement: Placement = "parallel",
) -> Adapter:
    """LoRA with a new adapter for each of T tasks; those of earlier tasks stay as they are, and all are summed.

    Arguments and errors as in `lora`.
    """
    return _one_a_task(covers, rank, tasks, alpha, placement, no_metrics)


def o_lora(
    covers: Callable[[str], bool],
    rank: int,
    tasks: int,
    *,
    alpha: float | None = None,
    strength: float = 0.5,
    norm: Literal["absolute", "squared"] = "absolute",
    decay: float = 0.0,
) -> Adapter:
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): incremental LoRA whose new `down` is pushed off the old ones.

    The penalty of a site is the sum, over all pairs of an old column of `down` and a new one, of the absolute value of
    their product, as in the authors' code, or of its square, as in the paper's equation 8. To it comes `decay` times
    the Frobenius norms of the new `down` and `up`, not squared, as in their code.

    Args:
        covers: see `sites_of`.
        rank: R.
        tasks: T.
        alpha: see `lora`; published runs have 4 times the rank.
        strength: of the penalty; published runs have 0.5, some 5.
        norm: of products.
        decay: published runs have 0 mostly.

    Raises:
        ValueError: an option out of range.
    """
    check_at_least("strength", strength, 0)
    check_at_least("decay", decay, 0)
    check_choice("norm", norm, ("absolute", "squared"))

    def penalty(adapter: dict[str, LowRank], state: AdapterState) -> tuple[Array, dict[str, Any]]:
        total = jnp.float32(0)
        for path, own in adapter.items():
            past = jnp.moveaxis(state.bank[path].down, 0, 1).reshape(len(own.down), -1)  # [D, T R], 0 for later tasks
            products = product(past.T, own.down)
            total += jnp.abs(products).sum() if norm == "absolute" else jnp.square(products).sum()
        lengths = sum(_length(leaf) for leaf in jax.tree.leaves(adapter))
        return strength * total + decay * lengths, {"overlap": total}

    return _one_a_task(covers, rank, tasks, alpha, "parallel", penalty)


def _one_a_task(
    covers: Callable[[str], bool],
    rank: int,
    tasks: int,
    alpha: float | None,
    placement: Placement,
    penalty: Callable[[PyTree, PyTree], tuple[Array, dict[str, Any]]],
) -> Adapter:
    check_count("rank", rank, 1)
    check_count("tasks", tasks, 1)
    check_choice("placement", placement, ("parallel", "sequential"))
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: Key, params: PyTree) -> tuple[dict[str, LowRank], AdapterState]:
        sites = sites_of(params, covers, placement)
        return _fresh(key, sites, rank), begin_state(sites, rank, tasks, {})

    def changes(adapter: dict[str, LowRank], state: AdapterState) -> dict[str, Change]:
        return {path: Change(state.past[path], own.down, scale * own.up) for path, own in adapter.items()}

    def commit(key: Key, adapter: dict[str, LowRank], state: AdapterState) -> tuple[dict[str, LowRank], AdapterState]:
        sites = {path: Site(len(own.down), own.up.shape[1]) for path, own in adapter.items()}
        factors = {path: Factors(*own, jnp.full(rank, scale, jnp.float32)) for path, own in adapter.items()}
        return _fresh(key, sites, rank), commit_factors(state, factors)

    return Adapter(init, changes, penalty, same_state, None, commit, placement, tasks)


def _fresh(key: Key, sites: dict[str, Site], rank: int) -> dict[str, LowRank]:
    keys = jax.random.split(key, len(sites))
    return {
        path: LowRank(
            jax.random.uniform(own, (site.inputs, rank), jnp.float32, -1, 1) / math.sqrt(site.inputs),
            jnp.zeros((rank, site.outputs)),
        )
        for own, (path, site) in zip(keys, sites.items(), strict=True)
    }


def _length(leaf: Array) -> Array:
    """The Frobenius norm [], with the gradient 0 where it is 0."""
    square = jnp.square(leaf).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
