"""Bootstrap intervals, all resamples at once, side by side with plain loops over the same numbers of rows and pairs.

    python benchmarks/intervals.py [resamples]

Prints milliseconds of both and their ratio, the best of three runs each.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from statistics import fmean, harmonic_mean

from ray_unlearn.metrics.intervals import RowValue, aggregate_resamples, membership_resamples


def loop_aggregate(rows: list[RowValue], resamples: int) -> list[float]:
    """Copies whole documents of each split and task, then means and their harmonic mean, one resample at a time."""
    rng = random.Random(0)
    strata: dict[tuple[str, ...], dict[str, list[RowValue]]] = {}
    for row in rows:
        strata.setdefault(tuple(row.cell.split("/")[:2]), {}).setdefault(row.document, []).append(row)
    found = []
    for _ in range(resamples):
        cells: dict[str, list[float]] = {}
        for documents in strata.values():
            for name in rng.choices(list(documents), k=len(documents)):
                for row in documents[name]:
                    cells.setdefault(row.cell, []).append(row.value)
        means = {cell: fmean(values) for cell, values in cells.items()}
        found.append(harmonic_mean([1 - m if cell.startswith("forget") else m for cell, m in means.items()]))
    return found


def loop_auc(members: list[float], nonmembers: list[float], resamples: int) -> list[float]:
    """Compares every pair of every resample."""
    rng = random.Random(0)
    found = []
    for _ in range(resamples):
        mine, others = rng.choices(members, k=len(members)), rng.choices(nonmembers, k=len(nonmembers))
        wins = sum((m < n) + 0.5 * (m == n) for m in mine for n in others)
        found.append(wins / (len(mine) * len(others)))
    return found


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def main() -> None:
    resamples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rng = random.Random(0)
    rows = [
        RowValue(f"{split}/Task{task}/{kind}", f"{task}-{number}", rng.uniform(0.2, 0.8))
        for split in ("forget", "retain")
        for task in range(3)
        for number in range(25)
        for kind in ("sc", "qa")
    ]
    members, nonmembers = ([rng.gauss(mean, 1) for _ in range(150)] for mean in (2.0, 2.3))
    pairs = (
        (
            "task aggregate, 300 rows",
            lambda: aggregate_resamples(rows, resamples),
            lambda: loop_aggregate(rows, resamples),
        ),
        (
            "AUC and TPR, 150 x 150 documents",
            lambda: membership_resamples(members, nonmembers, resamples=resamples),
            lambda: loop_auc(members, nonmembers, resamples),
        ),
    )
    for name, ours, loop in pairs:
        fast, slow = milliseconds(ours), milliseconds(loop)
        print(f"{name}, {resamples} resamples: {fast:.1f} ms, loop {slow:.0f} ms, {slow / fast:.0f} times faster")


if __name__ == "__main__":
    main()
