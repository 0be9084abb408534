"""Data sets that the project makes, by name, each with a model that knows it."""

from __future__ import annotations

from ray_unlearn.data.benchmarks import embedded
from ray_unlearn.data.benchmarks.table import Dataset
from ray_unlearn.tables import Table

DATASETS = Table("benchmark", Dataset, {"embedded": embedded.DATASET})

__all__ = ["DATASETS", "Dataset"]
