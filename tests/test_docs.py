"""The pages: their snippets run, as a reader would paste them, and no public module is without one."""

import pkgutil
import re
from pathlib import Path

import pytest

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


def test_every_public_module_has_a_page_of_reference():
    pages = {page.stem for page in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == {module.name for module in pkgutil.iter_modules(jaxcl.__path__)} - WITHOUT_PAGE
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
