"""How a run lies on several devices: batches split over one axis of a mesh, parameters over another."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl.typing import ArrayLike, Key, PyTree, bad_argument

DATA, MODEL = "data", "model"


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        axes: sizes of the axes "data" (over which batches are split) and "model" (over which parameters are); one that
            is left out has size 1.

    Raises:
        ValueError: an axis of another name, or sizes whose product is not the number of devices.
    """
    unknown = set(axes) - {DATA, MODEL}
    if unknown:
        raise bad_argument("mesh", dict(axes), f"name its axes {DATA} and {MODEL}")
    sizes = axes.get(DATA, 1), axes.get(MODEL, 1)
    if min(sizes) < 1 or np.prod(sizes) != jax.device_count():
        raise bad_argument(
            "mesh", dict(axes), f"the product of its axes must be the number of devices, here {jax.device_count()}"
        )
    return Mesh(np.asarray(jax.devices()).reshape(sizes), (DATA, MODEL))


class Layout(NamedTuple):
    """Where arrays lie on a mesh; without a mesh, all on one device.

    A state's leaf is split over "model" along its longest axis that divides evenly (the last of several), if it has two
    axes or more, and lies whole on every device otherwise. A batch is split over "data".
    """

    mesh: Mesh | None = None

    def split_state(self, state: PyTree) -> PyTree:
        """The state, under `jit`, as `of_state` says."""
        if self.mesh is None:
            return state
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.of_state(leaf.shape)), state)

    def split_batch(self, batch: PyTree) -> PyTree:
        """A batch, leaves [B, ...], under `jit`, split over "data"."""
        if self.mesh is None:
            return batch
        return jax.lax.with_sharding_constraint(batch, self.named(DATA))

    def of_state(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """How a leaf of the state with this shape is split; None without a mesh."""
        if self.mesh is None:
            return None
        parts = self.mesh.shape.get(MODEL, 1)
        axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
        if parts == 1 or len(shape) < 2 or 0 in shape or not axes:
            return self.named()
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return self.named(*(MODEL if axis == longest else None for axis in range(len(shape))))

    def named(self, *axes: str | None) -> NamedSharding | None:
        """The sharding with these mesh axes along an array's leading axes; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def place_state(self, state: PyTree) -> PyTree:
        """A copy of a state, the same in every process, on the devices."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        return jax.tree.map(lambda leaf: _spread(leaf, self.of_state(leaf.shape)), state)

    def place_key(self, key: Key) -> Key:
        """Keys, the same in every process, on the devices."""
        if self.mesh is None:
            return key
        bits, implementation = self.place(np.asarray(jax.random.key_data(key))), jax.random.key_impl(key)
        return jax.jit(lambda bits: jax.random.wrap_key_data(bits, impl=implementation))(bits)

    def place(self, tree: PyTree, *axes: str | None) -> PyTree:
        """Host arrays, the same in every process, on the devices, split by `named(*axes)`."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda leaf: _spread(leaf, self.named(*axes)), tree)

    def own_columns(self, shape: tuple[int, int]) -> dict[int, slice]:
        """The parts, by their first, of the second axis of an array split over "data" that this process holds."""
        sharding: Any = self.named(None, DATA)
        if sharding is None:
            return {0: slice(0, shape[1])}
        parts = [index[1] for index in sharding.addressable_devices_indices_map(shape).values()]
        return {part.start or 0: part for part in parts}

    def join_columns(self, pieces: Mapping[int, PyTree], shape: tuple[int, int]) -> PyTree:
        """The arrays [*shape, ...] whose own columns are `pieces`, by their first; a scalar is whole in every piece."""

        def join(*leaves: Any) -> Any:
            if not leaves[0].ndim:
                return self.place(leaves[0])
            if self.mesh is None:
                return jnp.asarray(leaves[0])
            by_start = dict(zip(pieces, leaves, strict=True))
            sharding: Any = self.named(None, DATA)

            def piece(at: Any) -> np.ndarray:
                return by_start[at[1].start or 0]

            return jax.make_array_from_callback((*shape, *leaves[0].shape[2:]), sharding, piece)

        return jax.tree.map(join, *pieces.values())


def _spread(leaf: ArrayLike, sharding: Any) -> jax.Array:
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
