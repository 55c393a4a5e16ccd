"""How a parameter tree lies in blocks of equal width: values shared by hashing, shuffled, and cut.

All of it follows from a seed and from the paths, shapes and numbers of values of the leaves, by integers alone.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import threefry, trees
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_between

# Second words of keys, where those of candidates have the number of a block, which stays below
_SHUFFLE = 0xFFFFFFFF
_HASH = 0xFFFFFFFE
_SIZES = 2**31 - 1  # places are int32
_PATH, _DEPTH, _AXES = 1000, 64, 32  # of a leaf: characters, dicts, axes


class Leaf(NamedTuple):
    """One parameter."""

    path: str  # its keys joined by "/"
    shape: tuple[int, ...]
    values: int  # that are kept: each serves about size / values weights

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Layout(NamedTuple):
    """A tree in M blocks of W values; what fills the last block belongs to no leaf."""

    leaves: tuple[Leaf, ...]
    width: int  # W
    seed: int  # in [0, 2^32)

    @property
    def blocks(self) -> int:
        """M."""
        return -(-sum(leaf.values for leaf in self.leaves) // self.width)

    @property
    def weights(self) -> int:
        """Of all leaves."""
        return sum(leaf.size for leaf in self.leaves)


def layout_of(params: PyTree, *, width: int, seed: int = 0, values: Mapping[str, int] | None = None) -> Layout:
    """The layout of a tree of nested dicts.

    Args:
        params: leaves of floats, of any shape; files hold, and give back, float32.
        width: W, values of a block.
        seed: of the shuffle and of what shares a value, in [0, 2^32).
        values: by path, how many values a leaf keeps, where that is fewer than it has weights: the hashing trick (Chen
            et al. 2015, arXiv 1504.04788), here with values that serve equally many weights, but for one.

    Raises:
        ValueError: a tree of something else, a leaf without weights or not of floats, a path that the tree has not, or
            numbers out of range.
    """
    given_leaves = trees.leaves_by_path(params)
    for path, leaf in given_leaves.items():
        if not jnp.issubdtype(kind := jnp.result_type(leaf), jnp.floating):
            raise bad_argument("params", f"{path} of {kind}", "only leaves of floats are coded: leave it out")
    shapes = {path: jnp.shape(leaf) for path, leaf in given_leaves.items()}
    kept = dict(values or {})
    if unknown := kept.keys() - shapes.keys():
        raise bad_argument("values", f"paths {sorted(unknown)}", f"choose from {sorted(shapes)}")
    leaves = tuple(Leaf(path, shape, kept.get(path, math.prod(shape))) for path, shape in shapes.items())
    found = Layout(leaves, width, seed)
    check_layout(found)
    decoded, given = (str(jax.tree.structure(tree)) for tree in (nested(given_leaves), params))
    if decoded != given:
        raise bad_argument("params", given, "pass nested dicts whose keys have no '/'")
    return found


def check_layout(layout: Layout) -> None:
    """Raises ValueError if a leaf has no weights, an odd path or one below another's, or a number is out of range."""
    for leaf in layout.leaves:
        if not leaf.path.isprintable() or len(leaf.path) > _PATH or leaf.path.count("/") > _DEPTH:
            fix = f"paths are printable, and have up to {_PATH} characters and {_DEPTH} levels: rename it"
            raise bad_argument("params", repr(leaf.path[:_PATH]), fix)
    paths = sorted(leaf.path.split("/") for leaf in layout.leaves)
    for path, next_path in itertools.pairwise(paths):
        if path == next_path[: len(path)]:
            raise bad_argument(
                "params", f"paths {'/'.join(path)} and {'/'.join(next_path)}", "one cannot hold the other"
            )
    check_between("width", layout.width, 1, _SIZES)
    check_between("seed", layout.seed, 0, 2**32 - 1)
    for leaf in layout.leaves:
        if 0 in leaf.shape:
            raise bad_argument("params", f"{leaf.path} of shape {leaf.shape}", "leave out what has no weights")
        if len(leaf.shape) > _AXES or not all(1 <= size < 1 << 31 for size in leaf.shape):
            raise bad_argument("params", f"{leaf.path} of shape {leaf.shape}", f"reshape it to {_AXES} axes or fewer")
        check_between(f"values[{leaf.path!r}]", leaf.values, 1, leaf.size)
    check_between("weights", max(layout.weights, layout.blocks * layout.width), 1, _SIZES)


class Places(NamedTuple):
    """Where everything of a layout lies."""

    of_weights: dict[str, np.ndarray]  # by path, int32 [...]: the place of each weight's value among all M W
    leaf: np.ndarray  # [M, W] int32, the number of the leaf to which the value in a place belongs


@functools.lru_cache(1)
def places(layout: Layout) -> Places:
    """Where the weights and values of a layout lie, to be read only. What fills the last block is the last leaf's."""
    total = layout.blocks * layout.width
    order = _permutation(layout.seed, _SHUFFLE, 0, total)
    of_weights, leaf_of, start = {}, np.full(total, len(layout.leaves) - 1, np.int32), 0
    for number, leaf in enumerate(layout.leaves):
        own = order[start : start + leaf.values]
        leaf_of[own] = number
        shared = leaf.values < leaf.size
        which = _permutation(layout.seed, _HASH, number, leaf.size) % leaf.values if shared else np.arange(leaf.size)
        of_weights[leaf.path] = own[which].reshape(leaf.shape)
        start += leaf.values
    return Places(of_weights, leaf_of.reshape(layout.blocks, layout.width))


def _permutation(seed: int, purpose: int, number: int, size: int) -> np.ndarray:
    """A random order int32 [size] of so many things."""
    key = (np.full(1, seed, np.uint32), np.full(1, purpose, np.uint32))
    first, second = threefry.threefry_2x32(key, (np.arange(size, dtype=np.uint32), np.full(1, number, np.uint32)))
    return np.argsort(first.astype(np.uint64) << 32 | second, kind="stable").astype(np.int32)


def tree_of_values(of_weights: Mapping[str, ArrayLike], values: Array) -> dict[str, Any]:
    """The nested dicts whose leaves [...] have the values [M, W] of a layout; differentiable.

    Args:
        of_weights: of `Places`, on the device if it is to be fast.
        values: in blocks, [M, W].
    """
    flat = values.reshape(-1)
    return nested({path: flat[place] for path, place in of_weights.items()})


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of leaves [...] by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
