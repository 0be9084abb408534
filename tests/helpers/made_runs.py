"""Run directories that were never run, for the report to show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import yaml

from ray_unlearn.files import write_json
from ray_unlearn.pareto import front, hypervolume
from ray_unlearn.records import Candidate, MergeRecord, Scores, Snapshot, TrialRecord, candidates, save_record
from ray_unlearn.report import write_report

ATTACK = "<script>alert('x')</script>"


KEYS = [
    f"{split}/{task}/{kind}"
    for split in ("forget", "retain")
    for task in ("Task1", "Task2", "Task3")
    for kind in ("knowledge", "regurgitation")
]


ABOUT = {
    "job": {
        "model": {"path": "models/target & co"},
        "data": {"forget": "data/forget.jsonl", "retain": "data/retain.jsonl"},
        "search": {"trials": 12, "sampler": "tpe"},
        "merge": {"count": 10},
        "selection": {"utility_floor": 0.75},
    },
    "versions": {"ray-unlearn": "0.1.0", "torch": "2.9.0"},
    "git_commit": "c0ffee" * 6,
    "data_digests": {"forget": "aaaa1111bbbb2222", "retain": "cccc3333dddd4444"},
}


def made_scores(rng: random.Random, forgot: float, kept: float) -> Scores:
    """Scores of a model that forgot and kept about so much, each part following from the others."""

    def near(value: float) -> float:
        return min(max(value + rng.gauss(0, 0.06), 0.01), 0.99)

    terms = {key: near(forgot if key.startswith("forget") else kept) for key in KEYS}
    raw = {key: 1 - value if key.startswith("forget") else value for key, value in terms.items()}
    aggregate, auc, utility = harmonic_mean(terms.values()), near(1 - forgot * 0.62), near(0.2 + 0.6 * kept)
    mia = 1 - 2 * abs(auc - 0.5)
    return Scores(
        terms=terms,
        raw=raw,
        counts=dict.fromkeys(KEYS, 16),
        task_aggregate=aggregate,
        mia_auc=auc,
        mia_score=mia,
        utility=utility,
        final=fmean([aggregate, mia, utility]),
    )


def made_trial(rng: random.Random, number: int) -> TrialRecord:
    """A trial whose snapshots forget more and more and keep less and less."""
    name = f"trial-{number:04d}"
    config = {"method": rng.choice(["npo", "npo_kl_ce", "grad_diff"]), "learning_rate": 10 ** rng.uniform(-5, -3)}
    if number in (2, 7):
        reason = f"CUDA out of memory at step {number}: tried to allocate 2.00 GiB {ATTACK}"
        return TrialRecord(id=name, status="failed", config=config, reason=reason, seconds=12.5)
    speed, harm = rng.uniform(0.3, 1.1), rng.uniform(0.05, 0.6)
    step = rng.choice([10, 16, 20])
    points = []
    for index in range(1, 7):
        scores = made_scores(rng, min(0.1 + speed * index / 6, 0.97), 0.9 - harm * index / 6)
        points.append(
            Snapshot(
                id=f"{name}/{index * step:05d}",
                step=index * step,
                phase="unlearn",
                scores=scores,
                path=f"trials/{name}/{index * step:05d}",
                seconds=index * 20.0,
            )
        )
    stopped = number == 4
    return TrialRecord(
        id=name,
        status="stopped" if stopped else "finished",
        config=config,
        reason="retain loss above its bound" if stopped else "",
        snapshots=tuple(points[:3] if stopped else points),
        course=({"step": 1, "loss": 2.5},),
        seconds=130.0,
    )


def made_merge(rng: random.Random, number: int, members: list[str]) -> MergeRecord:
    recipe = {
        "method": "ties",
        "members": members,
        "weights": [round(rng.uniform(0.2, 1), 2) for _ in members],
        "densities": [round(rng.uniform(0.3, 0.9), 2)] * len(members),
        "lambda": round(rng.uniform(0.6, 1.4), 2),
    }
    name = f"merge-{number:04d}"
    if number == 3:
        return MergeRecord(id=name, status="failed", recipe=recipe, reason="weights are not finite", seconds=3)
    return MergeRecord(id=name, status="finished", recipe=recipe, scores=made_scores(rng, 0.75, 0.82), seconds=9)


def make_empty_run(run_dir: Path) -> Path:
    """A run that has only scored its target."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "job.yaml").write_text(yaml.safe_dump(ABOUT, sort_keys=False), encoding="utf-8")
    write_json(run_dir / "baseline.json", made_scores(random.Random(9), 0.08, 0.93).to_json())
    return run_dir


def save_front(run_dir: Path, made: list[TrialRecord], joined: list[MergeRecord]) -> list[Candidate]:
    """Writes front.json and returns the front's members."""
    found = candidates(made, joined)
    kept = [found[i] for i in front([c.scores.objectives() for c in found])]
    points = [c.scores.objectives() for c in found]
    members = [
        {
            "id": c.id,
            "kind": "merge" if isinstance(c.record, MergeRecord) else "snapshot",
            **dict(zip(("task_aggregate", "mia_score", "utility"), c.scores.objectives(), strict=True)),
            "final": c.scores.final,
        }
        for c in kept
    ]
    volumes = {
        "hypervolume": hypervolume(points),
        "hypervolume_trials": hypervolume([c.scores.objectives() for c in candidates(made, [])]),
    }
    write_json(run_dir / "front.json", {"reference_point": [0, 0, 0], **volumes, "members": members})
    return kept


def make_run(run_dir: Path, *, trials: int = 12, merges: int = 10, seed: int = 3) -> Path:
    """A finished run of random numbers, in the files that a search writes."""
    rng = random.Random(seed)
    make_empty_run(run_dir)
    made = [made_trial(rng, number) for number in range(trials)]
    ranked = sorted(candidates(made, []), key=lambda c: c.scores.final or 0, reverse=True)
    joined = [made_merge(rng, n, [c.id for c in ranked[: 2 + n % 2]]) for n in range(merges)]
    for trial in made:
        save_record(run_dir, trial)
    for merge in joined:
        save_record(run_dir, merge)
    kept = save_front(run_dir, made, joined)
    chosen = max(kept, key=lambda c: c.scores.final or 0)
    is_merge = isinstance(chosen.record, MergeRecord)
    final = {
        "choice": chosen.id,
        "kind": "merge" if is_merge else "snapshot",
        "rule": "highest final among the front's feasible members",
        "recipe": chosen.record.recipe if isinstance(chosen.record, MergeRecord) else chosen.record.config,
        "target": made_scores(rng, 0.08, 0.93).to_json(),
        "best": made_scores(rng, 0.78, 0.84).to_json(),
        "reference": made_scores(rng, 0.8, 0.92).to_json(),
        "examples": [made_example(split, n) for split in ("forget", "retain") for n in range(2)],
        "mia_documents": {"member": 48, "nonmember_search": 200, "nonmember_final": 200},
    }
    write_json(run_dir / "final.json", final)
    write_json(
        run_dir / "summary.json",
        {
            "target": final["target"],
            "best": final["best"],
            "front_size": len(kept),
            "hypervolume": json.loads((run_dir / "front.json").read_text())["hypervolume"],
            "trials": {"finished": trials - 3, "stopped": 1, "failed": 2},
            "merges": {"finished": merges - 1, "failed": 1},
            "seconds": {"target": 61.2, "baseline": 8.0, "search": 5400.0, "merge": 300.0, "selection": 44.0},
        },
    )
    return run_dir


def made_example(split: str, number: int) -> dict[str, Any]:
    expected = "Kamo Ledita lost the silver lantern in the river market and never spoke of it again. " * 2
    return {
        "split": split,
        "id": f"{split}{number}sc1",
        "task": "Task1",
        "kind": "sc",
        "input": "Continue the story: On a dusty morning",
        "expected": expected,
        "before": expected,
        "after": f"{ATTACK} the the the & so on" if split == "forget" else expected,
    }


def page_of(run_dir: Path) -> str:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")
