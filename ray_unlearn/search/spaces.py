"""Search spaces: files with `def space(trial) -> dict`, loaded by path in the driver only, and checked before use."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.files import shipped
from ray_unlearn.losses import METHODS, OPTIONS, options_of
from ray_unlearn.protocols import Suggests
from ray_unlearn.schema import from_dict

Space = Callable[[Any], dict[str, Any]]
SAMPLES_CHECKED = 32
COMPOSITE = "composite"
NEEDS_MORE_DATA = ("alt_po",)
"""Spaces that the composite one leaves out: their rows need a column that most data lack."""


def known_spaces() -> dict[str, Path]:
    """The shipped spaces by name."""
    return {path.stem: path for path in sorted(shipped("search_spaces").glob("*.py"))}


def find_space(name: str) -> Path:
    """The file of a shipped space's name, or of a path that ends in .py."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InputError(f"no such search space file: {name}.")
        return Path(name)
    known = known_spaces()
    if name not in known:
        raise unknown_name("search space", name, known)
    return known[name]


class _Narrowed:
    """A trial whose ranges a job has narrowed: same names, other bounds or choices."""

    def __init__(self, trial: Suggests, ranges: dict[str, Any]) -> None:
        self._trial, self._ranges = trial, ranges

    def __getattr__(self, name: str) -> object:
        return getattr(self._trial, name)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        low, high = self._ranges.get(name, (low, high))
        return float(self._trial.suggest_float(name, float(low), float(high), **options))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        low, high = self._ranges.get(name, (low, high))
        return int(self._trial.suggest_int(name, low, high, **options))

    def suggest_categorical(self, name: str, choices: Sequence[object]) -> object:
        return self._trial.suggest_categorical(name, list(self._ranges.get(name, choices)))


def load_space(
    names: Sequence[str], fixed: dict[str, object], ranges: dict[str, object] | None = None
) -> tuple[Space, dict[str, str]]:
    """One space made of several files, and their texts. With more than one, which it is is itself a choice.

    `ranges` of the job replace the bounds or choices of searched parameters by name; `fixed` values
    overrule what a space returns, a method's own parameters only where the method has them. The name
    `composite` stands for all shipped spaces: the method is a choice like any other.
    """
    if COMPOSITE in names:
        names = [name for name in known_spaces() if name not in NEEDS_MORE_DATA]
    if not names:
        raise InputError("search.spaces is empty; name at least one: " + ", ".join(known_spaces()))
    paths = {name: find_space(name) for name in names}
    functions: dict[str, Space] = {}
    for name, path in paths.items():
        try:
            found = runpy.run_path(str(path)).get("space")
        except (Exception, SystemExit) as error:  # a user's file may call sys.exit, which must not end the run as done
            raise InputError(f"the search space {path} cannot be read: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise InputError(f"the search space {path} must define `def space(trial) -> dict`.")
        functions[name] = found
    choices = list(functions)

    def space(trial: Suggests) -> dict[str, object]:
        name = trial.suggest_categorical("space", choices) if len(choices) > 1 else choices[0]
        try:
            returned = functions[name](_Narrowed(trial, ranges or {}))
        except (Exception, SystemExit) as error:
            raise InputError(f"the search space {name} refuses a trial: {type(error).__name__}: {error}") from error
        if not isinstance(returned, dict):
            raise InputError(f"the search space {name} must return a dict of TrialConfig fields, got {returned!r}.")
        own = options_of(returned["method"]) if returned.get("method") in METHODS else ()
        return {**returned, **{key: value for key, value in fixed.items() if key not in OPTIONS or key in own}}

    return space, {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def trial_config(returned: dict[str, object]) -> TrialConfig:
    """The TrialConfig of what a space returned; its unknown keys are refused by name."""
    return from_dict(TrialConfig, returned, "trial")
