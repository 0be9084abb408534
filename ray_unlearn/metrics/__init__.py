"""Metrics: pure functions of texts, losses and probabilities, and the table of what a model can be scored by.

A family of metrics is a file; its rows of the table stand at its end.
"""

from __future__ import annotations

from ray_unlearn.metrics import aggregate, generation, membership, memorisation, privacy
from ray_unlearn.metrics.aggregate import cell_terms, final_score, harmonic_mean, row_values, task_terms
from ray_unlearn.metrics.generation import exact_match
from ray_unlearn.metrics.intervals import objective_intervals, with_documents
from ray_unlearn.metrics.membership import auc, mia_score
from ray_unlearn.metrics.table import Metric
from ray_unlearn.tables import Table

_FAMILIES = (aggregate, generation, memorisation, membership, privacy)
METRICS = Table("metric", Metric, {name: row for family in _FAMILIES for name, row in family.METRICS.items()})

__all__ = [
    "METRICS",
    "Metric",
    "auc",
    "cell_terms",
    "exact_match",
    "final_score",
    "harmonic_mean",
    "mia_score",
    "objective_intervals",
    "row_values",
    "task_terms",
    "with_documents",
]
