"""Grids of settings: one run for each point, each in a folder of its own, and all of them compared."""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from experiments import compare
from jaxcl.typing import bad_argument

Config = TypeVar("Config")


def run_grid(config: Config, run: Callable[[Config], Any]) -> list[Any]:
    """Runs every point of the grid that `config.sweep` describes; where it has none, `config` itself.

    The folder of a point is `config.out` with the point's settings as its name, so that a grid that was interrupted
    goes on, and one that grows runs only what is new. `config.out` then holds compare.html.

    Args:
        config: a dataclass with `sweep`, entries as "codebooks=16,64", and `out`.
        run: what runs a point.

    Returns:
        What `run` returned, for each point, the last entry of the sweep changing fastest.

    Raises:
        ValueError: an entry of another form, a setting that does not exist, is named twice, or cannot vary.
        SystemExit: a value that its setting does not take; the error is printed.
    """
    settings: dict[str, list[str]] = {}
    for entry in config.sweep:  # type: ignore[attr-defined]
        name, _, values = entry.partition("=")
        fields = {field.name for field in dataclasses.fields(config)} - {"sweep", "out", "preset", "data"}  # type: ignore[arg-type]
        chosen = values.split(",")
        if name not in fields or not values or name in settings or len(set(chosen)) < len(chosen):
            raise bad_argument(
                "sweep", entry, f"write each setting and value once, as codebooks=16,64; there are {sorted(fields)}"
            )
        settings[name] = chosen
    if not settings:
        return [run(config)]
    base: Path = config.out  # type: ignore[attr-defined]
    points: list[Any] = []
    for values in itertools.product(*settings.values()):
        point = dict(zip(settings, values, strict=True))
        folder = base / ",".join(f"{name}={value.replace('/', '-')}" for name, value in point.items())
        default: Any = dataclasses.replace(config, sweep=(), out=folder)  # type: ignore[type-var]
        points.append(tyro.cli(type(default), default=default, args=_arguments(point)))
    documents = []
    for made in points:
        print(f"\n{made.out.name}\n")
        documents.append(run(made))
    if len(points) > 1:
        compare.main([*(str(made.out) for made in points), "--out", str(base)])
    return documents


def _arguments(point: dict[str, str]) -> Sequence[str]:
    """As a command line has them: true and false are flags, and a value with spaces is several."""
    arguments = []
    for name, value in point.items():
        flag = name.replace("_", "-")
        if value.lower() in ("true", "false"):
            arguments.append(f"--{'' if value.lower() == 'true' else 'no-'}{flag}")
        else:
            arguments += [f"--{flag}", *shlex.split(value)]
    return arguments
