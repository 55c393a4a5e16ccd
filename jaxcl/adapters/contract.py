"""What an adapter method is: low-rank maps beside or after the layers of a frozen network, a new one with each task."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.trees import leaves_by_path, replace_leaves, select_paths
from jaxcl.typing import Array, Key, PyTree, bad_argument, check_choice

Placement = Literal["parallel", "sequential"]
LayerFunction = Callable[[str, Array, Array], Array]
# (path of a layer's kernel, inputs [..., I], outputs [..., O]) -> outputs [..., O]
_BIASES = {"kernel": "bias", "w": "b"}  # beside kernels of these names: Flax's and Haiku's


class Site(NamedTuple):
    """Where an adapter sits, as widths; for a sequential one both are those of the layer's outputs."""

    inputs: int  # D
    outputs: int  # E


class Factors(NamedTuple):
    """The map x -> ((x down) * gate) up of one task at one site."""

    down: Array  # [D, R]
    up: Array  # [R, E]
    gate: Array  # [R]; a rank whose gate is 0 is not active, and need not be kept


class Change(NamedTuple):
    """What is added to a layer's outputs: x past + (x down) up."""

    past: Array | None  # [D, E], the maps of tasks that are done, summed; None for none ever
    down: Array  # [D, R]
    up: Array  # [R, E], with the gates in it


class Budget(NamedTuple):
    """What T tasks cost, on the host; tasks that are not committed count 0."""

    active: dict[str, np.ndarray]  # by site, [T]: ranks whose gate is not 0
    parameters: np.ndarray  # [T], of active ranks: their columns, rows and gates
    bytes: np.ndarray  # [T], of those parameters
    basis_bytes: int  # of what keeps later tasks off earlier ones; not needed to answer


class Adapter(NamedTuple):
    """A way to adapt a frozen network to one task after another, as pure functions.

    Keys of dicts are sites: paths of the kernels that the method covers. What a task has committed is the same to the
    last bit for ever after.
    """

    init: Callable[[Key, PyTree], tuple[PyTree, PyTree]]
    # (key, the network's params, or their shapes) -> (adapter, which is trained, and state); the key is consumed
    changes: Callable[[PyTree, PyTree], dict[str, Change]]  # (adapter, state) -> what is added, past tasks' included
    penalty: Callable[[PyTree, PyTree], tuple[Array, dict[str, Array]]]
    # (adapter, state) -> what is added to the loss, [], and metrics []
    track: Callable[[PyTree, PyTree], PyTree]  # (adapter, state) -> state, once a step
    measure: Callable[[PyTree, Mapping[str, Array]], PyTree] | None
    # (state, by site the sum [D, D] of x x^T over a batch) -> state, in one more pass over a task; None if not needed
    commit: Callable[[Key, PyTree, PyTree], tuple[PyTree, PyTree]]
    # (key, adapter, state) -> (adapter, state) at a task's end: the adapter is kept, and a new one begins; under `jit`
    # no one tells of a task too many, but `budget`
    placement: Placement  # whether x is what goes into the layer or what comes out of it
    tasks: int | None  # how many the state has room for; None is any number


def sites_of(params: PyTree, covers: Callable[[str], bool], placement: Placement) -> dict[str, Site]:
    """The sites whose kernels' paths, as "params/layers_0/query/kernel", `covers` holds for.

    Args:
        params: a network's parameters, or their shapes; kernels are [I, O].
        covers: whether the kernel of a path has an adapter.
        placement: see `Site`.

    Raises:
        ValueError: no path matches, or one that does is not of rank 2.
    """
    shapes = leaves_by_path(params)
    chosen = leaves_by_path(select_paths(params, covers, argument="covers"))
    covered = [path for path in chosen if chosen[path]]
    if wrong := {path: shapes[path].shape for path in covered if len(shapes[path].shape) != 2}:
        raise bad_argument("covers", f"leaves of shapes {wrong}", "choose kernels [inputs, outputs], as of nn.Dense")
    return {
        path: Site(shapes[path].shape[0] if placement == "parallel" else shapes[path].shape[1], shapes[path].shape[1])
        for path in covered
    }


def added(change: Change, x: Array) -> Array:
    """What a change [D, E] adds to a layer's outputs, [..., E], given x [..., D]."""
    rows = x.reshape(-1, x.shape[-1])  # gradients of few ranks are twice as fast from matrices, on CPUs
    found = jnp.matmul(jnp.matmul(rows, change.down.astype(x.dtype)), change.up.astype(x.dtype))
    if change.past is not None:
        found += jnp.matmul(rows, change.past.astype(x.dtype))
    return found.reshape(*x.shape[:-1], -1)


def layer_function(changes: Mapping[str, Change], placement: Placement) -> LayerFunction:
    """The function that a network passes its layers' inputs and outputs through to have changes in them.

    Raises:
        ValueError: another placement.
    """
    check_choice("placement", placement, get_args(Placement))

    def function(path: str, inputs: Array, outputs: Array) -> Array:
        if path not in changes:
            return outputs
        x = inputs if placement == "parallel" else outputs
        return outputs + added(changes[path], x).astype(outputs.dtype)  # which may be narrower than the inputs'

    return function


def merge(params: PyTree, changes: Mapping[str, Change], placement: Placement) -> PyTree:
    """The network's parameters with changes merged into its kernels [I, O] and biases [O].

    It answers as the network with the changes beside it, at no cost of theirs; both kinds are linear. Sequential ones
    change biases too, which lie beside their kernels: "bias" where the site is "kernel", "b" where it is "w".

    Raises:
        ValueError: another placement; a site that the parameters have not, of another shape, or whose bias cannot be
            told.
    """
    check_choice("placement", placement, get_args(Placement))
    leaves, merged = leaves_by_path(params), {}
    if unknown := changes.keys() - leaves.keys():
        raise bad_argument("changes", f"sites {sorted(unknown)}", f"choose from {sorted(leaves)}")
    for path, change in changes.items():
        both = product(change.down, change.up) + (0 if change.past is None else change.past)
        kernel = leaves[path].shape
        if both.shape != (kernel if placement == "parallel" else 2 * kernel[-1:]):
            given = f"{path} of shape {both.shape}, {placement} to a kernel of {kernel}"
            raise bad_argument("changes", given, "pass those that were made for these parameters")
        if placement == "parallel":
            merged[path] = leaves[path] + both.astype(leaves[path].dtype)
            continue
        folder, slash, name = path.rpartition("/")
        if name not in _BIASES:
            raise bad_argument("changes", f"site {path!r}", f"name kernels as one of {sorted(_BIASES)}, to find biases")
        for own in (path, folder + slash + _BIASES[name]):
            if own in leaves:
                merged[own] = leaves[own] + product(leaves[own], both).astype(leaves[own].dtype)
    return replace_leaves(params, merged)


def product(left: Array, right: Array) -> Array:
    """The matrix product of [..., D] and [D, E] in float32 all through."""
    found: Array = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return found


def second_moments(x: Array, weights: Array | None = None) -> Array:
    """The sum [D, D] of x x^T over all vectors of x [..., D], each counted `weights` [...] times, or once."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weighted = flat if weights is None else flat * weights.reshape(-1, 1)
    return product(weighted.T, flat)


def no_metrics(adapter: PyTree, state: PyTree) -> tuple[Array, dict[str, Any]]:
    """The penalty [] of a method that has none."""
    return jnp.float32(0), {}


def same_state(adapter: PyTree, state: PyTree) -> PyTree:
    """The `track` of a method that follows nothing."""
    return state
