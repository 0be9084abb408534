"""Metrics: pure functions of strings, losses and probabilities; one table with direction and range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray_unlearn.metrics.aggregate import final_score, harmonic_mean, task_terms
from ray_unlearn.metrics.generation import exact_match, rouge_l_recall
from ray_unlearn.metrics.membership import auc, mia_score

__all__ = ["METRICS", "Metric", "auc", "exact_match", "final_score", "harmonic_mean", "mia_score", "task_terms"]


@dataclass(frozen=True)
class Metric:
    """A metric with the direction that is better on retain data, its range, and its source."""

    compute: Callable[..., Any]
    higher_is_better: bool
    range: tuple[float, float]
    source: str


OFFICIAL = "SemEval-2025 Task 4, official evaluation"
METRICS: dict[str, Metric] = {
    "regurgitation": Metric(rouge_l_recall, True, (0, 1), OFFICIAL),
    "knowledge": Metric(exact_match, True, (0, 1), OFFICIAL),
    "task_aggregate": Metric(harmonic_mean, True, (0, 1), OFFICIAL),
    "mia_score": Metric(mia_score, True, (0, 1), OFFICIAL),
    "final": Metric(final_score, True, (0, 1), OFFICIAL),
}
