"""Third parties' additions: modules that add rows to the tables, imported by a driver and by each of its workers.

A plugin is a module, and importing it adds its rows: `METRICS.add("mine", Metric(...))`. It is named by a job's
`plugins`, by `--plugin`, or by an installed distribution's entry point of one of GROUPS, whose value is the module.
Workers import what their driver has loaded: its code travels with Ray's runtime environment (cluster.session).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ray_unlearn.errors import InputError
from ray_unlearn.tables import additions, take_back

GROUPS = tuple(f"ray_unlearn.{kind}" for kind in ("losses", "metrics", "merges", "attacks", "datasets", "samplers"))
"""Groups of entry points. They are read alike; which one says to a reader what the module adds."""
VARIABLE = "RAY_UNLEARN_PLUGINS"
"""Environment variable by which workers are told the modules that their driver has loaded."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin that this process has loaded."""

    module: str
    """The name it is imported by."""
    code: Path
    """What a worker needs to import it: its file, or the folder of the package it is in."""

    def digest(self) -> str:
        """SHA-256 over the names and bytes of its Python files."""
        content = hashlib.sha256()
        for file in sorted(self.code.rglob("*.py")) if self.code.is_dir() else [self.code]:
            content.update(file.name.encode() + b"\0" + file.read_bytes())
        return content.hexdigest()


_loaded: dict[str, Plugin] = {}


def loaded() -> list[Plugin]:
    """The plugins of this process, in the order they were loaded."""
    return list(_loaded.values())


def plugin_variables() -> dict[str, str]:
    """Environment variables of a process that is to load the plugins of this one."""
    return {VARIABLE: json.dumps([plugin.module for plugin in loaded()])} if _loaded else {}


def load_plugins(names: Iterable[str] = ()) -> None:
    """Loads installed plugins, then the named ones: modules that can be imported, or paths of .py files. Each once.

    Raises InputError, naming the plugin, for one that is not found, fails, or adds a name that is taken; the rows
    that it had added are taken back.
    """
    for module, where in _installed():
        _load(module, where)
    for name in names:
        _load(name, f"the plugin {name}")


def load_in_worker() -> None:
    """Imports what the driver of this worker had loaded when it joined the cluster."""
    for module in json.loads(os.environ.get(VARIABLE, "[]")):
        _load(module, f"the plugin {module}")


@functools.cache
def _installed() -> list[tuple[str, str]]:
    """Modules of the installed entry points, and how to speak of them, in an order that does not change."""
    found = set()
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group in GROUPS:
                where = f"the plugin {entry.value} (entry point {entry.name!r} of {distribution.name})"
                found.add((entry.value, where))
    return sorted(found)


def _load(name: str, where: str) -> None:
    mark, known = additions(), set(sys.modules)
    try:
        module = _import_file(Path(name)) if name.endswith(".py") else _import(name)
        _loaded[module.__name__] = Plugin(module=module.__name__, code=_code(module))
    except (Exception, SystemExit) as error:
        take_back(mark)
        for half in set(sys.modules) - known:
            if half.partition(".")[0] == name.partition(".")[0]:
                del sys.modules[half]
        raise InputError(f"{where} cannot be loaded: {_reason(name, error)}") from error


def _import(name: str) -> ModuleType:
    if ":" in name:
        raise InputError("a plugin is a module that adds its rows when it is imported, without a name after a colon.")
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """A .py file as the module of its name, by which workers can import it too."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    if not path.stem.isidentifier():
        raise InputError(f"no module can be imported by the name {path.stem}: rename the file.")
    other = importlib.util.find_spec(path.stem)
    if other is not None and other.origin != str(path):
        raise InputError(f"there is another module {path.stem} ({other.origin}): rename the file.")
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
    return sys.modules[path.stem]


def _code(module: ModuleType) -> Path:
    """The folder of the package that a module is in, or the file of one that is in none."""
    top = sys.modules[module.__name__.partition(".")[0]]
    place = next(iter(getattr(top, "__path__", ())), top.__file__)
    if place is None:
        raise InputError("it has no file, so that no worker could import it.")
    return Path(place)


def _reason(name: str, error: BaseException) -> str:
    """What went wrong, and where in the plugin."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}. Install it, or give the path of a .py file."
    if isinstance(error, InputError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    return f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno})"
