"""What the adapter experiment finds beside accuracies: answers by either head, drift, ranks, bytes, angles."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.adapter_bodies import cosine_logits
from jaxcl import adapters, report
from jaxcl.adapters import AdapterState
from jaxcl.continual import Result, Stream
from jaxcl.continual.strategies import Answered, ClassMeans, Features
from jaxcl.continual.streams import Selection
from jaxcl.nearest import normalise
from jaxcl.typing import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TESTED_AT_ONCE = 250


def findings_of(features: Features | None, result: Result, state: PyTree, stream: Stream) -> dict[str, float]:
    """Of one seed at the end of its run.

    Args:
        features: of the method; None where there are none, or the task must be told.
        result: of the run.
        state: what the method knows.
        stream: what it was tested on.
    """
    row = _answers(features, result, state, stream) if features else {}
    if (bank := bank_of(state)) is not None:
        cost = adapters.budget(bank)
        row |= {
            "active_rank": float(np.mean(list(cost.active.values()))),
            "kept_bytes_a_task": float(cost.bytes.mean()),
            "basis_bytes": float(cost.basis_bytes),
        }
    return row


def table_of(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What only this experiment asks, as a table; means over seeds."""
    percent = (
        *(f"{head}_task_{told}" for head in ("discriminant", "means", "classifier") for told in ("free", "told")),
        "drift_of_means",
    )  # fmt: skip
    columns = {name: f"{name.replace('_', ' ')} %" for name in percent} | {
        "active_rank": "active rank", "kept_bytes_a_task": "bytes a task", "basis_bytes": "bytes of bases",
    }  # fmt: skip
    rows = [["method", *columns.values()]]
    for method, of_method in found.items():
        values = {name: of_method[name]["mean"] for name in columns if name in of_method}
        shown = {name: f"{100 * value:.1f}" if name in percent else f"{value:,.1f}" for name, value in values.items()}
        rows.append([method, *(shown.get(name, "") for name in columns)])
    return rows


def _answers(features: Features, result: Result, state: PyTree, stream: Stream) -> dict[str, float]:
    """Accuracies at the end, means over tasks, by each head: the task told or not."""
    labels, own = np.asarray(stream.test.labels), stream.eligible_in_training
    shown = [_shown(features, result, state, stream, part) for part in stream.test_sets]
    answered: dict[str, list[np.ndarray]] = {}
    if "loss" in result.history[0]:  # or the classifier was not trained
        answered["classifier"] = [np.asarray(cosine_logits(result.params.head, jnp.asarray(made))) for made in shown]
    row: dict[str, float] = {}
    around = result.strategy_state
    if isinstance(around, Answered | ClassMeans):
        past = around.seen
        means, unit = np.asarray(normalise(past.sums)), [np.asarray(normalise(jnp.asarray(made))) for made in shown]
        answered["means"] = [np.where(np.asarray(past.counts) > 0, made @ means.T, -np.inf) for made in unit]
        if isinstance(around, Answered):
            origin, kernel, bias = map(np.asarray, (around.of_classifier.moments.origin, *around.of_classifier[1:]))
            answered["discriminant"] = [(made - origin) @ kernel + bias for made in unit]
        whole, of_whole = np.concatenate(unit), np.concatenate([labels[part.rows] for part in stream.test_sets])
        now = np.stack([whole[of_whole == k].mean(axis=0) for k in np.unique(of_whole)])
        cosines = np.sum(means[np.unique(of_whole)] * now, axis=1) / np.linalg.norm(now, axis=1)
        row["drift_of_means"] = float(np.mean(1 - cosines))
    for by, of_tasks in answered.items():
        for told, choices in (("free", np.ones_like(own)), ("told", own)):
            right = [
                np.where(allowed, scores, -np.inf).argmax(axis=1) == labels[part.rows]
                for scores, allowed, part in zip(of_tasks, choices, stream.test_sets, strict=True)
            ]
            row[f"{by}_task_{told}"] = float(np.mean([of_task.mean() for of_task in right]))
    return row


def _shown(features: Features, result: Result, state: PyTree, stream: Stream, part: Selection) -> np.ndarray:
    """Features of a task's test examples, [M, D]."""
    found = []
    for start in range(0, len(part.rows), _TESTED_AT_ONCE):
        places = np.minimum(np.arange(start, start + _TESTED_AT_ONCE), len(part.rows) - 1)
        inputs = jnp.asarray(stream.test.inputs[part.rows[places]])
        inputs = stream.view(stream.view_table, inputs, jnp.asarray(part.tasks[places]))
        found.append(np.asarray(features(result.params, state, inputs)))
    return np.concatenate(found)[: len(part.rows)]


def bank_of(state: PyTree) -> AdapterState | None:
    """What a method with an adapter a task keeps."""
    kept = getattr(state, "of_tasks", state)
    return kept if isinstance(kept, AdapterState) else None


def figures_of(name: str, bank: AdapterState) -> "dict[str, Figure]":
    """Ranks by site and task, and how near tasks' subspaces come to each other.

    Args:
        name: of the method.
        bank: what it keeps.
    """
    active = adapters.budget(bank).active
    ranks = np.stack(list(active.values()))
    sites = [path.removeprefix("params/").removesuffix("/kernel") for path in active]

    directions = {  # by kind and site, [T, N, R]
        "down": [own.down for own in bank.bank.values()],
        "up": [jnp.swapaxes(own.up, 1, 2) for own in bank.bank.values()],
    }

    def nearest(which: str) -> np.ndarray:
        pairs = jax.vmap(jax.vmap(adapters.cosines, (None, 0)), (0, None))
        return np.mean([np.asarray(pairs(own, own)[..., 0]) for own in directions[which]], axis=0)

    def of_the_last(which: str) -> np.ndarray:
        found = []
        for own in directions[which]:
            before = jnp.moveaxis(own[:-1], 0, 1).reshape(own.shape[1], -1)
            found.append(np.asarray(adapters.cosines(own[-1], before)))
        return np.array([np.arange(1, len(found[0]) + 1), np.mean(found, axis=0)])

    shared = {}
    if ranks.shape[1] > 1:
        shared[
            f"Singular values of what the last task's directions share with earlier ones', mean over sites, {name} "
            "(first seed)"
        ] = report.line_plot({which: of_the_last(which) for which in directions}, "number", "cosine")
    return (
        shared
        | {
            f"Active ranks by site and task, {name} (first seed)": report.heat_map(
                ranks, "active ranks", names=sites, most=max(1, ranks.max())
            ),
        }
        | {
            f"Largest cosine of the angles between tasks' {which} subspaces, mean over sites, {name} (first seed)": (
                report.heat_map(nearest(which), "cosine")
            )
            for which in directions
        }
    )
