"""Dominance, hypervolume and choice over the three objectives, all maximised. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

OBJECTIVES = ("task_aggregate", "mia_score", "utility")
REFERENCE_POINT = (0.0, 0.0, 0.0)

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good as `b` in every objective and better in one."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, in order; of equal points the first."""
    kept = []
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        repeated = any(tuple(points[j]) == tuple(point) for j in range(i))
        if not beaten and not repeated:
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Point], reference: Point = REFERENCE_POINT) -> float:
    """Volume that the points dominate above the reference point, any number of objectives.

    Exact, by slices along the last objective: between two neighbouring heights the slice is the
    volume, one dimension lower, of the points that reach the upper one.
    """
    inside = [tuple(point) for point in points if all(x > r for x, r in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return max(point[0] for point in inside) - reference[0]
    heights = sorted({point[-1] for point in inside}, reverse=True)
    floors = heights[1:] + [reference[-1]]
    return sum(
        (top - floor) * hypervolume([point[:-1] for point in inside if point[-1] >= top], reference[:-1])
        for top, floor in zip(heights, floors, strict=True)
    )


def feasible(utility: float, target_utility: float, floor: float) -> bool:
    """Whether a candidate's utility is above `floor` times the target's."""
    return utility > floor * target_utility
