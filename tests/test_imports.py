"""Who may import the heavy libraries, and that importing the package loads none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ray_unlearn

PACKAGE = Path(ray_unlearn.__file__).parent
HEAVY = ("deepspeed", "ray", "optuna", "mergekit")
LIGHT = ["losses", "metrics", "merging", "config", "pareto", "records", "data", "schema", "files"]


def loaded_after(code, names):
    """Which of the names are in sys.modules of a fresh interpreter that ran the code."""
    check = f"{code}\nimport sys\nprint([name for name in {list(names)} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=True
    )
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


def test_importing_the_package_loads_no_library_at_all():
    assert loaded_after("import ray_unlearn", [*HEAVY, "torch", "transformers", "datasets", "yaml", "numpy"]) == []


def test_importing_the_pure_modules_loads_no_heavy_library():
    code = "import " + ", ".join(f"ray_unlearn.{name}" for name in LIGHT)
    assert loaded_after(code, [*HEAVY, "transformers", "datasets", "peft"]) == []


def test_a_misspelled_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        ray_unlearn.runs  # noqa: B018


def imported(path):
    """Every module that a file imports anywhere, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(library):
    prefix = f"{library}."
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if any(name == library or name.startswith(prefix) for name in imported(path))
    }


@pytest.mark.parametrize(
    ("library", "owners", "guests"),
    [
        ("deepspeed", {"engine.py"}, {"executor.py"}),  # a worker's warm-up pays the slow import
        ("ray.train", {"executor.py"}, set()),
        ("ray.tune", {"search.py"}, set()),
        ("optuna", {"search.py"}, set()),
        ("mergekit", {"merging/writer.py"}, set()),
    ],
)
def test_each_heavy_library_has_one_owner(library, owners, guests):
    found = importers(library)
    assert owners <= found <= owners | guests


ON_DEMAND = {"merging/writer.py"}
PURE = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).as_posix().removesuffix(".py").split("/")[0] in LIGHT
    and path.relative_to(PACKAGE).as_posix() not in ON_DEMAND
]


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_pure_module_imports_at_its_top_only_pure_modules_of_the_package(path):
    top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    used = {node.module for node in top if node.module and node.module.startswith("ray_unlearn")}
    allowed = {"ray_unlearn." + light for light in [*LIGHT, "errors", "models.snapshot_files"]}
    assert all(any(module == a or module.startswith(a + ".") for a in allowed) for module in used), used
