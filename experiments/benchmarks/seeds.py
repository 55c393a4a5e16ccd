"""Eight seeds together beside one seed and beside eight in turn, where the loop costs as much as the arithmetic.

Class-incremental digits, batches of 32, 200 epochs of each of five tasks: an MLP 64-64-10 under Adam, and the values of
a key-value bottleneck of 64 codebooks. Medians over rounds, in each of which all three are compiled anew and run, and
then run again. ``python -m experiments.benchmarks.seeds``
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from experiments.card import Card
from jaxcl import bottleneck, continual, data, nets
from jaxcl.continual import Strategy, Stream, streams
from jaxcl.typing import PyTree

CARDS = {
    "": Card("4 min", "eight MLPs in 3 times the time of one, or less with compilation; never slower than in turn")
}
SEEDS, EPOCHS, ROUNDS = 8, 200, 5
Learner = tuple[Callable[[], Strategy], optax.GradientTransformation, Sequence[PyTree], Sequence[Stream]]


def main() -> list[dict[str, object]]:
    """Measures, prints a line for people a case and one of JSON for all, and returns what that holds."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    train, test = data.flat_features(data.digits())
    tasks = [streams.class_incremental(key, train, test, classes_per_task=2) for key in keys]
    rows = [_measure(name, *learner) for name, learner in (("mlp", _mlp(tasks)), ("dkvb", _bottleneck(tasks)))]
    print(json.dumps(rows))
    return rows


def _mlp(tasks: Sequence[Stream]) -> Learner:
    net = nets.MLP((64,), classes=10)
    params = [net.init(jax.random.key(seed), jnp.zeros((1, 64))) for seed in range(SEEDS)]
    return lambda: continual.naive(net.apply), optax.adam(1e-3), params, tasks


def _bottleneck(tasks: Sequence[Stream]) -> Learner:
    layer = bottleneck.discrete_key_value_bottleneck(64, 10, codebooks=64, pairs=256, key_width=8)
    lookup = jax.jit(layer.lookup)
    params, indexed = [], []
    for seed, stream in enumerate(tasks):
        values, state = layer.init(jax.random.key(seed))
        params.append(values)
        indexed.append(streams.map_inputs(stream, lambda x: lookup(values, state, x).astype(jnp.uint16)))  # noqa: B023
    return lambda: continual.key_value_bottleneck(layer), bottleneck.sparse_sgd(3.0, max_norm=1.0), params, indexed


def _measure(
    name: str,
    make: Callable[[], Strategy],
    tx: optax.GradientTransformation,
    params: Sequence[PyTree],
    tasks: Sequence[Stream],
) -> dict[str, object]:
    keys = jax.random.split(jax.random.key(1), SEEDS)
    ways = {"one": (1, False), "in_turn": (SEEDS, False), "together": (SEEDS, True)}
    first: dict[str, list[float]] = {way: [] for way in ways}
    again: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, (seeds, together) in ways.items():
            strategy = make()  # for which nothing has been compiled
            for seconds in (first, again):
                began = time.perf_counter()
                continual.run_seeds(
                    keys[:seeds], strategy, tx, params[:seeds], tasks[:seeds], epochs=EPOCHS, batch_size=32,
                    steps_per_call=64, together=together,
                )  # fmt: skip
                seconds[way].append(time.perf_counter() - began)
    row: dict[str, object] = {"benchmark": "seeds", "case": name}
    for title, seconds in (("with_compilation", first), ("compiled", again)):
        medians = {way: statistics.median(of_way) for way, of_way in seconds.items()}
        ratios = {way: medians[way] / medians["one"] for way in ("in_turn", "together")}
        row[title] = {"seconds": medians, "ratios": ratios}
        print(
            f"{name}, {title.replace('_', ' ')}: one seed {medians['one']:.2f} s; eight in turn "
            f"{ratios['in_turn']:.1f} times that, together {ratios['together']:.1f} times"
        )
    return row


if __name__ == "__main__":
    main()
