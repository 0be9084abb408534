"""What the documentation says of the code: the tree, the API page, links and paths."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import ray_unlearn

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ray_unlearn.__file__).parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def named_in_the_tree():
    """Files of the package that the tree of docs/architecture.md names, by their paths."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^```\nray_unlearn/\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    found, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        first = line.split()[0] if line.split() else ""
        if first.endswith("/"):
            folders[depth:] = [first]
        names = re.match(r"((?:[a-z_0-9]+\.(?:py|jinja)\s*)+)", line.strip())
        for name in names[1].split() if names else []:
            found.add("".join(folders[:depth]) + name)
    return found


GROWING = ("attacks/", "data/benchmarks/")
"""Folders of a file for each row of a table, where the tree need not name a new one."""


def test_the_tree_names_every_file_of_the_package_and_no_other():
    real = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    real = {name for name in real if not name.endswith("__init__.py")} | {"cli/__init__.py", "__init__.py"}
    named = named_in_the_tree()
    assert named <= real and {name for name in real - named if not name.startswith(GROWING)} == set()


def test_the_api_page_is_made_from_the_docstrings():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made, "run: python docs/make_api.py"


def test_what_is_exported_is_there_and_listed():
    for name in ray_unlearn.__all__:
        assert getattr(ray_unlearn, name).__doc__ and name in dir(ray_unlearn)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_the_documentation_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    shown = re.findall(r"^ *`([\w/.]+)`:$", text, re.MULTILINE)  # examples, which tests/test_contributing.py makes
    for path in re.findall(r"`((?:ray_unlearn|benchmarks|jobs|search_spaces|docs|tests)/[\w./-]*\w)`", text):
        assert "NAME" in path or path in shown or (ROOT / path).exists(), path
