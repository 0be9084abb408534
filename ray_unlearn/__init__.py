"""Distributed search and merging for LLM unlearning.

    from ray_unlearn import run
    result = run("job.yaml", out="runs/mine")
    print(result.choice, result.best.final)

The names below are imported when first used, so that importing the package loads none of the heavy libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_unlearn.errors import InputError

if TYPE_CHECKING:
    from ray_unlearn.api.evaluation import Outputs, evaluate, score
    from ray_unlearn.api.merging import merge
    from ray_unlearn.api.training import train
    from ray_unlearn.cluster.evaluators import WorkerPool
    from ray_unlearn.config.job import Job
    from ray_unlearn.config.trial import TrialConfig
    from ray_unlearn.merging.recipe import MergeRecipe
    from ray_unlearn.pipeline.run import RunResult, run
    from ray_unlearn.records import Scores, TrialRecord

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Job",
    "MergeRecipe",
    "Outputs",
    "RunResult",
    "Scores",
    "TrialConfig",
    "TrialRecord",
    "WorkerPool",
    "evaluate",
    "merge",
    "run",
    "score",
    "train",
]

_HOMES = {
    "Job": "ray_unlearn.config.job",
    "MergeRecipe": "ray_unlearn.merging.recipe",
    "Outputs": "ray_unlearn.api.evaluation",
    "RunResult": "ray_unlearn.pipeline.run",
    "Scores": "ray_unlearn.records",
    "TrialConfig": "ray_unlearn.config.trial",
    "TrialRecord": "ray_unlearn.records",
    "WorkerPool": "ray_unlearn.cluster.evaluators",
    "evaluate": "ray_unlearn.api.evaluation",
    "merge": "ray_unlearn.api.merging",
    "run": "ray_unlearn.pipeline.run",
    "score": "ray_unlearn.api.evaluation",
    "train": "ray_unlearn.api.training",
}


def __getattr__(name: str) -> object:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
