"""Key care: whether a bottleneck's keys still fit what comes in, what to do when they do not, and deleting a class.

Keys are fitted once. When data drift, heads fall far from all keys, and examples that differ fetch the same pairs.
`check_keys` tells by how much; `care_for_keys` puts free keys where the new heads are, and leaves all else as it was:
a new key starts with the value of the key that was nearest, so that what is read changes only where learning begins.
All arrays keep their shapes, so that both can be called in the middle of a jitted stream.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.bottleneck.layer import Bottleneck, KeyState
from jaxcl.quantize import perplexity, replace_codes
from jaxcl.quantize import usage as count_codes
from jaxcl.typing import Array, ArrayLike, Key, PyTree, bad_argument, check_between, check_count

_LEVELS = 65  # of the quantiles that a distribution of distances is kept as
_CHANCE = 1e-3  # that a check of a codebook finds a shift where there is none, at most


class Reference(NamedTuple):
    """How far heads were from their keys when the keys were fitted."""

    quantiles: Array  # [C, 65], of squared distances, from the least to the greatest


class KeyHealth(NamedTuple):
    """How well keys fit a batch, for each codebook."""

    shift: Array  # [C], from 0 to 1: the largest excess of heads that lie farther than the reference has them
    far: Array  # [C], the share of heads that are farther out than nearly all of the reference
    utilisation: Array  # [C], the share of keys in play that were fetched in training
    perplexity: Array  # [C], of how often each was
    free: Array  # [C] int32, keys out of play or never fetched in training


class KeyPolicy(NamedTuple):
    """When and how much `care_for_keys` does."""

    shift: float = 0.15  # a codebook whose shift is above this, and above what chance gives, is cared for
    far: float = 0.99  # heads beyond this quantile of the reference may become keys
    most: int = 32  # keys a call and codebook


class KeyCare(NamedTuple):
    """What `care_for_keys` did."""

    health: KeyHealth  # before
    above: Array  # [], the shift above which a codebook was cared for
    placed: Array  # [C] int32, keys that were put on heads of the batch


def reference_distances(bottleneck: Bottleneck, params: PyTree, state: KeyState, features: Array) -> Reference:
    """The reference that later batches are held against.

    Pass features [..., D] like those that the keys were fitted to, but held out: keys lie nearer to the very ones than
    to others of their kind, so that each new batch would seem to have shifted. Those with NaN or infinity in them are
    left out.
    """
    _, distances = _nearest(bottleneck, params, state, features)
    finite = jnp.where(jnp.isfinite(distances), distances, jnp.nan)
    return Reference(jnp.nanquantile(finite, jnp.linspace(0, 1, _LEVELS), axis=0).T)


def check_keys(
    bottleneck: Bottleneck,
    params: PyTree,
    state: KeyState,
    reference: Reference,
    features: Array,
    *,
    mask: Array | None = None,
    policy: KeyPolicy = KeyPolicy(),  # noqa: B008  # it does not change
) -> KeyHealth:
    """How well the keys fit features [..., D], those alone that `mask` [...] bool has, if there is one.

    The shift of a codebook is the one-sided Kolmogorov-Smirnov statistic: the largest difference between the share of
    the reference's distances below a value and the batch's share below it. Chance alone gives some 0.6 / sqrt(batch),
    and more than s once in exp(2 batch s^2) checks of a codebook: 0.05 in one of four batches of 256, 0.15 in one of
    100,000 (for a large reference). Features with NaN or infinity in them are left out.
    """
    _check(policy)
    _, distances = _nearest(bottleneck, params, state, features)
    return _health(state, reference, _masked(distances, mask), policy)


def care_for_keys(
    key: Key,
    bottleneck: Bottleneck,
    params: PyTree,
    state: KeyState,
    reference: Reference,
    features: Array,
    *,
    mask: Array | None = None,
    policy: KeyPolicy = KeyPolicy(),  # noqa: B008  # it does not change
) -> tuple[PyTree, KeyState, KeyCare]:
    """Puts free keys on far heads of the batch, in the codebooks whose shift is above the policy's.

    It must also be above what chance gives a batch of this size once in 1,000 checks, 0.33 for 32 features and 0.12 for
    256, so that small batches wake no keys for nothing.
    Free are the keys that are out of play (`spare` of the layer), and, once those are used up, the ones that training
    never fetched, as `Bottleneck.count_usage` has counted. Heads are drawn with a chance in proportion to their squared
    distance, as k-means++ does. A new key has the value of the key that was nearest to it, averages of an even load as
    `fit_keys` gives a key that it replaces, and counts as fetched once.
    Indices that were looked up before hold no longer: look up anew what is trained or tested on next.

    Args:
        key: decides which heads become keys; consumed.
        bottleneck: the layer.
        params: its values.
        state: its keys.
        reference: what `reference_distances` made when keys were fitted.
        features: [..., D], a batch of what comes in.
        mask: [...] bool, which of them count; all if None.
        policy: thresholds.

    Returns:
        (params, state, what was done).

    Raises:
        ValueError: a threshold out of range.
    """
    _check(policy)
    codebooks, pairs = state.usage.shape
    heads = bottleneck.heads(state, features)  # [C, N, W]
    nearest, distances = _nearest(bottleneck, params, state, features)
    distances = _masked(distances, mask)
    health = _health(state, reference, distances, policy)
    counted = jnp.maximum(jnp.isfinite(distances[:, 0]).sum(), 1)
    above = jnp.maximum(jnp.float32(policy.shift), jnp.sqrt(-math.log(_CHANCE) / (2 * counted)))
    most = min(policy.most, heads.shape[1], pairs)

    def choose(key: Key, distances: Array, far: Array, due: Array, active: Array, usage: Array) -> tuple[Array, Array]:
        """Which keys are put on a head [J] bool, and on which head [J]."""
        chance = jnp.log(jnp.maximum(distances, 1e-30))
        chance = jnp.where((distances > far) & jnp.isfinite(distances), chance, -jnp.inf)
        drawn, rows = jax.lax.top_k(chance + jax.random.gumbel(key, chance.shape), most)
        # Keys out of play come first, then those never fetched, each in order.
        free, slots = jax.lax.top_k(jnp.where(active, jnp.where(usage == 0, 1, 0), 2), most)
        slots = jnp.where(due & jnp.isfinite(drawn) & (free > 0), slots, pairs)  # out of range: dropped
        return (
            jnp.zeros(pairs, bool).at[slots].set(True, mode="drop"),
            jnp.zeros(pairs, jnp.int32).at[slots].set(rows, mode="drop"),
        )

    placed, rows = jax.vmap(choose)(
        jax.random.split(key, codebooks), distances.T, _quantile(reference, policy.far), health.shift > above,
        state.active, state.usage,
    )  # fmt: skip
    own = jnp.arange(codebooks)[:, None]
    even_load = state.keys.counts.sum(axis=1) / state.active.sum(axis=1)
    values = jnp.where(placed[..., None], params["values"][own, nearest[own, rows]], params["values"])
    state = state._replace(
        keys=jax.vmap(replace_codes)(state.keys, heads[own, rows], placed, even_load),
        active=state.active | placed,
        usage=jnp.where(placed, 1, state.usage),
    )
    care = KeyCare(health, above, placed.sum(axis=1, dtype=jnp.int32))
    return params | {"values": values}, state, care


def describe_care(care: KeyCare) -> list[dict[str, Any]]:
    """What was decided and why, a plain record a codebook: for a log; "placed" is 0 where nothing was done."""
    records, above = [], f"above {float(care.above):.3g}"
    for number, (shift, far, free, placed) in enumerate(
        zip(care.health.shift, care.health.far, care.health.free, care.placed, strict=True)
    ):
        if not shift > care.above:
            cause = f"shift {float(shift):.3f} is not {above}"
        elif not int(free):
            cause = f"shift {float(shift):.3f} is {above}, but no key is free"
        else:
            cause = f"shift {float(shift):.3f} is {above}; {float(far):.1%} of heads are far"
        records.append({"codebook": number, "placed": int(placed), "free": int(free - placed), "cause": cause})
    return records


def forget_class(
    params: PyTree, state: KeyState, label: int, indices: ArrayLike, *, share: float = 0.5, deleted: Sequence[int] = ()
) -> tuple[PyTree, KeyState]:
    """Removes what the values hold of a class, as far as it can be told from what others learned.

    Pairs of which the class's own training examples made at least `share` of the fetches are reset: value zero, never
    fetched. In all pairs the class's entry then goes below the others, so that it cannot be the answer. What stays:
    keys that were fitted to its examples, and in pairs that it shared with other classes, how its examples moved their
    entries. Someone who has the keys can still see that such features occurred.

    Args:
        params: values [C, J, V], V counting classes.
        state: with usage counted over training (`Bottleneck.count_usage`).
        label: the class.
        indices: [..., C, top_k], what the class's training examples fetched, each as often as `usage` counted it.
        share: from above 0 to 1.
        deleted: classes that were deleted before, whose entries stay below the others in pairs that are reset now.

    Returns:
        (params, state).

    Raises:
        ValueError: a share out of range, a label that values have no entry for, no class that is left, or indices of
            another shape.
    """
    values = params["values"]
    check_between("share", share, 1e-12, 1)
    gone = sorted({label, *deleted})
    for name, each in [("label", label), *(("deleted", one) for one in deleted)]:
        check_between(name, each, 0, values.shape[-1] - 1)
    if len(gone) == values.shape[-1]:
        raise bad_argument("deleted", tuple(deleted), f"leave a class beside {label}: begin anew without any")
    codebooks, pairs = state.usage.shape
    fetched = jnp.moveaxis(jnp.asarray(indices, jnp.int32), -2, 0)
    if len(fetched) != codebooks:
        shape = jnp.shape(indices)
        raise bad_argument("indices", f"shape {shape}", f"pass [..., {codebooks}, top_k], as `lookup` gives")
    fetched = fetched.reshape(codebooks, -1)
    own = jax.vmap(lambda row: count_codes(row, pairs))(fetched)
    enough = share * (1 - 1e-6) * state.usage  # a share such as 0.3 is rounded
    reset = (own > 0) & (own >= enough)
    values, columns = jnp.where(reset[..., None], 0, values), jnp.array(gone)
    lowest = values.at[..., columns].set(jnp.inf).min(axis=-1, keepdims=True) - 1
    values = values.at[..., columns].set(lowest)
    usage = jnp.where(reset, 0, jnp.maximum(state.usage - own, 0))
    return params | {"values": values}, state._replace(usage=usage)


def _nearest(bottleneck: Bottleneck, params: PyTree, state: KeyState, features: Array) -> tuple[Array, Array]:
    """Of each head, the nearest key [C, N] and the squared distance to it [N, C]."""
    indices = bottleneck.lookup(params, state, features)
    codebooks = indices.shape[-2]
    distances = bottleneck.distances(state, features, indices)
    return indices[..., 0].reshape(-1, codebooks).T, distances.reshape(-1, codebooks)


def _masked(distances: Array, mask: Array | None) -> Array:
    """[N, C], with infinity for features that do not count."""
    valid = jnp.isfinite(distances) if mask is None else jnp.isfinite(distances) & mask.reshape(-1, 1)
    return jnp.where(valid, distances, jnp.inf)


def _health(state: KeyState, reference: Reference, distances: Array, policy: KeyPolicy) -> KeyHealth:
    levels = jnp.linspace(0, 1, _LEVELS)
    valid = jnp.isfinite(distances)
    counted = valid.sum(axis=0)
    below = (
        jax.vmap(lambda own, edges: jnp.searchsorted(jnp.sort(own), edges, side="right"))(
            distances.T, reference.quantiles
        )
        / jnp.maximum(counted, 1)[:, None]
    )
    in_play = jnp.where(state.active, state.usage, 0)
    active = jnp.maximum(state.active.sum(axis=1), 1)
    return KeyHealth(
        shift=jnp.where(counted > 0, jnp.maximum((levels - below).max(axis=1), 0), 0),
        far=(valid & (distances > _quantile(reference, policy.far))).sum(axis=0) / jnp.maximum(counted, 1),
        utilisation=(in_play > 0).sum(axis=1) / active,
        perplexity=perplexity(in_play),
        free=(~state.active | (state.usage == 0)).sum(axis=1, dtype=jnp.int32),
    )


def _quantile(reference: Reference, level: float) -> Array:
    """[C]."""
    levels = jnp.linspace(0, 1, _LEVELS)
    return jax.vmap(lambda quantiles: jnp.interp(level, levels, quantiles))(reference.quantiles)


def _check(policy: KeyPolicy) -> None:
    check_between("policy.shift", policy.shift, 0, 1)
    check_between("policy.far", policy.far, 0, 1)
    check_count("policy.most", policy.most, 1)
