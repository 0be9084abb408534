"""Dominance, hypervolume and choice over the objectives, all maximised. Pure."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

OBJECTIVES = ("task_aggregate", "mia_score", "utility")
REFERENCE_POINT = (0.0, 0.0, 0.0)

Point = Sequence[float]
Key = TypeVar("Key", bound=Hashable)


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good as `b` in every objective and better in one."""
    return _covers(a, b) and any(x > y for x, y in zip(a, b, strict=True))


def _covers(a: Point, b: Point) -> bool:
    return all(map(operator.ge, a, b))  # most of a front's work: twice as fast as a generator


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, in order; of equal points the first.

    In falling lexicographic order only earlier points can dominate. The ones that do so most often
    move to the front of the line, so that few points meet all the kept ones.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: ([-x for x in points[i]], i)):
        found = next((place for place, j in enumerate(kept) if _covers(points[j], points[i])), None)
        if found is None:
            kept.append(i)
        else:
            kept.insert(0, kept.pop(found))
    return sorted(kept)


def hypervolume(points: Sequence[Point], reference: Point = REFERENCE_POINT) -> float:
    """Volume that the points dominate above the reference point, any number of objectives.

    Exact, from the top down along the last objective: between a point and the next lower one the slice
    is the volume, one dimension lower, of the points so far. For n points on a front O(n log n) with
    three objectives and O(n^2 log n) with four.
    """
    inside = [point for point in points if all(x > r for x, r in zip(point, reference, strict=True))]
    if len(reference) == 1:
        return max((point[0] for point in inside), default=reference[0]) - reference[0]
    inside.sort(key=lambda point: -point[-1])
    slices: _Staircase | Front[int] = _Staircase(reference) if len(reference) == 3 else Front(reference=reference[:-1])
    floors = [point[-1] for point in inside[1:]] + [reference[-1]]
    total = 0.0
    for number, (point, floor) in enumerate(zip(inside, floors, strict=False)):
        slices.add(number, point[:-1])
        total += (point[-1] - floor) * slices.volume
    return total


class _Staircase:
    """The front and area of two objectives, as points come."""

    def __init__(self, reference: Point) -> None:
        self.volume = 0.0
        self._left, self._floor = reference[:2]
        self._xs: list[float] = []
        """Rising, as the front's second objectives fall."""
        self._ys: list[float] = []

    def add(self, key: object, point: Point) -> None:
        """Takes a point above the reference point."""
        x, y = point
        end = bisect.bisect_left(self._xs, x)
        if end < len(self._xs) and self._ys[end] >= y:
            return
        begin, right, height = end, x, self._ys[end] if end < len(self._xs) else self._floor
        while begin > 0 and self._ys[begin - 1] <= y:  # steps that the point covers
            begin -= 1
            self.volume += (right - self._xs[begin]) * (y - height)
            right, height = self._xs[begin], self._ys[begin]
        self.volume += (right - (self._xs[begin - 1] if begin > 0 else self._left)) * (y - height)
        end += end < len(self._xs) and self._xs[end] == x
        self._xs[begin:end], self._ys[begin:end] = [x], [y]


class Front(Generic[Key]):
    """The points that no other dominates and their hypervolume, kept as points come: O(front) for each of three
    objectives, of equal points the first."""

    def __init__(self, reference: Point = REFERENCE_POINT) -> None:
        self.points: dict[Key, Point] = {}
        """The front, in order of coming."""
        self.volume = 0.0
        self._reference = reference

    def add(self, key: Key, point: Point) -> bool:
        """Takes a point; whether it is on the front, from which it drops what it dominates."""
        beaten = []
        for other, held in self.points.items():
            if _covers(held, point):
                return False
            if _covers(point, held):
                beaten.append(other)
        self.volume += self._growth(point)
        for other in beaten:
            del self.points[other]
        self.points[key] = tuple(point)
        return True

    def _growth(self, point: Point) -> float:
        """The volume that the point alone dominates: its own box without what the others dominate of it."""
        if not all(x > r for x, r in zip(point, self._reference, strict=True)):
            return 0.0
        box = 1.0
        for x, r in zip(point, self._reference, strict=True):
            box *= x - r
        within = [tuple(map(min, point, other)) for other in self.points.values()]
        return box - hypervolume(within, self._reference)


def feasible(utility: float, target_utility: float, floor: float) -> bool:
    """Whether a candidate's utility is above `floor` times the target's."""
    return utility > floor * target_utility
