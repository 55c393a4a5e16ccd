"""The discrete key-value bottleneck: class-incremental learning with no task boundaries (Träuble et al., ICML 2023).

A frozen encoder's feature is projected into many heads; in each, the nearest of the codebook's keys fetches its value;
the values vote. Keys are fitted once, without labels, and never move again: only the values that an example fetches
learn from it, so that what other examples learned stays. As neither encoder nor keys move, the pairs an example
fetches never change: look them up once, keep the indices, and train on those.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import nearest_codes, nearest_k_codes, squared_distances
from jaxcl.quantize import (
    NO_CODE,
    EMAState,
    draw_replacements,
    initial_averages,
    place_codes,
    replace_codes,
    update_averages,
    usage,
)
from jaxcl.quantize.contract import usable
from jaxcl.typing import (
    Array,
    Key,
    PyTree,
    bad_argument,
    check_between,
    check_choice,
    check_count,
    check_rank,
    check_width,
)


class KeyState(NamedTuple):
    """What a bottleneck keeps beside its values: none of it learns by gradients."""

    projection: Array | None  # [C, D, W], drawn with columns of unit length; None where features are cut into chunks
    keys: EMAState  # codebook [C, J, W], counts [C, J], sums [C, J, W]
    active: Array  # [C, J] bool, keys in play; the others are spare, for `care_for_keys` to wake
    usage: Array  # [C, J] int32, how often each pair was fetched, as far as `count_usage` was told


class _Place(Protocol):
    def __call__(
        self,
        key: Key,
        params: PyTree,
        state: KeyState,
        features: Array,
        *,
        iterations: int = 0,
        axis_name: str | None = None,
    ) -> KeyState: ...


class _FitKeys(Protocol):
    def __call__(
        self, key: Key, params: PyTree, state: KeyState, features: Array, *, axis_name: str | None = None
    ) -> KeyState: ...


class _Lookup(Protocol):
    def __call__(self, params: PyTree, state: KeyState, features: Array, *, used_only: bool = False) -> Array: ...


class Bottleneck(NamedTuple):
    """A discrete key-value bottleneck: pure functions over params ``{"values": [C, J, V]}`` and a `KeyState`."""

    init: Callable[[Key], tuple[PyTree, KeyState]]  # (key) -> (params, state)
    heads: Callable[[KeyState, Array], Array]  # (state, features [..., D]) -> [C, N, W], leading axes flattened
    place: _Place  # (key, params, state, features [..., D], *, iterations, axis_name) -> state
    fit_keys: _FitKeys  # (key, params, state, features [..., D], *, axis_name) -> state
    lookup: _Lookup  # (params, state, features [..., D], *, used_only) -> indices [..., C, top_k] int32
    distances: Callable[[KeyState, Array, Array], Array]
    # (state, features [..., D], indices [..., C, top_k]) -> [..., C], squared, of each head to the first key it fetched
    read: Callable[[PyTree, Array], Array]  # (params, indices [..., C, top_k]) -> values [..., C, top_k, V]
    count_usage: Callable[[KeyState, Array], KeyState]  # (state, indices [..., C, top_k]) -> state


def discrete_key_value_bottleneck(
    feature_width: int,
    value_width: int,
    *,
    codebooks: int = 256,
    pairs: int = 4096,
    key_width: int = 14,
    top_k: int = 1,
    spare: int = 0,
    projection: Literal["random", "chunk"] = "random",
    decay: float = 0.95,
    dead_share: float = 0.1,
    averages: Literal["sound", "authors"] = "sound",
) -> Bottleneck:
    """The bottleneck of Träuble et al. 2023; the defaults are the published ones for CIFAR-10.

    * `init` draws the projection and N(0, 1) keys and sets the values to zero.
    * `place` puts keys on distinct heads, chosen at random, and moves them by k-means over all of these features at
      once, so many iterations long; it can stand in for `fit_keys`, or come before it, and then counts as one head a
      key. Both leave out features with NaN or infinity in them.
    * `fit_keys` is one unsupervised step on a batch: keys become moving averages of the heads that chose them, and keys
      chosen too rarely are put on heads of the batch. The key of randomness must be equal on all devices of
      `axis_name`. Call it some epochs long, in any order, on features from any source; then leave the keys alone.
    * `heads` and `distances` tell where features lie, and how far from the keys that `lookup` found.
    * `lookup` is the expensive part. `used_only` leaves out pairs whose `usage` is 0. (The authors give such pairs the
      smallest score found in the call, which depends on the batch; here they cannot win against a used one.)
    * `read` fetches values. It is differentiable, and its gradient dense; `continual.key_value_bottleneck` shows how
      the fetched rows alone learn.
    * `count_usage` adds to `usage`.

    Leading axes of features are free: batches [B, D], or positions of a feature map [B, P, D]. Call `fit_keys` and
    `lookup` under `jit`: outside it they compile on every call.

    Args:
        feature_width: D.
        value_width: V; the number of classes where the values vote, or more: a row of 16 floats is one cache line, and
            where the table is larger than the cache it is trained 1.4 times as fast as one of 10 (measured on CPU).
        codebooks: C.
        pairs: J, at most 65,536 so that indices fit 16 bits.
        key_width: W.
        top_k: pairs fetched in each codebook.
        spare: how many of the J pairs are left out of play until `care_for_keys` wakes them.
        projection: "random" multiplies by a fixed Gaussian matrix with columns of unit length; "chunk" cuts a feature
            of width C * W into C pieces.
        decay: of the keys' moving averages, a step.
        dead_share: a key whose average count falls under this share of an even load is replaced; 0 replaces none.
        averages: "sound" starts counts and sums at zero, leaves a key that nothing chose in its place, and resets the
            averages of a replaced key to an even load. "authors" is the authors' code: sums start at the random keys
            and counts at zero, so a key that nothing chose leaves for infinity and the others are dragged by their
            start for many steps; counts are smoothed by 1e-5; the even load is that of the batch, which the counts
            only reach after many steps; and replaced keys keep the averages of the dead ones. (The authors may also
            give two of them the same head; here heads are distinct.)

    Raises:
        ValueError: a size below 1, more than 65,536 pairs, `top_k` above those in play, chunks that do not fit, an
            option unknown; in use, features of another width.
    """
    _check_sizes(feature_width, value_width, codebooks, pairs, key_width, top_k, spare, projection)
    check_choice("averages", averages, ("sound", "authors"))
    check_between("decay", decay, 0, 1)
    check_between("dead_share", dead_share, 0, 1)

    def init(key: Key) -> tuple[PyTree, KeyState]:
        projection_key, keys_key = jax.random.split(key)
        matrix = None
        if projection == "random":
            matrix = jax.random.normal(projection_key, (codebooks, feature_width, key_width))
            matrix /= jnp.linalg.norm(matrix, axis=1, keepdims=True)
        keys = jax.random.normal(keys_key, (codebooks, pairs, key_width))
        state = jax.vmap(lambda codebook: initial_averages(codebook, 0.0))(keys)
        if averages == "authors":
            state = state._replace(sums=keys)
        params = {"values": jnp.zeros((codebooks, pairs, value_width))}
        active = jnp.broadcast_to(jnp.arange(pairs) < pairs - spare, (codebooks, pairs))
        return params, KeyState(matrix, state, active, jnp.zeros((codebooks, pairs), jnp.int32))

    def heads(state: KeyState, features: Array) -> Array:
        """[C, N, W] from features [..., D]."""
        check_width("features", features, feature_width, "the bottleneck")
        flat = lax.stop_gradient(features.reshape(-1, feature_width).astype(jnp.float32))
        if state.projection is None:
            return flat.reshape(-1, codebooks, key_width).swapaxes(0, 1)
        return jnp.einsum("nd,cdw->cnw", flat, state.projection, precision=lax.Precision.HIGHEST)

    def place(
        key: Key,
        params: PyTree,
        state: KeyState,
        features: Array,
        *,
        iterations: int = 0,
        axis_name: str | None = None,
    ) -> KeyState:
        placed = _place_keys(key, state.keys.codebook, heads(state, features), pairs - spare, iterations, axis_name)
        return state._replace(keys=jax.vmap(initial_averages)(placed, state.active))

    def fit_keys(
        key: Key, params: PyTree, state: KeyState, features: Array, *, axis_name: str | None = None
    ) -> KeyState:
        points, valid = usable(heads(state, features), None)
        indices = jnp.where(valid, _each_codebook(_nearest, points, state.keys.codebook, state.active), NO_CODE)
        epsilon = 0.0 if averages == "sound" else 1e-5

        def update(averages: EMAState, x: Array, indices: Array) -> EMAState:
            return update_averages(averages, x, indices, decay=decay, epsilon=epsilon, axis_name=axis_name)

        fitted = jax.vmap(update)(state.keys, points, indices)
        if dead_share > 0:
            fitted = _replace_dead(key, fitted, state.active, points, valid, dead_share, averages, axis_name)
        return state._replace(keys=fitted)

    def lookup(params: PyTree, state: KeyState, features: Array, *, used_only: bool = False) -> Array:
        eligible = state.active & (state.usage > 0) if used_only else state.active

        def search(x: Array, codebook: Array, eligible: Array) -> Array:
            if top_k == 1:
                return _nearest(x, codebook, eligible)[:, None]
            return nearest_k_codes(x, codebook, top_k, eligible=eligible)

        indices = _each_codebook(search, heads(state, features), state.keys.codebook, eligible)
        return indices.swapaxes(0, 1).reshape(*features.shape[:-1], codebooks, top_k)

    def distances(state: KeyState, features: Array, indices: Array) -> Array:
        nearest = indices[..., 0].reshape(-1, codebooks).T
        keys = state.keys.codebook[jnp.arange(codebooks)[:, None], nearest]
        return squared_distances(heads(state, features), keys).T.reshape(*features.shape[:-1], codebooks)

    def read(params: PyTree, indices: Array) -> Array:
        if indices.ndim < 2 or indices.shape[-2] != codebooks:
            shape = tuple(indices.shape)
            raise bad_argument("indices", f"shape {shape}", f"pass [..., {codebooks}, top_k], as `lookup` gives")
        table = jnp.asarray(params["values"]).reshape(-1, value_width)
        return table.at[pair_numbers(indices, pairs)].get(mode="promise_in_bounds")

    def count_usage(state: KeyState, indices: Array) -> KeyState:
        counts = jax.vmap(lambda fetched: usage(fetched, pairs), in_axes=-2)(indices)
        return state._replace(usage=state.usage + counts)

    return Bottleneck(init, heads, place, fit_keys, lookup, distances, read, count_usage)


def _place_keys(key: Key, keys: Array, points: Array, in_play: int, iterations: int, axis_name: str | None) -> Array:
    """Keys [C, J, W], the first `in_play` of each codebook on heads [C, N, W]."""

    def place(key: Key, codebook: Array, points: Array) -> Array:
        return place_codes(key, codebook, points, iterations=iterations, metric="euclidean", axis_name=axis_name)

    own_keys = jax.random.split(key, len(points))
    placed = _each_codebook(place, own_keys, keys[:, :in_play], points)
    return jnp.concatenate([placed, keys[:, in_play:]], axis=1)


def _check_sizes(
    feature_width: int,
    value_width: int,
    codebooks: int,
    pairs: int,
    key_width: int,
    top_k: int,
    spare: int,
    projection: str,
) -> None:
    for name, size in (
        ("feature_width", feature_width), ("value_width", value_width), ("codebooks", codebooks), ("pairs", pairs),
        ("key_width", key_width), ("top_k", top_k),
    ):  # fmt: skip
        check_count(name, size, 1)
    check_between("pairs", pairs, 1, 2**16)
    check_between("spare", spare, 0, pairs - 1)
    check_between("top_k", top_k, 1, pairs - spare)
    check_choice("projection", projection, ("random", "chunk"))
    if projection == "chunk" and feature_width != codebooks * key_width:
        raise bad_argument(
            "feature_width", feature_width, f"chunks need codebooks * key_width = {codebooks * key_width} features"
        )


def _replace_dead(
    key: Key,
    keys: EMAState,
    active: Array,
    points: Array,
    valid: Array,
    share: float,
    averages: str,
    axis_name: str | None,
) -> EMAState:
    """Puts active keys [C, J, W] whose count is under `share` of an even load on valid heads [C, N, W] of the batch."""
    in_play = active.sum(axis=1)
    even_load = keys.counts.sum(axis=1) / in_play  # of the averages, which take many steps to reach the batch's
    if averages == "authors":
        batch = points.shape[1] * (1 if axis_name is None else lax.axis_size(axis_name))
        even_load = batch / in_play
    dead = active & (keys.counts < share * even_load[:, None])
    draw = partial(draw_replacements, axis_name=axis_name)
    own_keys = jax.random.split(key, len(points))
    rows, dead = jax.vmap(lambda key, x, dead, valid: draw(key, x, dead, valid=valid))(own_keys, points, dead, valid)
    if averages == "authors":
        return keys._replace(codebook=jnp.where(dead[..., None], rows, keys.codebook))
    return jax.vmap(replace_codes)(keys, rows, dead, even_load)


@partial(jax.jit, static_argnames=("bottleneck", "batch_size"))
def fit_epoch(
    key: Key, bottleneck: Bottleneck, params: PyTree, state: KeyState, features: Array, *, batch_size: int
) -> KeyState:
    """One pass of `fit_keys` over features [N, D] in random order, in one compiled call.

    The rest of N / `batch_size` examples is left out of this pass. `batch_size` above N counts as N.
    """
    count = len(features)
    check_count("batch_size", batch_size, 1)
    check_count("features, their number", count, 1)
    batch_size = min(batch_size, count)
    steps = count // batch_size
    order_key, step_key = jax.random.split(key)
    order = jax.random.permutation(order_key, count)[: steps * batch_size].reshape(steps, batch_size)

    def step(state: KeyState, key_rows: tuple[Key, Array]) -> tuple[KeyState, None]:
        key, rows = key_rows
        return bottleneck.fit_keys(key, params, state, features[rows]), None

    return lax.scan(step, state, (jax.random.split(step_key, steps), order))[0]


def sample_pairs(key: Key, bottleneck: Bottleneck, state: KeyState, features: Array, *, temperature: float) -> Array:
    """Pairs drawn by their distance, in place of the nearest ones that `lookup` gives: [..., C, 1] int32.

    A pair's chance is in proportion to exp(-squared distance / temperature), by Gumbel's trick (the authors'
    `sample_codebook_temperature`). For training in which an example may fetch its neighbours' pairs too; all distances
    of a codebook, [N, J], exist at a time, on GPU of eight codebooks and on TPU of all.

    Args:
        key: decides; consumed.
        bottleneck: the layer.
        state: its keys.
        features: [..., D].
        temperature: above 0; towards it, the nearest pair alone.

    Raises:
        ValueError: a temperature of 0 or below.
    """
    check_between("temperature", temperature, 1e-30, float("inf"))
    codebooks = len(state.active)

    def draw(key: Key, x: Array, codebook: Array, active: Array) -> Array:
        distances = squared_distances(x[:, None], codebook)
        return jax.random.categorical(key, jnp.where(active, -distances / temperature, -jnp.inf))

    own_keys, heads = jax.random.split(key, codebooks), bottleneck.heads(state, features)
    drawn = _each_codebook(draw, own_keys, heads, state.keys.codebook, state.active)
    return drawn.T.reshape(*features.shape[:-1], codebooks, 1).astype(jnp.int32)


def pair_numbers(indices: Array, pairs: int) -> Array:
    """Rows of the table of values [C, J, V], its first two axes flattened, from indices [..., C, top_k]; int32."""
    return indices.astype(jnp.int32) + jnp.arange(indices.shape[-2], dtype=jnp.int32)[:, None] * pairs


def vote(values: Array) -> Array:
    """The voting decoder: the mean over codebooks of the sum over the fetched pairs, [..., C, top_k, V] -> [..., V].

    As the authors' code has it, without a softmax before the mean. For positions, take the mean over them too.
    """
    if values.ndim < 3:
        check_rank("values", values, 3)
    return values.sum(axis=-2).mean(axis=-2)


def _nearest(x: Array, codebook: Array, eligible: Array) -> Array:
    return nearest_codes(x, codebook, eligible=eligible)


def _each_codebook(search: Callable[..., Array], *args: Array) -> Array:
    """`search` on each codebook's share of `args` [C, ...].

    In turn on CPU, where one search fills the cores and its scores stay in cache (a third of the time, measured); eight
    at a time on GPU, where each keeps scores (not yet measured); all at once on TPU, whose compiler keeps none.
    """

    def in_turn(*args: Array, batch_size: int | None) -> Array:
        return lax.map(lambda one: search(*one), args, batch_size=batch_size)

    gpu = partial(in_turn, batch_size=8)
    return lax.platform_dependent(
        *args, cpu=partial(in_turn, batch_size=None), cuda=gpu, rocm=gpu, default=jax.vmap(search)
    )
