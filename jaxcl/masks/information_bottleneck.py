"""IBM, information-bottleneck masked sub-networks (Chen et al. 2023, arXiv 2312.00840).

Every masked weight w has multiplicative noise z ~ N(mean, exp(log_variance)): a training step uses w z. A penalty, the
information that w z carries at most, drives weights that the task can do without towards pure noise, and those a task
does not keep. What it keeps never moves again, but other tasks may use it, each with a scale of its own.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl import trees
from jaxcl.masks.contract import Bank, Masked, MaskMethod, Named, begin_bank, hold, is_free, record, task_mask, task_own
from jaxcl.masks.noise import Noise, draw_noise, information, log_alpha, noisy
from jaxcl.masks.scales import folded_scales, stored_scales
from jaxcl.trees import leaves_by_path, replace_leaves
from jaxcl.typing import Array, ArrayLike, Key, PyTree, bad_argument, check_between, check_choice


class Committed(NamedTuple):
    """What was seen of each leaf when a task's masks were fixed, by path, [T]."""

    ratios: Named
    information: Named  # `information` of the weights that the task keeps, in nats


class InformationBottleneckState(NamedTuple):
    """What the method knows beside what is trained."""

    bank: Bank
    ratios: Named  # by path, []: what the leaf's penalty counts
    committed: Committed


def ib_masks(
    covers: Callable[[str], bool],
    tasks: int,
    *,
    threshold: float = 0.0,
    scale_rule: Literal["folded", "authors"] = "folded",
    scale_bits: int = 3,
    redraw: Literal["free", "all", "none"] = "all",
    reuse: bool = True,
    log_variance: float = -9.0,
) -> MaskMethod:
    """The mask method of IBM.

    Penalties are `information` of each leaf times its ratio, which `refresh_ratios` measures. It is the caller's to
    weigh them (the authors: 1e-3 over the batch size) and to give means and log variances a learning rate far above
    that of the weights (`separate_rates`).

    Args:
        covers: whether the leaf of a path has a mask; see `Bank`.
        tasks: T.
        threshold: a weight stays where `log_alpha` is below it.
        scale_rule: what is kept of the means at a task's end: "folded" multiplies newly claimed weights by theirs, and
            for those of earlier tasks keeps a few bits; "authors" keeps a float for each weight and task, and that is
            the mean plus the standard deviation.
        scale_bits: of the scale of a re-used weight, 0 to 8; 0 is one scale a leaf.
        redraw: whose noise a new task draws anew: that of all weights; of free ones, as the paper says, so that what
            others kept begins as it was kept; or of none.
        reuse: whether a task may use weights that others have claimed.
        log_variance: of new noise, see `draw_noise`.

    Raises:
        ValueError: an option out of range.
    """
    check_choice("scale_rule", scale_rule, ("folded", "authors"))
    check_choice("redraw", redraw, ("free", "all", "none"))
    check_between("scale_bits", scale_bits, 0, 8)
    rule = folded_scales(scale_bits) if scale_rule == "folded" else stored_scales()

    def fresh(key: Key, bank: Bank) -> dict[str, Noise]:
        keys = jax.random.split(key, len(bank.owner))
        return {
            path: draw_noise(own_key, owner.shape, log_variance=log_variance)
            for own_key, (path, owner) in zip(keys, bank.owner.items(), strict=True)
        }

    def init(key: Key, params: PyTree) -> tuple[Masked, InformationBottleneckState]:
        bank = begin_bank(params, covers, tasks)
        bank = bank._replace(
            scales={path: trees.bank(rule.begin(owner.shape), tasks) for path, owner in bank.owner.items()}
        )
        ratios = {path: jnp.float32(1) for path in bank.owner}
        none = trees.bank({path: jnp.float32(0) for path in bank.owner}, tasks)
        return Masked(params, fresh(key, bank)), InformationBottleneckState(bank, ratios, Committed(none, none))

    def sample(key: Key, masked: Masked, state: InformationBottleneckState) -> tuple[PyTree, Array]:
        weights, free, keys = (
            leaves_by_path(masked.weights),
            is_free(state.bank),
            jax.random.split(key, len(masked.scores)),
        )
        found = {
            path: noisy(own_key, weights[path], noise)
            for own_key, (path, noise) in zip(keys, masked.scores.items(), strict=True)
        }
        if not reuse:
            found = {path: jnp.where(free[path], weight, 0) for path, weight in found.items()}
        penalty = sum(state.ratios[path] * information(noise) for path, noise in masked.scores.items())
        return replace_leaves(masked.weights, found), jnp.asarray(penalty)

    def protect(masked: Masked, updates: Masked, state: InformationBottleneckState) -> tuple[Masked, PyTree]:
        return updates._replace(weights=hold(updates.weights, state.bank)), state

    def commit(
        key: Key, masked: Masked, state: InformationBottleneckState, task: Array | int
    ) -> tuple[Masked, InformationBottleneckState]:
        weights, free, kept = leaves_by_path(masked.weights), is_free(state.bank), keeps(masked, state)
        scores, scales, nats = {}, {}, {}
        for path, noise in masked.scores.items():
            nats[path] = information(noise._replace(mean=jnp.where(kept[path], noise.mean, 0)))
            weights[path], scores[path], scales[path] = rule.settle(
                weights[path], noise, kept[path] & free[path], kept[path] & ~free[path]
            )
        bank = record(state.bank, task, kept, masked.weights, scales)
        if redraw != "none":
            drawn, anew = fresh(key, bank), is_free(bank)
            for path, noise in scores.items():
                which = anew[path] if redraw == "free" else True
                scores[path] = Noise(*(jnp.where(which, new, old) for new, old in zip(drawn[path], noise, strict=True)))
        committed = trees.commit(state.committed, task, Committed(state.ratios, nats))
        return Masked(replace_leaves(masked.weights, weights), scores), state._replace(bank=bank, committed=committed)

    def select(masked: Masked, state: InformationBottleneckState, task: Array | int) -> PyTree:
        weights, found = leaves_by_path(masked.weights), task_own(state.bank, task)
        for path, owner in state.bank.owner.items():
            scale = rule.read(trees.pick(state.bank.scales[path], task), owner != task)
            mask = task_mask(state.bank, path, task)
            found[path] = jnp.where(mask, weights[path] * scale, 0).astype(weights[path].dtype)
        return replace_leaves(masked.weights, found)

    def keeps(masked: Masked, state: InformationBottleneckState) -> Named:
        kept = {path: log_alpha(noise) < threshold for path, noise in masked.scores.items()}
        free = is_free(state.bank)
        return kept if reuse else {path: mask & free[path] for path, mask in kept.items()}

    def current(masked: Masked, state: InformationBottleneckState) -> PyTree:
        weights, kept = leaves_by_path(masked.weights), keeps(masked, state)
        return replace_leaves(masked.weights, {
            path: jnp.where(kept[path], weights[path] * rule.scale(noise), 0).astype(weights[path].dtype)
            for path, noise in masked.scores.items()
        })  # fmt: skip

    return MaskMethod(init, sample, protect, commit, select, current, lambda state: state.bank, tasks)


def decomposition_ratio(features: ArrayLike, *, share: float = 0.97) -> Array:
    """How many principal components a layer's hidden features need, over the number of channels, [].

    Counts, as the authors do, the components at which the cumulative explained variance is still below `share`.

    Args:
        features: [..., channels].
        share: of the variance.
    """
    check_between("share", share, 0, 1)
    x = jnp.asarray(features).reshape(-1, features.shape[-1])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(axis=0)
    # Squared singular values of the centred features are eigenvalues of their channels' products.
    products = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    explained = jnp.maximum(jnp.linalg.eigvalsh(products)[::-1], 0)
    return jnp.mean(jnp.cumsum(explained) < share * explained.sum())


def refresh_ratios(
    state: InformationBottleneckState, features: Mapping[str, Array], *, share: float = 0.97
) -> InformationBottleneckState:
    """The state with each leaf's ratio as `decomposition_ratio` measures it.

    Args:
        state: of `ib_masks`.
        features: by path of a masked leaf, what its layer makes of a batch, before normalisation, [..., channels].
            Leaves that are not there keep their ratio.
        share: see `decomposition_ratio`.

    Raises:
        ValueError: a path without a mask.
    """
    if unknown := features.keys() - state.ratios.keys():
        raise bad_argument("features", f"paths {sorted(unknown)}", f"choose from {sorted(state.ratios)}")
    measured = {path: decomposition_ratio(x, share=share) for path, x in features.items()}
    return state._replace(ratios=state.ratios | measured)
