"""Dominance, the front and the hypervolume against slow definitions."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest

from ray_unlearn.pareto import Front, dominates, feasible, front, hypervolume


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


def slow_front(points):
    """Every point against every other."""
    return [
        i
        for i, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
        and not any(tuple(points[j]) == tuple(point) for j in range(i))
    ]


def slow_hypervolume(points, reference):
    """Slices along the last objective, each with all the points that reach it: cubic for three objectives."""
    inside = [tuple(point) for point in points if all(x > r for x, r in zip(point, reference, strict=True))]
    if not inside or len(reference) == 1:
        return max(point[0] for point in inside) - reference[0] if inside else 0.0
    heights = sorted({point[-1] for point in inside}, reverse=True)
    return sum(
        (top - floor) * slow_hypervolume([point[:-1] for point in inside if point[-1] >= top], reference[:-1])
        for top, floor in zip(heights, heights[1:] + [reference[-1]], strict=True)
    )


def mixed_points(rng, count, size):
    """Points of which some share coordinates, repeat, or lie under the reference point."""
    return [tuple(rng.choice([rng.random(), rng.randint(-1, 4) / 4]) for _ in range(size)) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_front_that_grows_is_the_slow_one_after_every_point(size):
    for seed in range(60):
        rng = random.Random(seed)
        reference = [0.0] * size if seed % 2 else [rng.uniform(0, 0.4) for _ in range(size)]
        points = mixed_points(rng, 3 + seed % 20, size)
        grown = Front(reference)
        for number, point in enumerate(points):
            so_far = points[: number + 1]
            assert grown.add(number, point) == (number in slow_front(so_far))
            assert sorted(grown.points) == slow_front(so_far) == front(so_far)
            assert grown.volume == pytest.approx(slow_hypervolume(so_far, reference), abs=1e-12)
            assert hypervolume(so_far, reference) == pytest.approx(slow_hypervolume(so_far, reference), abs=1e-12)


def test_thousands_of_points_take_no_seconds():
    """The cubic form took 9 s for 400 points, the quadratic front 30 s for 5,000."""
    rng = random.Random(0)
    points = [tuple(rng.random() for _ in range(3)) for _ in range(5000)]
    began, grown = time.process_time(), Front()
    for number, point in enumerate(points):
        grown.add(number, point)
    assert front(points) == sorted(grown.points)
    assert hypervolume(points) == pytest.approx(grown.volume, rel=1e-9)
    assert time.process_time() - began < 1


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
