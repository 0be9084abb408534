"""The plain search space of a method: whatever of its parameters and of a trial's fields has a search range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.losses import METHODS, OPTIONS, parameters_of
from ray_unlearn.protocols import Suggests
from ray_unlearn.schema import Option, Range, declared, suggest

__all__ = ["Range", "plain", "searched"]
BEFORE = ("tuning", "schedule")
AFTER = ("learning_rate", "epochs", "lora_rank", "repair_epochs", "repair_scale", "chunk_size")
"""Fields of every method that are asked before and after its own; what a seeded search draws hangs on the order."""


def plain(trial: Suggests, method: str, *, first: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """The fields and options of one trial.

    `changes` are what is special to a space: a Range or a tuple of choices in place of a parameter's own, or any other
    value, which is given and not asked. `first` are asked before the method's other parameters (a space keeps its
    order, or a seeded search draws other trials).
    """
    rows = _rows()
    config: dict[str, Any] = {"method": method, "retain_per_forget": 2 if METHODS[method].retain else 0}
    for name in dict.fromkeys([*BEFORE, *first, *searched(method), *changes]):
        search = changes.get(name, rows[name].search)
        needs = rows[name].searched_if
        if needs is None or config.get(needs[0]) == needs[1]:
            config[name] = suggest(search, trial, name) if isinstance(search, (Range, tuple)) else search
    return config


def searched(method: str) -> list[str]:
    """The parameters that have a search range, in the order in which they are asked: BEFORE, the method's own, AFTER,
    then fields that none of the three name.

    Of the method's own, choices come before ranges, and weights last. A weight that is the only one is not asked: AdamW
    takes out a loss's scale.
    """
    rows, read = _rows(), parameters_of(method)
    weights = [name for name in read if name.endswith("_weight")]
    own = sorted((name for name in read if name not in weights), key=lambda name: isinstance(rows[name].search, Range))
    shared = {name for other in METHODS for name in parameters_of(other)}
    others = [name for name in rows if name not in shared and name not in OPTIONS]
    names = [*BEFORE, *own, *(weights if len(weights) > 1 else ()), *AFTER, *others]
    return [name for name in dict.fromkeys(names) if rows[name].search is not None]


def _rows() -> dict[str, Option]:
    return {**declared(TrialConfig), **OPTIONS}
