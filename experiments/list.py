"""All experiments, benchmarks and tools: what each is for, how long it takes on two cores, and what to expect of it."""

import argparse
import importlib
import pkgutil
import shutil
import textwrap
from collections.abc import Sequence
from types import ModuleType

import experiments
from experiments.card import Card

CARDS = {"": Card("seconds", "this list")}


def runnable() -> dict[str, ModuleType]:
    """The modules of this package that can be run, by their dotted names: those with CARDS."""
    names = sorted(found.name for found in pkgutil.walk_packages(experiments.__path__, "experiments."))
    modules = {name: importlib.import_module(name) for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "CARDS")}


def describe(name: str, module: ModuleType, width: int) -> str:
    """What `name` is for and what its CARDS say, in lines of at most `width` characters where words allow it."""

    def indented(text: str, by: int) -> str:
        space = " " * by
        return textwrap.fill(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)

    purpose = (module.__doc__ or "").splitlines()[0]
    lines = [f"python -m {name}", indented(purpose, 2)]
    for options, card in module.CARDS.items():
        lines += [indented(f"{options or 'without options'}: {card.cost}", 4), indented(card.expected, 8)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the list."""
    argparse.ArgumentParser(prog="python -m experiments.list", description=__doc__).parse_args(argv)
    width = min(shutil.get_terminal_size().columns, 120)
    print("\n\n".join(describe(name, module, width) for name, module in runnable().items()))


if __name__ == "__main__":
    main()
