"""What is kept of the adapters of tasks that are done."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.adapters.contract import Budget, Factors, Site, product
from jaxcl.adapters.subspaces import Protected
from jaxcl.trees import byte_count, commit
from jaxcl.typing import Array, bad_argument


class AdapterState(NamedTuple):
    """What methods with an adapter a task know; dicts are by site."""

    bank: dict[str, Factors]  # leaves [T, ...]; 0 for tasks to come
    past: dict[str, Array]  # [D, E], the maps in the bank, summed
    protected: dict[str, Protected]  # what a new adapter keeps off; {} for nothing
    committed: Array  # [] int32, tasks that are done


def begin_state(sites: Mapping[str, Site], rank: int, tasks: int, protected: dict[str, Protected]) -> AdapterState:
    """The state before the first of T tasks, with room for `rank` R at each site."""
    bank = {
        path: Factors(
            jnp.zeros((tasks, site.inputs, rank)), jnp.zeros((tasks, rank, site.outputs)), jnp.zeros((tasks, rank))
        )
        for path, site in sites.items()
    }
    past = {path: jnp.zeros((site.inputs, site.outputs)) for path, site in sites.items()}
    return AdapterState(bank, past, protected, jnp.int32(0))


def commit_factors(state: AdapterState, factors: Mapping[str, Factors]) -> AdapterState:
    """The state with one task more; what is not active of its factors [D, R] is kept as 0."""
    kept = {
        path: Factors(jnp.where(own.gate != 0, own.down, 0), jnp.where(own.gate != 0, own.up.T, 0).T, own.gate)
        for path, own in factors.items()
    }
    return state._replace(
        bank={path: commit(state.bank[path], state.committed, own) for path, own in kept.items()},
        past={path: state.past[path] + product(own.down * own.gate, own.up) for path, own in kept.items()},
        committed=state.committed + 1,
    )


def budget(state: AdapterState) -> Budget:
    """What each task [T] costs, in ranks, parameters and bytes.

    Raises:
        ValueError: more tasks than there is room for were committed, which compiled code does not tell.
    """
    tasks = len(next(iter(state.bank.values())).gate)
    if state.committed > tasks:
        raise bad_argument("state", f"{state.committed} tasks in room for {tasks}", "make the method with more tasks")
    active = {path: np.count_nonzero(np.asarray(own.gate), axis=1) for path, own in state.bank.items()}
    parameters = sum(active[path] * (own.down.shape[1] + own.up.shape[2] + 1) for path, own in state.bank.items())
    return Budget(active, np.asarray(parameters), 4 * np.asarray(parameters), byte_count(state.protected))
