"""Dominance, the front and the hypervolume against slow definitions."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from ray_unlearn.pareto import dominates, feasible, front, hypervolume


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 1, 1), (1, 1, 1), False),
        ((1, 1, 2), (1, 1, 1), True),
        ((1, 1, 1), (1, 1, 2), False),
        ((2, 0, 1), (1, 1, 1), False),
        ((2, 2, 2), (1, 1, 1), True),
        ((0.5,), (0.25,), True),
    ],
)
def test_dominance_table(a, b, expected):
    assert dominates(a, b) is expected


def test_points_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        dominates((1, 2), (1, 2, 3))


def coarse_points(rng, count, size=3):
    """Points on a coarse grid, so that ties and duplicates are common."""
    return [tuple(rng.randint(0, 4) / 4 for _ in range(size)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(60))
def test_front_is_what_nothing_beats_each_point_once(seed):
    points = coarse_points(random.Random(seed), seed % 13)
    kept, seen = [], set()
    for i, p in enumerate(points):
        beaten = False
        for q in points:
            if q != p and q[0] >= p[0] and q[1] >= p[1] and q[2] >= p[2]:
                beaten = True
        if not beaten and p not in seen:
            kept.append(i)
            seen.add(p)
    assert front(points) == kept


def test_of_equal_points_the_first_stays():
    assert front([(0, 0, 1), (1, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0)]) == [0, 1]
    assert front([]) == []


def inclusion_exclusion(points, reference):
    """Volume of the union of boxes: the signed sum over all subsets of the volume of their intersection."""
    volume = 0.0
    for size in range(1, len(points) + 1):
        for subset in combinations(points, size):
            box = 1.0
            for axis, floor in enumerate(reference):
                box *= max(0.0, min(p[axis] for p in subset) - floor)
            volume += (-1) ** (size + 1) * box
    return volume


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_hypervolume_is_the_volume_of_the_union_of_boxes(seed, size):
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    points = (
        coarse_points(rng, count, size) if seed % 2 else [[rng.random() for _ in range(size)] for _ in range(count)]
    )
    reference = [0.0] * size if seed % 3 else [rng.uniform(0, 0.5) for _ in range(size)]
    assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-12)


def test_known_staircases():
    assert hypervolume([(1, 1, 1)]) == 1
    assert hypervolume([(0.5, 0.5, 0.5)]) == pytest.approx(0.125)
    assert hypervolume([(1, 2), (2, 1)], (0, 0)) == 3
    assert hypervolume([(3, 1), (2, 2), (1, 3)], (0, 0)) == 6
    assert hypervolume([(2, 1, 1), (1, 2, 1), (1, 1, 2)]) == 4
    assert hypervolume([(3, 1), (2, 2), (1, 3)], (1, 1)) == 1


def test_nothing_at_or_under_the_reference_point_counts():
    assert hypervolume([]) == 0
    assert hypervolume([(0, 1, 1), (1, 1, 0), (0, 0, 0), (-1, 5, 5)]) == 0
    assert hypervolume([(0.5, 0.5, 0.5), (0, 1, 1), (9, 9, -1)]) == pytest.approx(0.125)


@pytest.mark.parametrize("seed", range(20))
def test_order_repetition_and_dominated_points_change_nothing(seed):
    rng = random.Random(seed)
    points = [tuple(rng.random() for _ in range(3)) for _ in range(8)]
    whole = hypervolume(points)
    assert hypervolume(rng.sample(points, 8)) == pytest.approx(whole, rel=1e-12)
    assert hypervolume(points + points) == pytest.approx(whole, rel=1e-12)
    assert hypervolume([points[i] for i in front(points)]) == pytest.approx(whole, rel=1e-12)
    assert hypervolume([tuple(reversed(point)) for point in points]) == pytest.approx(whole, rel=1e-12)
    assert hypervolume([*points, (2, 2, 2)]) == pytest.approx(8, rel=1e-12)


def test_feasible_is_strictly_above_the_share_of_the_target():
    assert feasible(0.76, 1.0, 0.75) and not feasible(0.75, 1.0, 0.75) and not feasible(0.2, 0.4, 0.75)
