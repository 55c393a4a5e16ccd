"""Every strategy on a small stream, for tests of the loop's machinery: checkpoints, streamed examples, meshes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import adapters, bottleneck, continual, masks
from jaxcl.continual import Examples, Strategy, Stream, loop, streams
from jaxcl.continual.programs import Programs, compile_programs

CLASSES, WIDTH, CODEBOOKS, PAIRS = 4, 8, 8, 16


class Method(NamedTuple):
    strategy: Strategy
    tx: optax.GradientTransformation
    params: dict
    stream: Stream


def examples(seed, sizes, *, indices=False):
    """`sizes[c]` examples of class c in random order, near their class's mean; or what they fetch of a bottleneck."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(CLASSES), sizes)).astype(np.int32)
    if indices:
        fetched = (3 * labels[:, None, None] + random.integers(4, size=(len(labels), CODEBOOKS, 1))) % PAIRS
        return Examples(fetched.astype(np.uint16), labels)
    means = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    return Examples((means[labels] + random.normal(size=(len(labels), WIDTH))).astype(np.float32), labels)


def stream_of(*, told=False, indices=False, key=0, train=(5, 3, 7, 6), test=(3, 4, 2, 3)):
    """Two tasks of two classes, of unlike sizes, in an order of classes that the key decides."""
    make = streams.task_incremental if told else streams.class_incremental
    both = examples(0, train, indices=indices), examples(1, test, indices=indices)
    return make(jax.random.key(key), *both, classes_per_task=2)


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"] + params["bias"]


def network_params(seed=0, hidden=16):
    random = np.random.default_rng(seed)
    return {
        "first": jnp.asarray(random.normal(size=(WIDTH, hidden)) / 3, jnp.float32),
        "second": jnp.asarray(random.normal(size=(hidden, CLASSES)) / 4, jnp.float32),
        "bias": jnp.zeros(CLASSES),
    }


def table_params(seed=0):
    random = np.random.default_rng(seed)
    return {"values": jnp.asarray(random.normal(size=(CODEBOOKS, PAIRS, CLASSES)), jnp.float32)}


def made_up(refresh_every):
    """All members of a strategy, with dtypes and shapes in its state that no other has, all of them changing."""

    def init(key, params, batch):
        return {
            "key": key,
            "keys": jax.random.split(key, 8),
            "empty": jnp.zeros((0, 3)),
            "flags": jnp.zeros(CLASSES, bool),
            "int8": jnp.zeros((8, 2), jnp.int8),
            "bfloat16": jnp.zeros(WIDTH, jnp.bfloat16),
            "weak": 0.0,
            "count": jnp.int32(0),
        }

    def changed(state, add):
        mine, other = jax.random.split(state["key"])
        drawn = jax.random.key_data(other)[0].astype(jnp.float32) / 2.0**32
        return state | {
            "key": mine,
            "keys": state["keys"].at[state["count"] % 8].set(other),
            "int8": state["int8"].at[state["count"] % 8].add(jnp.int8(add)),
            "bfloat16": state["bfloat16"].at[add].add(drawn.astype(jnp.bfloat16)),
            "weak": state["weak"] + drawn,
            "count": state["count"] + add,
        }

    def loss(key, params, state, batch):
        noise = jax.random.uniform(key, batch.inputs.shape) + state["bfloat16"].astype(jnp.float32)
        logits = network(params, batch.inputs + 0.1 * noise) + state["flags"]
        value, metrics = continual.cross_entropy(logits, batch)
        return value * (1 + 0.01 * jnp.tanh(state["weak"])), metrics | {"int8": state["int8"].sum().astype(jnp.float32)}

    def after_update(key, params, state, batch, grads, updates):
        hits = (jax.nn.one_hot(batch.labels, CLASSES) * batch.weights[:, None]).sum(axis=0) > 0
        return updates, changed(state, 1) | {"flags": state["flags"] ^ hits}

    def shrink(key, params, state, *_):
        return jax.tree.map(lambda leaf: 0.9 * leaf, params), changed(state, 2)

    def observe(key, params, state, batch):
        state = changed(state, 3)
        return state | {"weak": state["weak"] + (batch.weights * network(params, batch.inputs)[:, 0]).sum()}

    return Strategy(
        continual.gradients_of(loss),
        lambda params, state, inputs, task: network(params, inputs) + state["flags"],
        init,
        begin_task=shrink,
        after_update=after_update,
        refresh=shrink,
        observe=observe,
        end_task=shrink,
        refresh_every=refresh_every,
    )


MEMORY = {"memory_size": 16, "memory_batch_size": 8}
STRATEGIES = {
    "naive": lambda: continual.naive(network),
    "ewc": lambda: continual.ewc(network, strength=5.0),
    "si": lambda: continual.si(network, strength=0.1),
    "lwf": lambda: continual.lwf(network),
    "er": lambda: continual.er(network, **MEMORY),
    "der_plus_plus": lambda: continual.der_plus_plus(network, **MEMORY, logits_strength=0.5, labels_strength=0.5),
    "a_gem": lambda: continual.a_gem(network, **MEMORY),
}
MASKS = masks.ib_masks(lambda path: path != "bias", 2, log_variance=-2.0)
FROZEN = {"kernel": jax.random.normal(jax.random.key(8), (WIDTH, 6))}
ADAPTER = adapters.oa_adapter(lambda path: True, 2, 2, protected=2, log_size=4)
NAMES = [*STRATEGIES, "key_value_bottleneck", "masked_network", "adapted_network"]
MADE_UP = {"made_up": lambda: made_up(0), "made_up, refreshed": lambda: made_up(3)}
TOLD = {"lwf", "er"}  # those whose stream is task-incremental


def frozen(function, inputs):
    x = inputs.reshape(len(inputs), -1)
    return function("kernel", x, x @ FROZEN["kernel"])


@functools.cache
def method(name):
    """The very same functions each time, so that what was compiled for them serves again."""
    if name == "key_value_bottleneck":
        made = bottleneck.discrete_key_value_bottleneck(
            WIDTH, CLASSES, codebooks=CODEBOOKS, pairs=PAIRS, key_width=WIDTH // CODEBOOKS
        )
        strategy, tx = continual.key_value_bottleneck(made, momentum=0.9), bottleneck.sparse_sgd(1.0, max_norm=0.1)
        return Method(strategy, tx, table_params(), stream_of(indices=True))
    if name == "masked_network":
        strategy, tx = continual.masked_network(MASKS, network, penalty_weight=1e-3), optax.adam(0.02)
        return Method(strategy, tx, MASKS.init(jax.random.key(0), network_params())[0], stream_of(told=True))
    if name == "adapted_network":
        objective = continual.classification(frozen, lambda params, features: features @ params)
        features = continual.adapted_features(ADAPTER, frozen)
        strategy = continual.class_means(
            continual.adapted_network(ADAPTER, FROZEN, objective), features, drift_width=0.3
        )
        params = continual.Adapted(ADAPTER.init(jax.random.key(0), FROZEN)[0], jnp.zeros((6, CLASSES)))
        return Method(strategy, optax.adam(0.02), params, stream_of())
    return Method((STRATEGIES | MADE_UP)[name](), optax.adam(0.02), network_params(), stream_of(told=name in TOLD))


def run_method(name, *, fresh=False, **options):
    """One run; `fresh` makes the strategy anew, so that nothing has been compiled for it."""
    strategy, tx, params, stream = (method.__wrapped__ if fresh else method)(name)
    options = {"stream": stream, "params": params, "key": jax.random.key(3), "epochs": 2, "batch_size": 4} | options
    return continual.run(strategy=strategy, tx=tx, **options)


def run_together(name, **options):
    """Three seeds, one of them in a group with a copy of itself where there are two cores."""
    strategy, tx, params, stream = method(name)
    more = [jax.tree.map(lambda leaf, shift=shift: leaf + shift, params) for shift in (0.0, 0.1, -0.1)]
    streams_of_seeds = [
        stream_of(told=stream.task_known, indices="values" in params, key=key)._replace(
            train=stream.train, test=stream.test
        )
        for key in range(3)
    ]
    options = {"epochs": 2, "batch_size": 4, "together": True} | options
    keys = jax.random.split(jax.random.key(4), 3)
    return continual.run_seeds(keys, strategy, tx, more, streams_of_seeds, **options)


def bits(leaf):
    """An array of any dtype as NumPy has it, typed keys as their bits."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(left, right):
    """Results equal to the last bit in all but wall time and what was compiled."""
    for ours, theirs in ((left.accuracy, right.accuracy), (left.untrained, right.untrained)):
        np.testing.assert_array_equal(ours, theirs)
    assert left.history == right.history
    assert [left.examples, left.parameters, left.bytes] == [right.examples, right.parameters, right.bytes]
    assert_same_trees((left.params, left.strategy_state), (right.params, right.strategy_state))


def assert_same_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert bits(ours).tobytes() == bits(theirs).tobytes()


class Stopped(Exception):
    """Stands for whatever ends a run before its time."""


_COMPILED = {}


class Watch:
    """Shares compiled programs between runs, notes their calls, and stops a run after `stop_after` of them."""

    def __init__(self):
        self.calls, self.stop_after = [], None

    def __call__(self, strategy, tx, stream, **options):
        which = strategy, tx, stream.view, stream.prepare, stream.augment, stream.task_known, *options.items()
        if which not in _COMPILED:
            _COMPILED[which] = compile_programs(strategy, tx, stream, **options)
        programs = zip(Programs._fields, _COMPILED[which], strict=True)
        return Programs._make(program and self._watched(name, program) for name, program in programs)

    def _watched(self, name, program):
        def call(*arguments):
            if self.stop_after is not None and len(self.calls) >= self.stop_after:
                raise Stopped(name)
            self.calls.append(name)
            return program(*arguments)

        return call

    def stopped(self, start, calls):
        """Before which call it was stopped, and None; or None and what `start` returns if it has no more `calls`."""
        self.calls, self.stop_after = [], calls
        try:
            return None, start()
        except Stopped as stopped:
            return str(stopped), None
        finally:
            self.stop_after = None


def watch(monkeypatch):
    watched = Watch()
    monkeypatch.setattr(loop, "compile_programs", watched)
    return watched
