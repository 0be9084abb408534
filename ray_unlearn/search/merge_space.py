"""Which merges the search tries: its parameters, its first points, the segment it bisects, and when it has seen enough.

Pure: a trial is whatever has Optuna's suggest methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ray_unlearn.merging.methods import MERGES, MergeMethod
from ray_unlearn.merging.recipe import Graded, MergeRecipe
from ray_unlearn.pareto import Front, Point
from ray_unlearn.protocols import Suggests
from ray_unlearn.records import Scores
from ray_unlearn.schema import suggest

FIRST_DENSITY = 0.8
"""ZJUKLAB's (arXiv 2503.21088)."""
WEIGHTS = (0.1, 10.0)
"""Of another member over the first's."""
LAMBDAS = {"lambda": (0.6, 1.4), "lambda_of_sum": (0.6, 2.0)}
"""Of means, and of sums, whose weights add up to one here: at 2 two equal members are added whole."""
SEGMENT_STEPS, SEGMENT_TOLERANCE = 5, 0.01
"""Bisections at most, and the distance of the MIA's AUC from 0.5 that ends them."""
GROWTH = 1e-9
"""Hypervolume under which nothing has grown."""


@dataclass(frozen=True, kw_only=True)
class MergeSpace:
    """What the search over merges chooses from."""

    snapshots: Sequence[str]
    """Ids, sorted by the MIA's AUC so that near numbers mean near models."""
    aucs: Sequence[float]
    methods: Sequence[str]
    max_members: int
    remerged: int = 0
    """Merges that may become members themselves."""
    layerwise: bool = False
    """Whether weights may change from the first layer to the last."""

    def suggest(self, trial: Suggests, merges: Mapping[str, MergeRecipe] | None = None) -> MergeRecipe:
        """A merge of 2 to `max_members` of the snapshots and of the `merges` that joined them, in order of joining.

        A member drawn twice gives way to the next one that is free; a place that no merge has taken
        yet stands for a snapshot.
        """
        method = trial.suggest_categorical("method", list(self.methods)) if len(self.methods) > 1 else self.methods[0]
        joined = {} if MERGES[method].on_factors else dict(merges or {})  # a merge has no factors
        pool = [*self.snapshots, *joined]
        most = min(self.max_members, len(self.snapshots))
        count = trial.suggest_int("members", 2, most) if most > 2 else most
        count = min(count, MERGES[method].most or count)
        taken: list[int] = []
        for place in range(count):
            index = trial.suggest_int(f"member_{place}", 0, len(self.snapshots) + self.remerged - 1) % len(pool)
            while index in taken:
                index = (index + 1) % len(pool)
            taken.append(index)
        members = [pool[index] for index in taken]
        return MergeRecipe(
            method=method,
            members=members,
            weights=self._weights(trial, method, count),
            densities=[_density(trial, method)] * count,
            lambda_=trial.suggest_float(_lambda(method), *LAMBDAS[_lambda(method)]),
            options=_own_numbers(trial, method),
            merges={name: joined[name] for name in members if name in joined},
        )

    def _weights(self, trial: Suggests, method: str, count: int) -> list[Graded]:
        """Weights that sum to one: only their ratios matter to normalised methods; the first is the unit."""
        if not MERGES[method].uses_weights:
            return [1.0 / count] * count
        graded = self.layerwise and trial.suggest_categorical("layerwise", [False, True])
        ends = []
        for suffix in ("", "_last") if graded else ("",):
            weights = [1.0] + [
                trial.suggest_float(f"weight_{place}{suffix}", *WEIGHTS, log=True) for place in range(1, count)
            ]
            ends.append([weight / sum(weights) for weight in weights])
        if not graded:
            return list(ends[0])
        return [list(pair) for pair in zip(*ends, strict=True)]

    def first_points(self) -> list[dict[str, object]]:
        """Both ends, then neighbours from an AUC of 0.5 outwards, at equal weights and ZJUKLAB's density."""
        last = len(self.aucs) - 1
        pairs = [(0, last)] + sorted(
            ((index, index + 1) for index in range(last)),
            key=lambda pair: abs(self.aucs[pair[0]] + self.aucs[pair[1]] - 1),
        )
        return [self._pair(a, b, self.methods[0], FIRST_DENSITY, 1.0) for a, b in dict.fromkeys(pairs)]

    def _pair(self, a: int, b: int, method: str, density: float, weight: float) -> dict[str, object]:
        point: dict[str, object] = {"member_0": a, "member_1": b, "density": density, "weight_1": weight}
        point[_lambda(method)] = 1.0
        point[_density_name(method)] = min(density, MERGES[method].densities.high)
        if len(self.methods) > 1:
            point["method"] = method
        if self.layerwise:
            point["layerwise"] = False
        if min(self.max_members, len(self.snapshots)) > 2:
            point["members"] = 2
        return point

    def segment_point(self, known: Sequence[tuple[MergeRecipe, Scores | None]]) -> dict[str, object] | None:
        """The next point of the segment between the most over- and the most under-unlearned snapshot, given what was
        scored: its MIA AUC is bisected towards 0.5. None where 0.5 is not between them, or the bisection is done.

        The segment is `linear`'s where the job offers it, else the first method's with everything kept.
        """
        if not self.aucs[0] < 0.5 < self.aucs[-1]:
            return None
        tried = [(self._share(recipe), scores) for recipe, scores in known]
        points = [(share, scores.mia_auc if scores else None) for share, scores in tried if share is not None]
        share = bisected(points)
        if share is None:
            return None
        return self._pair(0, len(self.aucs) - 1, self._segment_method, 1.0, share / (1 - share))

    @property
    def _segment_method(self) -> str:
        return "linear" if "linear" in self.methods else self.methods[0]

    def _share(self, recipe: MergeRecipe) -> float | None:
        """Where on the segment a merge lies: the under-unlearned end's share, or None where it does not."""
        ends = [self.snapshots[0], self.snapshots[-1]]
        if not is_plain(recipe) or recipe.method != self._segment_method or recipe.members != ends:
            return None
        share = recipe.weights[1]
        return None if isinstance(share, list) else share / (recipe.weights[0] + share)  # type: ignore[operator]


def _lambda(method: str) -> str:
    """The name under which a method's lambda is drawn."""
    row = MERGES[method]
    return "lambda_of_sum" if "normalize" in row.parameters and not row.normalize else "lambda"


def _density_name(method: str) -> str:
    """The name under which a method's density is drawn: that of all methods with the same range."""
    return "density" if MERGES[method].densities == MergeMethod.densities else f"{method}_density"


def _density(trial: Suggests, method: str) -> float:
    row = MERGES[method]
    return cast(float, suggest(row.densities, trial, _density_name(method))) if row.uses_density else 1.0


def _own_numbers(trial: Suggests, method: str) -> dict[str, float]:
    """Those of a method's own numbers that have a search range."""
    rows = {name: row.search for name, row in MERGES[method].options.items()}
    return {name: cast(float, suggest(search, trial, name)) for name, search in rows.items() if search is not None}


def bisected(points: Sequence[tuple[float, float | None]]) -> float | None:
    """The share to try next, given (share, AUC) pairs of a segment whose AUC goes from below 0.5 at 0 to above at 1.

    None once an AUC is near enough, the steps are used up, one failed, or the AUC is not monotonic.
    """
    low, high = 1 / (1 + WEIGHTS[1]), WEIGHTS[1] / (1 + WEIGHTS[1])
    for share, area in points:
        if area is None or abs(area - 0.5) <= SEGMENT_TOLERANCE:
            return None
        low, high = (max(low, share), high) if area < 0.5 else (low, min(high, share))
    return (low + high) / 2 if low < high and len(points) < SEGMENT_STEPS else None


class Growth:
    """The front of what is feasible as merges come in, how long its hypervolume has not grown, and which merges joined
    the pool."""

    def __init__(self, points: Sequence[Point], utility_floor: float, remerged: int = 0) -> None:
        self.front: Front[int | str] = Front()
        for number, point in enumerate(points):
            self.front.add(number, point)
        self.volume = self.front.volume
        """The hypervolume when it last grew."""
        self.idle = 0
        """Merges since then."""
        self.joined: dict[str, MergeRecipe] = {}
        """Merges that were on the front when they came, the first `remerged` of them; none of merges."""
        self.plain: list[tuple[MergeRecipe, Scores | None]] = []
        """Merges that change nothing but the weights: those of the segment are among them."""
        self._floor, self._remerged = utility_floor, remerged

    def add(self, name: str, recipe: MergeRecipe, scores: Scores | None) -> None:
        """Takes a merge that has ended; `scores` is None where it failed."""
        if is_plain(recipe):
            self.plain.append((recipe, scores))
        self.idle += 1
        if scores is None or not (scores.utility or 0.0) > self._floor:
            return
        on_front = self.front.add(name, scores.objectives())
        if self.front.volume > self.volume + GROWTH:
            self.volume, self.idle = self.front.volume, 0
        if on_front and len(self.joined) < self._remerged and not recipe.merges:
            self.joined[name] = recipe

    def stalled(self, patience: int) -> bool:
        """Whether the last `patience` merges brought nothing; never with a patience of 0."""
        return 0 < patience <= self.idle


def is_plain(recipe: MergeRecipe) -> bool:
    """Whether nothing is thinned out or scaled."""
    return all(number == 1.0 for number in (recipe.lambda_, *recipe.densities))
