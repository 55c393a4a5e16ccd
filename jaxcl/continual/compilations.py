"""Counts what XLA really compiles, so that a second compilation of a step shows."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def count_compilations(names: Collection[str]) -> Iterator[Counter[str]]:
    """Counts the compilations, while the context lasts, of jitted functions with these names.

    Yields a counter that fills as programs compile; programs that the persistent cache supplies count too.
    """
    counts: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        name = str(kwargs.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == _EVENT and name in names:
            counts[name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
