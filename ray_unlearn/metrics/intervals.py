"""Bootstrap intervals of the objectives, all resamples at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_unlearn.metrics.aggregate import cell_terms, harmonic_mean
from ray_unlearn.metrics.bootstrap import RESAMPLES, Floats, limits, resample
from ray_unlearn.metrics.membership import auc, membership_resamples, mia_score
from ray_unlearn.records import document_id


@dataclass(frozen=True)
class RowValue:
    """What one row scored: its cell (split/task/metric), its document, and the metric's value before any inversion."""

    cell: str
    document: str
    value: float


def with_documents(values: Sequence[tuple[str, float]], row_ids: Sequence[str]) -> list[RowValue]:
    """What `row_values` gave, with the document of each row."""
    return [RowValue(cell, document_id(row), value) for (cell, value), row in zip(values, row_ids, strict=True)]


def aggregate_resamples(rows: Sequence[RowValue], resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """[resamples] task aggregates. Documents are drawn among those of the same split and task that have rows of the
    same kinds, so that no cell of a resample is empty; all rows of a drawn document come with it."""
    cells = {cell: place for place, cell in enumerate(sorted({row.cell for row in rows}))}
    documents: dict[tuple[str, str], int] = {}
    for row in rows:
        documents.setdefault((row.cell.partition("/")[0], row.document), len(documents))
    sums = np.zeros((2, len(documents), len(cells)))  # of the values, and of the rows
    for row in rows:
        sums[:, documents[row.cell.partition("/")[0], row.document], cells[row.cell]] += (row.value, 1)
    strata: dict[bytes, list[int]] = {}
    for place, counts in enumerate(sums[1]):
        strata.setdefault((counts > 0).tobytes(), []).append(place)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((2, resamples, len(cells)))
    for members in strata.values():
        drawn += resample(len(members), resamples, rng) @ sums[:, members]
    means = drawn[0] / drawn[1]
    inverted = np.array([cell.startswith("forget/") for cell in cells])
    return _harmonic_means(np.where(inverted, 1 - means, means))


def _harmonic_means(terms: Floats) -> Floats:
    """Of each row of terms; 0 where one of them is 0."""
    positive = (terms > 0).all(axis=1)
    return np.where(positive, terms.shape[1] / (1 / np.where(terms > 0, terms, 1.0)).sum(axis=1), 0.0)


def mia_score_interval(area: Sequence[float]) -> list[float]:
    """The scores of all AUCs in an interval: 1 - 2 |AUC - 0.5|.

    Quantiles of resampled scores would never reach 1, the value of perfect forgetting, since noise only lowers them.
    """
    ends = [mia_score(area[0]), mia_score(area[1])]
    return [min(ends), 1.0 if area[0] <= 0.5 <= area[1] else max(ends)]


def mean_of_parts(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[float]:
    """Interval of the mean of independently measured parts from those of the parts (MOVER, Zou & Donner 2008).

    Each side's distances from the values add in squares.
    """
    mean = sum(values) / len(values)
    down, up = (
        math.sqrt(sum((part[side] - value) ** 2 for value, part in zip(values, intervals, strict=True))) / len(values)
        for side in (0, 1)
    )
    return [mean - down, mean + up]


def final_interval(
    values: tuple[float, float, float], intervals: tuple[Sequence[float], Sequence[float], Sequence[float]]
) -> list[float]:
    """Interval of the final score from task aggregate, MIA AUC and utility with their intervals.

    The score is the lesser of two smooth ones, with 1 - 2 (AUC - 0.5) and 1 + 2 (AUC - 0.5) for the MIA score, so
    its ends are the lesser ends; the MIA score's own interval would not do, since its error has one sign near AUC 0.5.
    """
    (aggregate, area, utility), (of_aggregate, of_area, of_utility) = values, intervals
    lows, highs = [], []
    for slope in (2, -2, 0):  # 0: no MIA score is above 1
        ends = sorted(1 - slope * (end - 0.5) for end in of_area)
        parts = [aggregate, 1 - slope * (area - 0.5), utility]
        low, high = mean_of_parts(parts, [of_aggregate, ends, of_utility])
        lows.append(low)
        highs.append(high)
    return [min(lows), min(highs)]


def objective_intervals(
    rows: Sequence[RowValue] = (),
    *,
    members: Sequence[float] = (),
    nonmembers: Sequence[float] = (),
    right: Sequence[bool] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % intervals of what was measured: task_aggregate, mia_auc and mia_score, utility, and final if all were.

    `rows` are the forget and retain rows, `members` and `nonmembers` mean losses of MIA documents, `right` says
    of each utility question whether it was answered. An interval shows the noise of drawing rows, not that of
    training; where all rows agree it has no width, which is no certainty. Raises InputError as `auc` does.
    """
    found: dict[str, list[float]] = {}
    if len(rows):
        aggregate = harmonic_mean(list(cell_terms((row.cell, row.value) for row in rows)[0].values()))
        found["task_aggregate"] = limits(aggregate_resamples(rows, resamples, seed), aggregate)
    if len(members) or len(nonmembers):
        area = auc(members, nonmembers)
        found["mia_auc"] = limits(membership_resamples(members, nonmembers, resamples=resamples, seed=seed)[0], area)
        found["mia_score"] = mia_score_interval(found["mia_auc"])
    if len(right):
        utility = sum(right) / len(right)
        drawn = np.random.default_rng(seed).binomial(len(right), utility, resamples)
        found["utility"] = limits(drawn / len(right), utility)
    if len(found) == 4:
        ends = (found["task_aggregate"], found["mia_auc"], found["utility"])
        found["final"] = final_interval((aggregate, area, utility), ends)
    return found
