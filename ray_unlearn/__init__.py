"""Distributed search and merging for LLM unlearning.

`run`, `evaluate`, `score` and `merge` are imported when first used, so that importing the package
loads none of the heavy libraries.
"""

from __future__ import annotations

from typing import Any

from ray_unlearn.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "evaluate", "merge", "run", "score", "train"]

_HOMES = {
    "run": "ray_unlearn.pipeline.run",
    "evaluate": "ray_unlearn.api.evaluation",
    "merge": "ray_unlearn.api.merging",
    "score": "ray_unlearn.api.evaluation",
    "train": "ray_unlearn.api.training",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
