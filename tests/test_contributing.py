"""CONTRIBUTING's examples, made literally in a copy of the project: three files each, and their tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"# (at the end of|new file) (\S+)\n")


def examples():
    """Section -> [(whether the file is new, its path, the code)]."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        placed = [(PLACE.match(block), block) for block in blocks]
        if placed:
            assert all(place for place, _ in placed), f"a block of {section.splitlines()[0]!r} says no file"
            found[section.splitlines()[0]] = [(place[1] == "new file", place[2], block) for place, block in placed]
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with every example made."""
    place = tmp_path_factory.mktemp("project")
    for folder in ("ray_unlearn", "search_spaces", "jobs", "tests"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    for blocks in examples().values():
        for new, path, code in blocks:
            file = place / path
            assert file.exists() != new, f"{path} is {'there already' if new else 'not there'}"
            file.parent.mkdir(exist_ok=True)
            file.write_text((file.read_text(encoding="utf-8") + "\n\n" if not new else "") + code, encoding="utf-8")
    return place


def run_there(place, *command):
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kind_of_addition_is_shown_and_takes_three_files_at_most():
    found = {section: {path for _, path, _ in blocks} for section, blocks in examples().items()}
    kinds = ["method", "metric", "merge method with a number of its own", "data set", "sampler", "attack"]
    assert list(found) == [f"Adding {'an' if kind[0] == 'a' else 'a'} {kind}" for kind in kinds]
    assert all(2 <= len(paths) <= 3 and any("test_" in path for path in paths) for paths in found.values())


def test_the_tests_of_the_examples_pass(copy):
    tests = [path for blocks in examples().values() for _, path, _ in blocks if "/test_" in path]
    assert len(tests) == 6
    printed = run_there(copy, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests)
    assert "6 passed" in printed


@pytest.mark.parametrize(
    ("command", "name", "more"),
    [
        ("methods", "faded", "faded_cap=3.0"),
        ("metrics", "first_word", "an example"),
        ("merge-methods", "power_mean", ""),
    ],
)
def test_what_was_added_is_in_the_lists(copy, command, name, more):
    printed = run_there(copy, "-m", "ray_unlearn", command)
    row = re.search(rf"^{name}\n(?:  .*\n)+", printed, re.MULTILINE)
    assert row and more in row[0]


def test_the_new_method_has_its_search_space(copy):
    code = (
        "import optuna; from ray_unlearn.search.spaces import load_space, trial_config\n"
        "space, _ = load_space(['faded'], {}); print(trial_config(space(optuna.create_study().ask())).options)"
    )
    assert "faded_cap" in run_there(copy, "-c", code)
