"""What the loop costs the host: time a step where the step itself is next to nothing, and memory over 10,000 steps.

A linear probe of 8 inputs and batches of 4, one step a call: all the time is the loop's and JAX's own, so it bounds
from above what the loop adds to any step. Ten tasks of ten epochs of 100 steps. What an epoch came to is kept, some
hundred bytes. ``python -m experiments.benchmarks.host``
"""

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.harness import status_kib
from experiments.card import Card
from jaxcl import continual
from jaxcl.continual import Progress

CARDS = {"": Card("10 s", "under 200 microseconds a step; no growth of memory; each program compiled once")}
TASKS, EPOCHS, STEPS, BATCH = 10, 10, 100, 4


def main() -> dict[str, object]:
    """Measures, prints a line for people and one of JSON, and returns what that holds."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((STEPS * BATCH, 8), np.float32)
    examples = continual.Examples(inputs, rng.integers(0, 2, len(inputs)).astype(np.int32))
    stream = continual.streams.permuted(jax.random.key(0), examples, examples, tasks=TASKS)
    params = {"kernel": jnp.zeros((8, 2)), "bias": jnp.zeros(2)}
    seen: list[tuple[float, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.seconds, status_kib("VmRSS")))

    result = continual.run(
        jax.random.key(1), continual.linear_probe(), optax.sgd(0.1), params, stream, epochs=EPOCHS, batch_size=BATCH,
        steps_per_call=1, callback=watch,
    )  # fmt: skip
    seconds, memory = zip(*seen, strict=True)
    first_half, second_half = memory[len(memory) // 2], memory[-1]  # the first tasks warm caches up
    row = {
        "benchmark": "host",
        "steps": TASKS * EPOCHS * STEPS,
        "microseconds_a_step": statistics.median(seconds) / STEPS * 1e6,
        "growth_kib_over_second_half": second_half - first_half,
        "compilations": result.compilations,
    }
    print(
        f"{row['microseconds_a_step']:.0f} microseconds a step; over the last {TASKS * EPOCHS * STEPS // 2:,} steps "
        f"memory grew by {second_half - first_half} KiB; compiled {result.compilations}"
    )
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
