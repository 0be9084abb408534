"""Merging: pure functions of weight deltas, one table of methods, and the recipe that names a merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.merging.deltas import linear, task_arithmetic, ties


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method: (deltas, weights, densities, lambda) -> delta, for one tensor."""

    combine: Callable[[list[Tensor], list[float], list[float], float], Tensor]
    uses_density: bool
    formula: str
    source: str


MERGES: dict[str, MergeMethod] = {
    "ties": MergeMethod(
        combine=ties,
        uses_density=True,
        formula="lambda * sum_agreeing(w_i top_density(d_i)) / sum_agreeing(w_i); sign elected by sum_i w_i top(d_i)",
        source="Yadav et al. 2023 (arXiv 2306.01708), weighted and per tensor as in mergekit's `ties`",
    ),
    "linear": MergeMethod(
        combine=linear,
        uses_density=False,
        formula="lambda * sum(w_i d_i) / sum(w_i)",
        source="weight averaging (Wortsman et al. 2022, arXiv 2203.05482) on deltas",
    ),
    "task_arithmetic": MergeMethod(
        combine=task_arithmetic,
        uses_density=False,
        formula="lambda * sum(w_i d_i)",
        source="Ilharco et al. 2023 (arXiv 2212.04089)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """All that decides a merge: applied to the same members it gives the same weights."""

    method: str = "ties"
    members: list[str] = field(default_factory=list)
    """Snapshot ids, or adapter directories."""
    weights: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    """Share of each member's delta entries that is kept, by magnitude, within each tensor."""
    lambda_: float = 1.0
    """Multiple of the merged delta that is added to the base."""

    def __post_init__(self) -> None:
        if self.method not in MERGES:
            raise unknown_name("merge method", self.method, MERGES)
        count = len(self.members)
        if count == 0:
            raise InputError("a merge needs at least one member, got none.")
        for name, values in (("weights", self.weights), ("densities", self.densities)):
            if len(values) != count:
                raise InputError(f"a merge of {count} members needs {count} {name}, got {len(values)}: {values}.")
        for value in (*self.weights, self.lambda_):
            if not math.isfinite(value):
                raise InputError(f"weights and lambda must be finite, got {self.weights} and {self.lambda_}.")
        for density in self.densities:
            if not 0 < density <= 1:
                raise InputError(f"a density must be above 0 and at most 1, got {density}.")
        if sum(self.weights) <= 0 and self.method != "task_arithmetic":
            raise InputError(f"the weights of a {self.method} merge must sum to more than 0, got {self.weights}.")

    def to_json(self) -> dict[str, Any]:
        """As records and cards write it: the field that Python cannot name is `lambda` there."""
        data = asdict(self)
        return {**{key: value for key, value in data.items() if key != "lambda_"}, "lambda": self.lambda_}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MergeRecipe:
        """The inverse of to_json."""
        return cls(**{"lambda_" if key == "lambda" else key: value for key, value in data.items()})

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """The merged delta of one tensor; `deltas` in the order of the members."""
        return MERGES[self.method].combine(deltas, self.weights, self.densities, self.lambda_)
