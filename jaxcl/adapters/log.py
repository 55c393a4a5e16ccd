"""A log of when ranks went off or on: an audit trail of fixed size, written inside compiled steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.typing import Array


class Event(NamedTuple):
    """When ranks were switched."""

    task: Array  # [L] int32
    step: Array  # [L] int32, of the task
    site: Array  # [L] int32, in the order of the sites
    rank: Array  # [L] int32
    active: Array  # [L] bool, whether on or off
    threshold: Array  # [L] float32, tau at the time


class Log(NamedTuple):
    """Switches in the order they came; what is beyond its room is counted and not kept."""

    events: Event  # L of them
    seen: Array  # [] int32, how many came


def empty_log(size: int) -> Log:
    """A log with room for so many switches."""
    none = jnp.zeros(size, jnp.int32)
    return Log(Event(none, none, none, none, jnp.zeros(size, bool), jnp.zeros(size)), jnp.int32(0))


def log_switches(
    log: Log, task: Array, step: Array, before: Mapping[str, Array], now: Mapping[str, Array], thresholds: Array
) -> Log:
    """The log with what is switched from `before` to `now`, both by site [R], at the sites' thresholds [S]."""
    active = jnp.stack(list(now.values()))
    switched = (active != jnp.stack(list(before.values()))).ravel()
    room = len(log.events.step)
    place = jnp.where(switched, log.seen + jnp.cumsum(switched, dtype=jnp.int32) - 1, room)  # past the end: dropped
    site, rank = (part.ravel() for part in jnp.indices(active.shape, dtype=jnp.int32))
    new = Event(
        jnp.full_like(site, task), jnp.full_like(site, step), site, rank, active.ravel(), thresholds[site]
    )  # fmt: skip
    kept = Event(*(old.at[place].set(leaf, mode="drop") for old, leaf in zip(log.events, new, strict=True)))
    return Log(kept, log.seen + switched.sum(dtype=jnp.int32))


def read_log(log: Log, sites: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log as one dict a switch, in the order they came, with the fields of `Event` and sites by their paths."""
    names = list(sites)
    count = min(int(log.seen), len(log.events.step))
    columns = {name: leaf[:count].tolist() for name, leaf in jax.device_get(log.events)._asdict().items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row | {"site": names[row["site"]]} for row in rows]
