"""OA-Adapter (Wan et al. 2025, arXiv 2505.22358): adapters whose rank adapts, each kept off what earlier tasks need.

A site adds W2 G W1 x to what comes out of a layer, x; G is diagonal, soft(g, tau), and the ranks where |g| is below tau
take no part. There is no public code of the authors to differ from.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.adapters.bank import AdapterState, begin_state, commit_factors
from jaxcl.adapters.contract import Adapter, Change, Factors, Site, product, same_state, sites_of
from jaxcl.adapters.log import Log, empty_log, log_switches, read_log
from jaxcl.adapters.subspaces import Protected, kept_off, nothing_protected, overlap, protect
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_at_least, check_choice, check_count

OrthogonalTo = Literal["outputs", "down", "inputs"]


class Gated(NamedTuple):
    """What is trained at a site."""

    down: Array  # [D, R], the paper's W1 transposed
    up: Array  # [R, E], the paper's W2 transposed
    gate: Array  # [R], the paper's g
    log_threshold: Array  # [], of the paper's tau


class OrthogonalState(NamedTuple):
    """What the method knows beside what is trained."""

    of_tasks: AdapterState
    measured: dict[str, Array]  # by site, [D, D]: sum of x x^T over this task's examples; {} where not needed
    active: dict[str, Array]  # by site, [R] bool, as last seen
    step: Array  # [] int32, of the task
    log: Log


def oa_adapter(
    covers: Callable[[str], bool],
    rank: int,
    tasks: int,
    *,
    orthogonal_to: OrthogonalTo | None = "inputs",
    strength: float | None = None,
    protected: int = 64,
    drift_strength: float = 0.0,
    gates: Literal["learned", "fixed"] = "learned",
    threshold: float = 0.1,
    sparsity: float = 0.0,
    revival: bool = True,
    log_size: int = 4096,
) -> Adapter:
    """OA-Adapter after the layers covered, with three choices of what a new task keeps off.

    Adapters of earlier tasks stand still and all are summed, so that no task need be told. What is protected is one
    subspace a site, whatever the number of tasks: the `protected` principal directions of all that is to be kept off.

    Args:
        covers: see `sites_of`: layers after which an adapter comes.
        rank: R, at most.
        tasks: T.
        orthogonal_to: what a new task keeps off: "outputs" the earlier ones' active rows of `up` (the paper), "down"
            their active columns of `down` (as O-LoRA), "inputs" the principal directions of what they had at the site,
            measured in one more pass over each task at its end; None for nothing.
        strength: of the penalty, the mean over sites of the share of the squared length of `up` or `down` that lies in
            the protected subspace; it is from 0 to 1 at any width, where the paper's is a sum. None takes that part
            off instead, so that the overlap is 0.
        protected: directions of the protected subspace at most. Inputs may go in all directions there are: of these
            at most half are protected, so that some are left to learn in.
        drift_strength: of a second penalty, for "inputs" alone: how much the new adapter adds to what earlier tasks had
            at a site, the sum over these of E |adapter(x)|^2 / E |x|^2, in the mean over sites. It counts all
            directions, each as far as it matters to them, where `protected` takes some of them off.
        gates: "fixed" has all ranks active with gates of 1.
        threshold: tau at first; gates begin as normal variables with the mean 2 tau and the standard deviation tau.
        sparsity: weight of the mean of |soft(g, tau)| in the loss. The paper has no such term; without one tau has no
            reason to rise.
        revival: whether a rank that is off has gradients as if its gate were g, by which it can come back. Without it
            none reaches it, and it is off for ever.
        log_size: switches of ranks that are kept, see `switches`.

    Raises:
        ValueError: an option out of range, or a drift_strength without inputs.
    """
    for name, size in (("rank", rank), ("tasks", tasks), ("protected", protected), ("log_size", log_size)):
        check_count(name, size, 1)
    for name, value, least in (
        ("threshold", threshold, 1e-6), ("sparsity", sparsity, 0), ("strength", strength or 0, 0),
        ("drift_strength", drift_strength, 0),
    ):  # fmt: skip
        check_at_least(name, value, least)
    check_choice("orthogonal_to", orthogonal_to, ("outputs", "down", "inputs", None))
    check_choice("gates", gates, ("learned", "fixed"))
    if drift_strength and orthogonal_to != "inputs":
        raise bad_argument("drift_strength", drift_strength, 'pass orthogonal_to="inputs", whose pass measures drift')
    learned = gates == "learned"

    def fresh(key: Key, sites: Mapping[str, Site]) -> dict[str, Gated]:
        keys = jax.random.split(key, len(sites))
        return {
            path: _begin(own, site, rank, threshold, learned)
            for own, (path, site) in zip(keys, sites.items(), strict=True)
        }

    def init(key: Key, params: PyTree) -> tuple[dict[str, Gated], OrthogonalState]:
        sites = sites_of(params, covers, "sequential")
        share = 2 if orthogonal_to == "inputs" else 1
        kept = {
            path: nothing_protected(site.inputs, min(protected, -(-site.inputs // share)))
            for path, site in sites.items()
        }
        of_tasks = begin_state(sites, rank, tasks, kept if orthogonal_to else {})
        adapter = fresh(key, sites)
        measured = {path: jnp.zeros((site.inputs, site.inputs)) for path, site in sites.items()}
        return adapter, OrthogonalState(
            of_tasks, measured if orthogonal_to == "inputs" else {}, active_ranks(adapter), jnp.int32(0),
            empty_log(log_size),
        )  # fmt: skip

    def active_ranks(adapter: Mapping[str, Gated]) -> dict[str, Array]:
        return {path: soft_gate(own) != 0 if learned else jnp.ones(rank, bool) for path, own in adapter.items()}

    def factors(adapter: Mapping[str, Gated], state: OrthogonalState) -> dict[str, Factors]:
        off = state.of_tasks.protected if strength is None else {}
        return {path: _factors(own, learned, orthogonal_to, off.get(path)) for path, own in adapter.items()}

    def changes(adapter: Mapping[str, Gated], state: OrthogonalState) -> dict[str, Change]:
        found = {}
        for path, (down, up, gate) in factors(adapter, state).items():
            gated = gate[:, None] * up
            if learned and revival:
                as_if = adapter[path].gate[:, None] * up
                gated += jnp.where(gate[:, None] == 0, as_if - jax.lax.stop_gradient(as_if), 0)
            found[path] = Change(state.of_tasks.past[path], down, gated)
        return found

    def penalty(adapter: Mapping[str, Gated], state: OrthogonalState) -> tuple[Array, dict[str, Any]]:
        now, sites = factors(adapter, state), len(adapter)
        inside = sum(
            overlap(kept.basis, now[path].up.T if orthogonal_to == "outputs" else now[path].down)
            for path, kept in state.of_tasks.protected.items()
        )
        gated = sum(jnp.abs(own.gate).mean() for own in now.values())
        if strength is None:  # told, but nothing to descend
            inside = jax.lax.stop_gradient(inside)
        metrics = {
            "active rank": sum(jnp.sum(own.gate != 0) for own in now.values()) / sites,
            "overlap": jnp.asarray(inside / sites, jnp.float32),
        }
        total = (strength or 0) * inside + sparsity * gated
        if orthogonal_to == "inputs":
            drift = sum(_added_length(kept.gram, now[path]) for path, kept in state.of_tasks.protected.items())
            metrics["drift"] = jnp.asarray(drift / sites, jnp.float32)
            total += drift_strength * drift if drift_strength else 0  # no gradient for nothing
        return jnp.asarray(total) / sites, metrics

    def track(adapter: Mapping[str, Gated], state: OrthogonalState) -> OrthogonalState:
        now = active_ranks(adapter)
        thresholds = jnp.stack([jnp.exp(own.log_threshold) for own in adapter.values()])
        log = log_switches(state.log, state.of_tasks.committed, state.step, state.active, now, thresholds)
        return state._replace(active=now, step=state.step + 1, log=log)

    def measure(state: OrthogonalState, moments: Mapping[str, Array]) -> OrthogonalState:
        return state._replace(measured={path: total + moments[path] for path, total in state.measured.items()})

    def commit(
        key: Key, adapter: Mapping[str, Gated], state: OrthogonalState
    ) -> tuple[dict[str, Gated], OrthogonalState]:
        now = factors(adapter, state)
        of_tasks = commit_factors(state.of_tasks, now)
        found = state.measured or {path: _directions(own, orthogonal_to) for path, own in now.items()}
        kept = {path: protect(old, _each_alike(found[path])) for path, old in of_tasks.protected.items()}
        adapter = fresh(key, {path: Site(len(own.down), own.up.shape[1]) for path, own in now.items()})
        return adapter, OrthogonalState(
            of_tasks._replace(protected=kept), jax.tree.map(jnp.zeros_like, state.measured), active_ranks(adapter),
            jnp.int32(0), state.log,
        )  # fmt: skip

    return Adapter(
        init, changes, penalty, track if learned else same_state, measure if orthogonal_to == "inputs" else None,
        commit, "sequential", tasks,
    )  # fmt: skip


def _begin(key: Key, site: Site, rank: int, threshold: float, learned: bool) -> Gated:
    """What is trained at a site as it begins: it adds nothing."""
    down_key, gate_key = jax.random.split(key)
    return Gated(
        jax.random.normal(down_key, (site.inputs, rank)) / math.sqrt(site.inputs),
        jnp.zeros((rank, site.outputs)),
        threshold * (2 + jax.random.normal(gate_key, (rank,))) if learned else jnp.ones(rank),
        jnp.full((), math.log(threshold), jnp.float32),
    )


def _factors(own: Gated, learned: bool, orthogonal_to: OrthogonalTo | None, off: Protected | None) -> Factors:
    """The map of what is trained at a site, kept off a subspace [N, M] if one is given."""
    down, up = own.down, own.up
    if off is not None and orthogonal_to == "outputs":
        up = kept_off(off.basis, up.T).T
    elif off is not None:
        down = kept_off(off.basis, down)
    return Factors(down, up, soft_gate(own) if learned else jax.lax.stop_gradient(own.gate))


def _directions(own: Factors, orthogonal_to: OrthogonalTo | None) -> Array:
    """The sum of v v^T over the directions v of active ranks, of length 1."""
    columns = own.up.T if orthogonal_to == "outputs" else own.down
    lengths = jnp.linalg.norm(columns, axis=0)
    columns = jnp.where((own.gate != 0) & (lengths > 0), columns / jnp.where(lengths > 0, lengths, 1), 0)
    return product(columns, columns.T)


def _added_length(gram: Array, own: Factors) -> Array:
    """The sum [] of |adapter(x)|^2 over the vectors x whose products x x^T sum up to `gram` [D, D]."""
    gated = own.gate[:, None] * own.up
    return jnp.sum(product(product(own.down.T, product(gram, own.down)), gated) * gated)


def _each_alike(gram: Array) -> Array:
    """A sum [N, N] of v v^T scaled so that each task's has the same trace, or 0."""
    trace = jnp.trace(gram)
    return gram / jnp.where(trace > 0, trace, 1)


def soft_gate(own: Gated) -> Array:
    """soft(g, tau) = sign(g) max(|g| - tau, 0), [R] (the paper's equation 3)."""
    return jnp.sign(own.gate) * jnp.maximum(jnp.abs(own.gate) - jnp.exp(own.log_threshold), 0)


def switches(state: OrthogonalState) -> list[dict[str, Any]]:
    """When ranks went off or on, as dicts in the order they came: task, step, site, rank, active and threshold."""
    return read_log(state.log, state.active)
