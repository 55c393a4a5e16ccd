"""The pages: their snippets run, and their commands are understood; no public module is without one."""

import argparse
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import tyro

import jaxcl

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "api")
WITHOUT_PAGE = {"files", "threefry", "typing"}  # what the house stands on


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), names)  # our own file
    assert snippets or page.stem in ("costs", "results")


class Understood(Exception):
    """A command line that was parsed, and is not to be obeyed."""


def commands(text):
    """The commands of a page that start a module of this project: from its blocks and its sentences."""
    prose, blocks = (text.split("```")[first::2] for first in (0, 1))
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    lines += [" ".join(span.split()) for part in prose for span in part.split("`")[1::2]]
    found = {line[line.find("python -m ") :] for line in lines if re.search(r"python -m (experiments|jaxcl)", line)}
    return sorted(command for command in found if not re.search(r"\.\.\.|<", command))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_commands_are_understood(page, monkeypatch):
    def stopping(parse):
        def parsed(*arguments, **options):
            parse(*arguments, **options)
            raise Understood

        return parsed

    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    found = commands(page.read_text())
    assert found or page.stem not in ("README", "results")
    for command in found:
        _, _, name, *arguments = shlex.split(command)
        module = importlib.import_module(f"{name}.__main__" if name == "jaxcl.coding" else name)
        try:
            with pytest.raises(Understood):
                module.main(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_every_public_module_has_a_page_of_reference():
    pages = {page.stem for page in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == {module.name for module in pkgutil.iter_modules(jaxcl.__path__)} - WITHOUT_PAGE
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
