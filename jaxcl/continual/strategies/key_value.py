"""The discrete key-value bottleneck in training: only the fetched values learn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.bottleneck import (
    Bottleneck,
    KeyCare,
    KeyPolicy,
    KeyState,
    Reference,
    care_for_keys,
    pair_numbers,
    sample_pairs,
    vote,
)
from jaxcl.continual.strategies.contract import Apply, Batch, Metrics, Strategy, cross_entropy
from jaxcl.trees import Rows
from jaxcl.typing import Array, Key, PyTree, check_at_least, check_between, check_count

_LOGGED = 256  # checks of keys that a state remembers


class Momentum(NamedTuple):
    """Momentum of a table of which few rows change a step, brought up to date only where it is read."""

    velocity: Array  # [C, J, V], as of the step a pair was last fetched
    touched: Array  # [C, J] int32, that step
    step: Array  # [] int32, steps taken


class CaredKeys(NamedTuple):
    """Keys that are cared for while values learn."""

    keys: KeyState  # its usage counts what training fetched
    reference: Reference
    checks: Array  # [] int32, so far
    log: KeyCare  # with [256] before each leaf's shape, what the newest checks found and did: see `key_decisions`
    placed: Array  # [C] int32, keys placed so far
    values: PyTree  # what `key_value_bottleneck` keeps


def key_value_bottleneck(
    bottleneck: Bottleneck,
    *,
    classes: int | None = None,
    decoder: Apply | None = None,
    train_decoder: bool = False,
    label_smoothing: float = 0.1,
    momentum: float = 0.0,
) -> Strategy:
    """The values of a discrete key-value bottleneck learn, on indices looked up beforehand, and are decoded.

    Inputs are indices [B, C, top_k], or [B, P, C, top_k] for P positions of a feature map (any integer dtype; see
    `streams.map_inputs`), params the bottleneck's. Gradients are `trees.Rows`, so the optimizer is
    `bottleneck.sparse_sgd`; equal to the dense rule, at the cost of the rows.

    By default values vote (`bottleneck.vote`, and the mean over positions). Another decoder is a network, such as
    `nets.MLP` of all values laid side by side, linear if it has no hidden layer: pass its `apply`, and its parameters
    as ``params["decoder"]``. The authors leave it as it was drawn; trained, it forgets as any network does. Behind
    hidden layers values must not start at zero, where their gradient is zero too.

    Momentum would move every value at every step. But a value that is not fetched coasts: under velocity w, the sum of
    past updates decayed by mu a step, it will come to rest at q = p + mu w / (1 - mu), and an update u moves q by
    u / (1 - mu) and nothing else does. So the table holds q, and a fetched row's p follows from q and its own w. The
    learning rate must be constant.

    Args:
        bottleneck: what `bottleneck.discrete_key_value_bottleneck` made.
        classes: K, where values that vote are wider than that and the rest of them is padding; None takes V.
        decoder: (params, values [B, ..., C, top_k, V]) -> logits [B, K]; None lets values vote.
        train_decoder: whether it learns with the values.
        label_smoothing: see `cross_entropy`; 0.1 is published.
        momentum: mu of the values, from 0 to below 1; the published recipe has none, and a decoder gets none.
    """
    check_between("label_smoothing", label_smoothing, 0, 1)
    check_between("momentum", momentum, 0, 1 - 1e-6)
    coasting = momentum / (1 - momentum)

    def numbers_of(state: PyTree, params: PyTree, indices: Array) -> Array:
        return pair_numbers(indices, params["values"].shape[1])

    def velocity_at(state: Momentum, numbers: Array) -> Array:
        width = state.velocity.shape[-1]
        age = state.step - state.touched.reshape(-1)[numbers]
        return state.velocity.reshape(-1, width)[numbers] * momentum ** age[..., None].astype(jnp.float32)

    def fetch(params: PyTree, state: PyTree, indices: Array) -> Array:
        values = bottleneck.read(params, indices)
        if momentum:
            values -= coasting * velocity_at(state, numbers_of(state, params, indices))
        return values

    def answer(decoder_params: PyTree, values: Array) -> Array:
        if decoder:
            return decoder(decoder_params if train_decoder else lax.stop_gradient(decoder_params), values)
        if classes is not None:
            check_between("classes", classes, 1, values.shape[-1])
        votes = vote(values)[..., :classes]
        return votes.reshape(len(votes), -1, votes.shape[-1]).mean(axis=1)

    def init(key: Key, params: PyTree, batch: Batch) -> PyTree:
        if not momentum:
            return ()
        values = params["values"]
        return Momentum(jnp.zeros_like(values), jnp.zeros(values.shape[:2], jnp.int32), jnp.int32(0))

    def gradients(key: Key, params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, Metrics]:
        def loss(learned: PyTree) -> tuple[Array, Metrics]:
            logits = answer(learned.get("decoder"), learned["values"])
            return cross_entropy(logits, batch, label_smoothing=label_smoothing)

        learned = params | {"values": fetch(params, state, batch.inputs)}
        grads, metrics = jax.grad(loss, has_aux=True)(learned)
        return grads | {"values": Rows(numbers_of(state, params, batch.inputs), grads["values"])}, metrics

    def after_update(
        key: Key, params: PyTree, state: PyTree, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        if not momentum:
            return updates, state
        numbers, change = updates["values"]
        state = state._replace(step=state.step + 1)
        velocity = state.velocity.reshape(-1, change.shape[-1])
        # Rows fetched twice in a batch are set twice to the same decayed velocity, then each update is added.
        velocity = velocity.at[numbers].set(velocity_at(state, numbers)).at[numbers].add(change)
        touched = state.touched.reshape(-1).at[numbers].set(state.step).reshape(state.touched.shape)
        state = state._replace(velocity=velocity.reshape(state.velocity.shape), touched=touched)
        return updates | {"values": Rows(numbers, change / (1 - momentum))}, state

    def predict(params: PyTree, state: PyTree, inputs: Array, task: Array | None) -> Array:
        return answer(params.get("decoder"), fetch(params, state, inputs))

    return Strategy(gradients, predict, init, after_update=after_update)


def cared_key_value_bottleneck(
    bottleneck: Bottleneck,
    keys: KeyState,
    reference: Reference,
    *,
    refresh_every: int,
    policy: KeyPolicy = KeyPolicy(),  # noqa: B008  # it does not change
    temperature: float = 0.0,
    classes: int | None = None,
    label_smoothing: float = 0.1,
) -> Strategy:
    """As `key_value_bottleneck`, but on features, and with `bottleneck.care_for_keys` as data drift.

    Inputs are features [B, D]: as keys may be placed, indices are looked up in every step, which costs far more than
    the step. What training fetches is counted, and every so many steps the last batch is held against the reference;
    `key_decisions` tells what came of it.

    Args:
        bottleneck: what `bottleneck.discrete_key_value_bottleneck` made.
        keys: fitted.
        reference: what `bottleneck.reference_distances` made when they were.
        refresh_every: steps from one check of the keys to the next; 0 never cares.
        policy: see `bottleneck.care_for_keys`.
        temperature: 0 trains what the nearest keys fetch; above, keys are drawn: see `bottleneck.sample_pairs`.
        classes: as in `key_value_bottleneck`.
        label_smoothing: as in `key_value_bottleneck`.
    """
    check_count("refresh_every", refresh_every, 0)
    check_at_least("temperature", temperature, 0)
    inner = key_value_bottleneck(bottleneck, classes=classes, label_smoothing=label_smoothing)

    def care(
        key: Key, params: PyTree, keys: KeyState, reference: Reference, batch: Batch
    ) -> tuple[PyTree, KeyState, KeyCare]:
        real = batch.weights > 0  # the others only fill up
        return care_for_keys(key, bottleneck, params, keys, reference, batch.inputs, mask=real, policy=policy)

    def init(key: Key, params: PyTree, batch: Batch) -> CaredKeys:
        _, _, entry = jax.eval_shape(care, key, params, keys, reference, batch)
        log = jax.tree.map(lambda leaf: jnp.zeros((_LOGGED, *leaf.shape), leaf.dtype), entry)
        placed = jnp.zeros(keys.usage.shape[:1], jnp.int32)
        return CaredKeys(keys, reference, jnp.int32(0), log, placed, inner.init(key, params, batch))

    def gradients(key: Key, params: PyTree, state: CaredKeys, batch: Batch) -> tuple[PyTree, Metrics]:
        if temperature:
            indices = sample_pairs(key, bottleneck, state.keys, batch.inputs, temperature=temperature)
        else:
            indices = bottleneck.lookup(params, state.keys, batch.inputs)
        return inner.gradients(key, params, state.values, batch._replace(inputs=indices))

    def after_update(
        key: Key, params: PyTree, state: CaredKeys, batch: Batch, grads: PyTree, updates: PyTree
    ) -> tuple[PyTree, CaredKeys]:
        indices = grads["values"].numbers % state.keys.usage.shape[1]  # what `gradients` looked up
        real = jnp.where(batch.weights[:, None, None] > 0, indices, -1)  # rows that only fill up do not count
        return updates, state._replace(keys=bottleneck.count_usage(state.keys, real))

    def refresh(key: Key, params: PyTree, state: CaredKeys, batch: Batch) -> tuple[PyTree, CaredKeys]:
        params, cared, done = care(key, params, state.keys, state.reference, batch)
        log = jax.tree.map(lambda log, entry: log.at[state.checks % _LOGGED].set(entry), state.log, done)
        return params, state._replace(keys=cared, checks=state.checks + 1, log=log, placed=state.placed + done.placed)

    def predict(params: PyTree, state: CaredKeys, inputs: Array, task: Array | None) -> Array:
        return inner.predict(params, state.values, bottleneck.lookup(params, state.keys, inputs), task)

    return Strategy(gradients, predict, init, after_update=after_update, refresh=refresh, refresh_every=refresh_every)


def key_decisions(state: CaredKeys) -> list[tuple[int, KeyCare]]:
    """What the newest 256 checks of the keys found and did, the oldest first, each with its number, counted from 0.

    `bottleneck.describe_care` says it in words.
    """
    log = jax.tree.map(np.asarray, state.log)
    numbers = range(max(0, int(state.checks) - _LOGGED), int(state.checks))
    return [(number, jax.tree.map(lambda leaf: leaf[number % _LOGGED], log)) for number in numbers]  # noqa: B023
