"""Published recipes side by side on one target: every recipe with every seed, in place of a search, and their table."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray_unlearn.cluster.executor import Executor, events
from ray_unlearn.cluster.merge_actor import MergePool
from ray_unlearn.config.job import Job
from ray_unlearn.config.recipes import Geometry, Recipe, recipe, scaled
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.files import write_json, write_text
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.models.loading import empty_model
from ray_unlearn.pipeline.directory import Run
from ray_unlearn.pipeline.stages import save_merge, worker_spec
from ray_unlearn.records import Scores, Snapshot, TrialRecord, load_records
from ray_unlearn.schema import from_dict, to_dict

COLUMNS = ("task_aggregate", "mia_score", "utility", "final")


@dataclass(frozen=True)
class Entry:
    """One run of a recipe: its trial (or merge) and its seed, and what scaling changed."""

    id: str
    recipe: Recipe
    seed: int
    config: dict[str, object]
    changed: list[str]


def entries(job: Job, model_path: str, rows: int) -> list[Entry]:
    """Every recipe with every seed, in order, for a model and `rows` forget rows; the same for a resumed run."""
    part = job.comparison
    model = empty_model(model_path).config
    here = Geometry(layers=model.num_hidden_layers, hidden=model.hidden_size, rows=rows)
    found: list[Entry] = []
    for name in part.names():
        made = recipe(name)
        config, changed = dict(made.config), list[str]()
        if config and part.scale_to_model:
            config, changed = scaled(config, made.model, here)
        kind = "trial" if config else "merge"
        for seed in part.seeds:
            number = sum(entry.id.startswith(kind) for entry in found)
            settings = config | {"seed": seed} | job.search.fixed if config else {}
            found.append(Entry(f"{kind}-{number:04d}", made, seed, settings, changed))
    return found


def configs(planned: Sequence[Entry]) -> list[TrialConfig]:
    """The trials' configurations, checked."""
    return [from_dict(TrialConfig, entry.config, entry.recipe.name) for entry in planned if entry.config]


def compare(run: Run) -> None:
    """Runs what is missing of the trials, then of the merges, and writes comparison.json and comparison.md."""
    planned = entries(run.job, run.model_path, len(run.inputs.forget))
    done = {record.id for part in load_records(run.dir) for record in part}
    _run_trials(run, [entry for entry in planned if entry.config and entry.id not in done])
    _run_merges(run, planned, [entry for entry in planned if entry.recipe.merge and entry.id not in done])
    rows = table(planned, *load_records(run.dir))
    write_json(run.dir / "comparison.json", rows)
    write_text(run.dir / "comparison.md", markdown(rows))


def _run_trials(run: Run, missing: Sequence[Entry]) -> None:
    job = run.job
    if not missing:
        return
    run.progress.start("trials", job.trials, job.trials - len(missing))

    def follow(executor: Executor, entry: Entry) -> None:
        config = to_dict(from_dict(TrialConfig, entry.config, entry.recipe.name))
        *_, (_, ended) = events(executor.handle, entry.id, config)
        reason = f": {ended['reason']}" if ended["reason"] else ""
        run.progress.line(f"{entry.id} {entry.recipe.name}, seed {entry.seed}: {ended['status']}{reason}")
        run.progress.advance()

    pool = ThreadPoolExecutor(job.resources.concurrency)
    try:
        with Executor(run.dir, worker_spec(run), job.resources, job.resources.storage or run.dir / "ray") as executor:
            list(pool.map(functools.partial(follow, executor), missing))
    finally:
        pool.shutdown(cancel_futures=True)  # after the executor, whose end wakes those that wait for a trial
        run.progress.finish()


def _run_merges(run: Run, planned: Sequence[Entry], missing: Sequence[Entry]) -> None:
    """A merge recipe's members are the last snapshots of their recipes' trials with the same seed."""
    members = {entry.id: _members(run, planned, entry) for entry in missing}
    for entry in missing:
        if not members[entry.id]:
            run.progress.line(f"{entry.id} {entry.recipe.name}: a member is missing; name its recipe in the job")
    ready = [entry for entry in missing if members[entry.id]]
    if not ready:
        return
    snapshots = {one.id: run.dir / one.path for entry in ready for one in members[entry.id]}
    with MergePool(worker_spec(run), snapshots, run.job.resources, 1, run.job.merge.timeout) as merges:
        for entry in ready:
            merge = entry.recipe.merge
            made = MergeRecipe(
                method=merge["method"],
                members=[snapshot.id for snapshot in members[entry.id]],
                weights=merge["weights"],
                densities=[merge["density"]] * len(members[entry.id]),
            )
            began = time.monotonic()
            merges.start(entry.id, made)
            _, scores, reason = merges.wait()
            save_merge(run, entry.id, made, scores, reason, time.monotonic() - began)


def _members(run: Run, planned: Sequence[Entry], entry: Entry) -> list[Snapshot]:
    """The last snapshots of a merge's members; empty when one has none."""
    trials = {record.id: record for record in load_records(run.dir)[0]}
    of = {(other.recipe.name, other.seed): trials.get(other.id) for other in planned}
    records = [of.get((name, entry.seed)) for name in entry.recipe.merge["members"]]
    lasts = [record.snapshots[-1] for record in records if record is not None and record.snapshots]
    return lasts if len(lasts) == len(records) else []


def table(planned: Sequence[Entry], trials: Sequence[Any], merges: Sequence[object]) -> list[dict[str, object]]:
    """A row for each recipe: outcomes by seed, mean and standard deviation over those that ended, seconds."""
    records = {record.id: record for record in (*trials, *merges)}
    rows = []
    for name in dict.fromkeys(entry.recipe.name for entry in planned):
        mine = [entry for entry in planned if entry.recipe.name == name]
        found = [records[entry.id] for entry in mine if entry.id in records]
        ended = [(record, scores) for record in found if (scores := _last(record)) is not None]
        rows.append(
            {
                "recipe": name,
                "runs": len(mine),
                "failed": [
                    f"seed {e.seed}: {_reason(records.get(e.id))}" for e in mine if _last(records.get(e.id)) is None
                ],
                "changed": mine[0].changed,
                "seconds": statistics.mean(record.seconds for record in found) if found else None,
                "best_final": [max(scores.final or 0.0 for scores in _all(record)) for record, _ in ended],
                **{column: [getattr(scores, column) for _, scores in ended] for column in COLUMNS},
            }
        )
    return rows


def _all(record: Any) -> list[Scores]:
    return [s.scores for s in record.snapshots] if isinstance(record, TrialRecord) else [record.scores]


def _last(record: Any) -> Scores | None:
    """The scores of what the recipe ends with."""
    if record is None or record.status == "failed":
        return None
    return _all(record)[-1] if _all(record) else None


def _reason(record: Any) -> str:
    return "no record" if record is None else record.reason or record.status


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, best mean final first; what failed comes last, with its reason."""
    ordered = sorted(rows, key=lambda row: -statistics.mean(row["final"]) if row["final"] else 1.0)
    lines = ["| recipe | task aggregate | MIA score | utility | final | best on the way | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in ordered:
        cells = [_mean_and_deviation(row[column]) for column in (*COLUMNS, "best_final")]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {row['recipe']} | {' | '.join(cells)} | {seconds} |")
    failures = [f"* {row['recipe']}, {text}" for row in ordered for text in row["failed"]]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "failed"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
