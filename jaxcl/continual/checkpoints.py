"""Checkpoints of a run, by Orbax: written in the background, whole or not at all, and the run's exact continuation."""

import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxcl.continual.sharding import Layout
from jaxcl.typing import ArrayLike, PyTree, bad_argument, check_at_least, check_count


class Checkpoint(NamedTuple):
    """Where a run keeps its state, and how often it does."""

    folder: Path  # the same for all processes; made if need be
    every_seconds: float = 60.0  # so much is lost at most when the run is killed; 0 saves after every call
    keep: int = 2  # the newest ones


# Orbax counts saves in a global: those of two threads must not overlap, nor what they write in the background.
_SAVING = threading.Lock()


_MAKE_ROOM = (
    "earlier checkpoints are as they were: make room or give leave to write there, and start the same command again"
)


class Checkpoints:
    """The checkpoints of one seed, or of seeds that share each step.

    Args:
        checkpoint: where and how often.
        name: of the folder within it.
        identity: what the run is, as plain data: a folder that holds another run is refused.
        alone: whether no other thread saves at the same time.

    Raises:
        ValueError: a checkpoint that keeps nothing, or whose seconds are below 0.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, identity: dict[str, Any], *, alone: bool) -> None:
        check_count("checkpoint.keep", checkpoint.keep, 1)
        check_at_least("checkpoint.every_seconds", checkpoint.every_seconds, 0)
        self._folder, self._every, self._identity = Path(checkpoint.folder) / name, checkpoint.every_seconds, identity
        self._alone = alone
        with self._clear("make"):
            options = ocp.CheckpointManagerOptions(max_to_keep=checkpoint.keep)
            self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)
        self._saved = time.monotonic()

    def restore(self, state: PyTree, layout: Layout) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest state, laid out, and the record saved with it; None where there is none.

        Args:
            state: its shapes and dtypes.
            layout: where it will lie.

        Raises:
            ValueError: the folder holds another run.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return None
        remedy = f"choose another folder, or delete {self._folder / str(newest)} to go on from the one before"
        with self._clear("read", remedy):
            found = self._manager.restore(newest, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        plain = jax.eval_shape(_plain, state)
        was, now = found["identity"], self._identity | _described(plain)
        other = [name for name in now | was if was.get(name) != now.get(name)][:3]
        if other:
            told = ", ".join(f"{name}: {was.get(name)} (now {now.get(name)})" for name in other)
            raise bad_argument("checkpoint.folder", f"{self._folder}, of a run with {told}", "choose another folder")

        def wanted(plain: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct) -> Any:
            sharding = layout.of_state(leaf.shape)
            if sharding is None:
                return np.empty(plain.shape, plain.dtype)
            return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)

        with self._clear("read", remedy):
            items = ocp.args.Composite(state=ocp.args.StandardRestore(_named(jax.tree.map(wanted, plain, state))))
            saved = self._manager.restore(newest, args=items).state
        return _unplain(_filled(plain, saved, layout), state), found["record"]

    def due(self) -> bool:
        """Whether it is time to save; the same answer in every process."""
        due = time.monotonic() - self._saved >= self._every
        if jax.process_count() > 1:
            due = bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
        return due

    def save(self, state: PyTree, record: dict[str, Any]) -> None:
        """Begins to write the state and a record of plain data; waits for the one before.

        The state may be consumed, and the record changed, as soon as this returns.
        """
        # Writing goes on in the background, from memory that the next step would overwrite: so from copies.
        copy = jax.tree.map(jnp.copy, _plain(state))
        document = {"identity": self._identity | _described(copy), "record": deepcopy(record)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_named(copy)), record=ocp.args.JsonSave(document))
        with self._clear("write"), _SAVING:
            self._manager.save((self._manager.latest_step() or 0) + 1, args=items, force=True)
            if not self._alone:
                self._manager.wait_until_finished()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Waits until all is written."""
        with self._clear("write"):
            self._manager.wait_until_finished()
            self._manager.close()

    def _clear(self, verb: str, remedy: str = _MAKE_ROOM) -> "_ClearError":
        return _ClearError(f"cannot {verb} checkpoints in {self._folder}", remedy)


class _ClearError:
    """Turns whatever goes wrong with files into one OSError that says where, why, and what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        self._what, self._remedy = what, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            why = str(error).strip().splitlines()
            raise OSError(f"{self._what}: {type(error).__name__}: {why[0] if why else ''}; {self._remedy}") from None


def _plain(state: PyTree) -> PyTree:
    """The state with the bits of typed keys in place of the keys."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _unplain(plain: PyTree, state: PyTree) -> PyTree:
    def typed(bits: jax.Array, leaf: Any) -> jax.Array:
        return (
            jax.random.wrap_key_data(bits, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))
            if _is_key(leaf)
            else bits
        )

    return jax.tree.map(typed, plain, state)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, without those of size zero, which Orbax refuses."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}


def _described(tree: PyTree) -> dict[str, str]:
    """The leaves' dtypes and shapes by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _filled(tree: PyTree, leaves: dict[str, ArrayLike], layout: Layout) -> PyTree:
    """`tree` with the leaves of those names, and empty ones where there are none, as a run that begins lays them."""

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        found = leaves[jax.tree_util.keystr(path)] if leaf.size else np.empty(leaf.shape, leaf.dtype)
        return found if isinstance(found, jax.Array) else layout.place_state(found)

    return jax.tree_util.tree_map_with_path(fill, tree)
