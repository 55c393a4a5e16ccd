"""A thousand tasks of one class each: one compilation, and memory that does not grow with what was learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import bottleneck, continual
from jaxcl.continual import Examples, streams

TASKS, WIDTH = 1000, 16


def clusters(examples_per_class, seed):
    """A tight cluster of features a class, the same in each call."""
    centres = np.random.default_rng(7).normal(size=(TASKS, WIDTH))
    labels = np.repeat(np.arange(TASKS), examples_per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), WIDTH))
    return Examples((centres[labels] + 0.1 * noise).astype(np.float32), labels)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thousand_tasks():
    """What the run came to, and the bytes this process held after each task."""
    train, test = clusters(8, 1), clusters(1, 2)
    stream = streams.class_incremental(jax.random.key(0), train, test, classes_per_task=1)
    layer = bottleneck.discrete_key_value_bottleneck(WIDTH, TASKS, codebooks=8, pairs=256, key_width=4)
    params, state = layer.init(jax.random.key(1))
    for key in jax.random.split(jax.random.key(2), 5):
        state = bottleneck.fit_epoch(key, layer, params, state, train.inputs, batch_size=1000)
    lookup = jax.jit(layer.lookup)
    indexed = streams.map_inputs(stream, lambda x: lookup(params, state, x).astype(jnp.uint16))
    held = []
    result = continual.run(
        jax.random.key(3), continual.key_value_bottleneck(layer), bottleneck.sparse_sgd(3.0, max_norm=1.0), params,
        indexed, epochs=1, batch_size=8, steps_per_call=64, callback=lambda _: held.append(resident_bytes()),
    )  # fmt: skip
    return result, held


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what memory a process holds is read from /proc")
def test_a_thousand_tasks_take_constant_memory_and_one_compilation():
    """In a process of its own, where programs are compiled to run fast and nothing else comes and goes."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tasks"] == TASKS
    assert found["compilations"] == {"start": 1, "train": 1, "evaluate": 1}
    assert found["average_accuracy"] > 0.99
    # What grows is the accuracy matrix, 8 bytes an entry.
    assert found["grown"] < 2 * 8 * TASKS**2


if __name__ == "__main__":
    result, held = thousand_tasks()
    print(
        json.dumps(
            {
                "tasks": len(held),
                "compilations": result.compilations,
                "average_accuracy": continual.metrics.average_accuracy(result.accuracy),
                "grown": held[-1] - held[100],
            }
        )
    )
