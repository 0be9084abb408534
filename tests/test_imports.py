"""The house: which folder may import which, who may import the heavy libraries, and that the package loads none."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import ray_unlearn

PACKAGE = Path(ray_unlearn.__file__).parent
FLOORS = [
    {"errors", "protocols"},
    {"progress", "pareto", "schema", "files", "tables"},
    {"records", "plugins"},
    {"losses", "metrics", "data", "run_files"},
    {"models"},
    {"evaluation", "merging"},
    {"config", "attacks"},
    {"report", "training"},
    {"cluster"},
    {"search"},
    {"pipeline"},
    {"api"},
    {"cli"},
    {"__init__", "__main__"},
]
"""From the ground up: a module or folder imports from lower floors alone. `metrics` may read `records`."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LARGEST_FILE = 400
MOST_FILES = 12
HEAVY = ("deepspeed", "ray", "optuna", "mergekit")
PURE = ["losses", "metrics", "merging", "config.trial", "pareto", "records", "data.rows", "schema", "files", "plugins"]


def files():
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 80
    return found


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Every module that a file imports anywhere, lazily or for types too, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(path):
    """The rooms of the package that a file imports from, its own left out."""
    used = {name.split(".")[1] for name in imported(path) if name.startswith("ray_unlearn.")}
    return {room for room in used if room in FLOOR_OF} - {room_of(path)}


def test_every_file_and_folder_stands_on_a_floor():
    assert {room_of(path) for path in files()} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    climbing = {room for room in rooms_used(path) if FLOOR_OF[room] >= FLOOR_OF[room_of(path)]}
    assert not climbing, f"{path.relative_to(PACKAGE)} stands on floor {FLOOR_OF[room_of(path)]} and imports {climbing}"


def test_a_climbing_import_is_seen(tmp_path, monkeypatch):
    """The walk above sees imports at the top, in functions, and under TYPE_CHECKING."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "losses").mkdir()
    file = tmp_path / "losses" / "new.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom ray_unlearn import pareto\n"
        "def f():\n    from ray_unlearn.cluster import session\n"
        "if TYPE_CHECKING:\n    from ray_unlearn.config.job import Job\n"
    )
    assert rooms_used(file) == {"pareto", "cluster", "config"}


def test_no_two_files_of_a_folder_import_each_other_in_a_circle():
    graph = {}
    for path in files():
        name = ".".join(["ray_unlearn", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        graph[name] = path
    edges = {
        name: {
            target
            for found in imported(path)
            for target in (found, found.rpartition(".")[0])
            if target in graph and target != name and graph[target].parent == path.parent
        }
        for name, path in graph.items()
        if path.name != "__init__.py"
    }
    gone = set()
    while True:
        leaves = {name for name, targets in edges.items() if name not in gone and not (targets & edges.keys()) - gone}
        if not leaves:
            break
        gone |= leaves
    assert not edges.keys() - gone


def test_files_are_short_and_folders_small():
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in files()}
    assert {name: count for name, count in lengths.items() if count >= LARGEST_FILE} == {}
    tests = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert {name: count for name, count in tests.items() if count >= LARGEST_FILE} == {}
    folders = {}
    for path in files():
        folders.setdefault(path.parent, []).append(path.name)
    assert {folder.name: len(names) for folder, names in folders.items() if len(names) > MOST_FILES} == {}


# -- heavy libraries -----------------------------------------------------------------------------


def loaded_after(code, names):
    """Which of the names are in sys.modules of a fresh interpreter that ran the code."""
    check = f"{code}\nimport sys\nprint([name for name in {list(names)} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=True
    )
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


def test_importing_the_package_loads_no_library_at_all():
    names = [*HEAVY, "torch", "transformers", "datasets", "yaml", "numpy"]
    assert loaded_after("import ray_unlearn, ray_unlearn.cli", names) == []


def test_importing_the_pure_modules_loads_no_heavy_library():
    code = "import " + ", ".join(f"ray_unlearn.{name}" for name in PURE)
    assert loaded_after(code, [*HEAVY, "transformers", "datasets", "peft"]) == []


def test_a_misspelled_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        ray_unlearn.runs  # noqa: B018


def importers(library):
    prefix = f"{library}."
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in files()
        if any(name == library or name.startswith(prefix) for name in imported(path))
    }


@pytest.mark.parametrize(
    ("library", "owners", "guests"),
    [
        ("deepspeed", {"training/engine.py"}, {"cluster/executor.py"}),  # a worker's warm-up pays the slow import
        ("ray.train", {"cluster/executor.py"}, set()),
        ("ray.tune", {"search/tune.py"}, set()),
        ("optuna", {"search/study.py"}, {"search/samplers.py", "search/tune.py"}),
        ("mergekit", {"merging/writer.py"}, set()),
    ],
)
def test_each_heavy_library_has_one_owner(library, owners, guests):
    found = importers(library)
    assert owners <= found <= owners | guests


def test_ray_is_imported_in_cluster_search_and_submit_alone():
    found = {name for name in importers("ray") if name != "pipeline/submit.py"}
    assert found and {name.split("/")[0] for name in found} == {"cluster", "search"}


# -- types ---------------------------------------------------------------------------------------


def annotations(path):
    """Every annotation of a parameter, a result or a variable."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def test_any_is_under_one_in_twenty_annotations():
    found = [annotation for path in files() for annotation in annotations(path)]
    loose = [one for one in found if any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(one))]
    assert len(found) > 2000 and len(loose) < 0.05 * len(found)


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_of_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray_unlearn"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                known = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                assert known, f"{path.name}: {node.module} has no {name}"
