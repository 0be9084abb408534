"""Modules of third parties: by name, by path and by entry point; what is wrong with one is said, and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from third_parties import guests

from ray_unlearn import plugins
from ray_unlearn.config.job import Job
from ray_unlearn.errors import InputError
from ray_unlearn.losses import LOSSES, METHODS
from ray_unlearn.schema import from_dict

METHOD = """
from ray_unlearn.losses import LOSSES, METHODS, Loss, Method

def loss(logps, mask):
    return (logps * mask).sum()

LOSSES.add("{name}", Loss(compute=loss, tensors=("logps", "mask")))
METHODS.add("{name}", Method(forget="{name}", formula="sum log p", source="a test"))
"""


@pytest.fixture(autouse=True)
def clean():
    """Leaves this process without the plugins of a test."""
    with guests():
        yield


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_and_a_module_of_a_package_add_rows_once(tmp_path):
    file = write(tmp_path / "third_file.py", METHOD.format(name="by_file"))
    write(tmp_path / "more" / "third_package" / "__init__.py", "")
    write(tmp_path / "more" / "third_package" / "deep.py", METHOD.format(name="by_module"))
    sys.path.append(str(tmp_path / "more"))
    for _ in range(2):
        plugins.load_plugins([str(file), "third_package.deep"])
    assert METHODS["by_file"].forget == "by_file" and "by_module" in METHODS
    assert [(p.module, p.code) for p in plugins.loaded()] == [
        ("third_file", file),
        ("third_package.deep", tmp_path / "more" / "third_package"),
    ]


def test_a_plugins_digest_changes_with_its_code_alone(tmp_path):
    file = write(tmp_path / "third_digest.py", METHOD.format(name="digested"))
    plugins.load_plugins([str(file)])
    (plugin,) = plugins.loaded()
    before = plugin.digest()
    write(tmp_path / "beside.py", "")
    assert plugin.digest() == before
    file.write_text(file.read_text() + "\n")
    assert plugin.digest() != before


def test_a_job_loads_its_plugins_before_its_names_are_looked_up(tmp_path):
    file = write(tmp_path / "third_job.py", METHOD.format(name="of_a_job"))
    job = {"target": {"benchmark": "embedded"}, "search": {"fixed": {"method": "of_a_job"}}}
    with pytest.raises(InputError, match="unknown value for search.fixed.method: 'of_a_job'"):
        from_dict(Job, job)
    assert from_dict(Job, {**job, "plugins": [str(file)]}).plugins == [str(file)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHOD.format(name="npo"), "there is a loss 'npo' already"),
        (METHOD.format(name="half") + "1 / 0\n", r"ZeroDivisionError: division by zero \(.*third_broken.py:9\)"),
        ("import no_such_library\n", r"ModuleNotFoundError: No module named 'no_such_library' \(.*third_broken.py:1\)"),
        ("def (:\n", r"SyntaxError: .*third_broken.py, line 1"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(.*third_broken.py:1\)"),
    ],
)
def test_a_broken_plugin_is_named_and_its_rows_are_taken_back(tmp_path, text, message):
    file = write(tmp_path / "third_broken.py", text)
    with pytest.raises(InputError, match=f"the plugin .*third_broken.py cannot be loaded: {message}"):
        plugins.load_plugins([str(file)])
    assert "half" not in LOSSES and "half" not in METHODS and not plugins.loaded()
    file.write_text(METHOD.format(name="half"))  # mended, it loads
    plugins.load_plugins([str(file)])
    assert "half" in METHODS


def test_a_broken_package_is_read_anew_once_it_is_mended(tmp_path):
    write(tmp_path / "third_parts" / "rows.py", METHOD.format(name="of_parts"))
    start = write(tmp_path / "third_parts" / "__init__.py", "from third_parts import rows\nrows.nothing\n")
    sys.path.append(str(tmp_path))
    with pytest.raises(InputError, match="has no attribute 'nothing'"):
        plugins.load_plugins(["third_parts"])
    assert "of_parts" not in METHODS
    start.write_text("from third_parts import rows\n")
    plugins.load_plugins(["third_parts"])
    assert "of_parts" in METHODS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("third_nowhere", "there is no module third_nowhere. Install it, or give the path"),
        ("json.third_nowhere", "there is no module json.third_nowhere"),
        ("json:loads", ".* without a name after a colon"),
        ("/nowhere/third.py", "there is no file /nowhere/third.py"),
    ],
)
def test_what_is_not_there_is_refused(name, message):
    with pytest.raises(InputError, match=f"the plugin {name} cannot be loaded: {message}"):
        plugins.load_plugins([name])


def test_a_file_that_would_hide_another_module_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is another module wave .*: rename the file"):
        plugins.load_plugins([str(write(tmp_path / "wave.py", ""))])
    with pytest.raises(InputError, match="no module can be imported by the name third-party: rename the file"):
        plugins.load_plugins([str(write(tmp_path / "third-party.py", ""))])


def test_a_worker_imports_what_its_driver_names(tmp_path, monkeypatch):
    write(tmp_path / "third_worker.py", METHOD.format(name="in_a_worker"))
    sys.path.append(str(tmp_path))
    plugins.load_in_worker()
    assert "in_a_worker" not in METHODS
    monkeypatch.setenv(plugins.VARIABLE, '["third_worker"]')
    plugins.load_in_worker()
    assert "in_a_worker" in METHODS


# -- installed distributions, in interpreters of their own -------------------------------------------


def installed(place: Path, value: str, text: str) -> dict[str, str]:
    """The environment of an interpreter in which a distribution with an entry point and a module is installed."""
    write(place / "third_installed.py", text)
    info = place / "third_installed-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: third-installed\nVersion: 1.0\n")
    write(info / "entry_points.txt", f"[ray_unlearn.losses]\nmine = {value}\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(place), *filter(None, sys.path)])}


def methods(environment, *extra):
    command = [sys.executable, "-m", "ray_unlearn", "methods", "--json", *map(str, extra)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_an_installed_plugin_and_a_named_one_are_in_the_list_of_methods(tmp_path):
    environment = installed(tmp_path / "site", "third_installed", METHOD.format(name="installed_method"))
    answer = methods(environment, "--plugin", write(tmp_path / "third_named.py", METHOD.format(name="named_method")))
    assert answer.returncode == 0, answer.stderr
    assert {"npo", "installed_method", "named_method"} <= {row["name"] for row in json.loads(answer.stdout)}


def test_a_broken_installed_plugin_is_named_with_its_distribution(tmp_path):
    answer = methods(installed(tmp_path, "third_installed", "raise OSError('no licence')\n"))
    assert answer.returncode == 2
    assert "the plugin third_installed (entry point 'mine' of third-installed) cannot be loaded" in answer.stderr
    assert "OSError: no licence" in answer.stderr and "Traceback" not in answer.stderr


def test_help_loads_no_plugin(tmp_path):
    environment = installed(tmp_path, "third_installed", "raise OSError('loaded')\n")
    command = [sys.executable, "-m", "ray_unlearn", "methods", "--help"]
    assert subprocess.run(command, capture_output=True, env=environment, timeout=60).returncode == 0
