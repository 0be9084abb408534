"""Merge methods on one front, at equal budgets: what each adds to the single snapshots of the same trials.

    python benchmarks/merging_methods.py [--job jobs/merging_embedded.yaml] [--seeds 0 1 2] [--out runs/merging]
        [--methods ties,linear ties ties_factors linear task_arithmetic]

The job is run once for each seed with its own merge methods; every other choice of methods then searches merges of
the same trials' snapshots in a directory of its own. Names joined by a comma are searched together, in one budget.
Prints a table as Markdown. All runs resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn import run
from ray_unlearn.progress import Progress
from ray_unlearn.records import load_records

DEFAULT = ["ties,linear", "ties", "ties_factors", "linear", "task_arithmetic"]


def take_trials(source: Path, place: Path) -> None:
    """Starts a run's directory with another's trials: their records, their snapshots, the target's scores."""
    if place.exists():
        return
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "records").mkdir(parents=True)
    for path in (source / "records").glob("trial-*.json"):
        shutil.copy(path, temporary / "records")
    shutil.copy(source / "baseline.json", temporary)
    shutil.copytree(source / "snapshots", temporary / "snapshots")
    temporary.rename(place)


def measured(place: Path) -> dict[str, float]:
    """A run's figures: hypervolume with and without merges, best `final` of either kind, how its choice did unseen."""
    front, final = (json.loads((place / name).read_text()) for name in ("front.json", "final.json"))
    trials, merges = load_records(place)
    single = max(s.scores.final for t in trials for s in t.snapshots if s.scores.final is not None)
    return {
        "snapshots": front["hypervolume_trials"],
        "merges": front["hypervolume"],
        "single": single,
        "merged": max((m.scores.final for m in merges if m.scores and m.scores.final is not None), default=0.0),
        "failed": sum(m.scores is None for m in merges),
        "on_front": sum(member["kind"] == "merge" for member in front["members"]),
        "unseen": final["best"]["final"],
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def show(results: dict[str, list[dict[str, float]]]) -> None:
    print("| methods | hypervolume of snapshots | with merges | gain | best `final` of merges | merges on the front |")
    print("|---|---|---|---|---|---|")
    for methods, rows in results.items():
        gains = [row["merges"] - row["snapshots"] for row in rows]
        cells = [spread([row[name] for row in rows]) for name in ("snapshots", "merges")]
        cells += [spread(gains), spread([row["merged"] for row in rows])]
        print(f"| {methods} | {' | '.join(cells)} | {' / '.join(str(int(row['on_front'])) for row in rows)} |")
    singles = [row["single"] for row in next(iter(results.values()))]
    print(f"\nBest `final` of a single snapshot: {spread(singles)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="jobs/merging_embedded.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=DEFAULT)
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    a = parser.parse_args()
    job: dict[str, Any] = yaml.safe_load(Path(a.job).read_text())
    results: dict[str, list[dict[str, float]]] = {methods: [] for methods in a.methods}
    for seed in a.seeds:
        for number, methods in enumerate(a.methods):
            place = a.out / f"seed-{seed}" / methods.replace(",", "+")
            if number:
                take_trials(a.out / f"seed-{seed}" / a.methods[0].replace(",", "+"), place)
            merge = job.get("merge", {}) | {"methods": methods.split(",")}
            run(job | {"seed": seed, "merge": merge}, place, progress=Progress())
            results[methods].append(measured(place))
            print(seed, methods, results[methods][-1], flush=True)
    show(results)


if __name__ == "__main__":
    main()
