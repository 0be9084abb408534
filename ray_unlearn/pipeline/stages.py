"""The stages of a run between its inputs and its report; each starts from the records and does what is missing."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ray_unlearn.cluster.evaluators import score_models
from ray_unlearn.cluster.executor import Executor
from ray_unlearn.cluster.merge_actor import MergePool
from ray_unlearn.cluster.model_transfer import ModelSource, WorkerSpec
from ray_unlearn.files import versions, write_json
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.pareto import feasible, front, hypervolume
from ray_unlearn.pipeline import selection
from ray_unlearn.pipeline.directory import Run, remove_unrecorded, study_place
from ray_unlearn.records import Candidate, MergeRecord, Scores, candidates, load_records, save_record
from ray_unlearn.run_files import Front, FrontMember, read_baseline, read_final
from ray_unlearn.search.merge_space import Growth, MergeSpace
from ray_unlearn.search.merges import recover_merges, search_merges
from ray_unlearn.search.samplers import find_sampler
from ray_unlearn.search.spaces import Space
from ray_unlearn.search.study import MERGES_STUDY, TRIALS_STUDY, enqueue, open_study, recover
from ray_unlearn.search.tune import search_trials


def baseline(run: Run) -> Scores:
    """The untouched target on the search's data; baseline.json."""
    scores = read_baseline(run.dir)
    if scores is None:
        ((scores, _),) = score_models(run.job, [run.model_path], run.inputs.search_set, run.shared_storage)
        write_json(run.dir / "baseline.json", scores.to_json())
    run.progress.line(f"target: {scores.line()}")
    return scores


def worker_spec(run: Run) -> WorkerSpec:
    """What workers and merge actors load."""
    return WorkerSpec(
        model=ModelSource.of(run.model_path, run.shared_storage),
        forget=run.inputs.forget,
        retain=run.inputs.retain,
        eval_set=run.inputs.search_set,
        eval_settings=run.job.eval_settings,
        dtype=run.job.model.dtype,
        utility_floor=run.floor,
    )


def search(run: Run, space: Space, points: Sequence[dict[str, object]]) -> None:
    """Trials until the budget's records are there; the study goes on from where it was."""
    job = run.job
    done = len(load_records(run.dir)[0])
    if done >= job.search.trials:
        run.progress.line(f"search: {done} trials were done before")
        return
    sampler = find_sampler(job.search.sampler)
    study = open_study(*study_place(run.job, run.dir, run.id, TRIALS_STUDY), job.seed, job.search.startup, sampler)
    redone = recover(study, run.dir, run.floor)
    if done or redone:
        run.progress.line(f"search: {done} trials were done before, {redone} restart")
    enqueue(study, points)
    for _ in range(2):  # a driver of Tune's that died has ended no trial: what is missing is asked for once more
        missing = job.search.trials - len(load_records(run.dir)[0])
        if missing <= 0:
            break
        run.progress.start("trials", job.search.trials, job.search.trials - missing)
        storage = job.resources.storage or run.dir / "ray"
        try:
            with Executor(run.dir, worker_spec(run), job.resources, storage) as executor:
                search_trials(
                    study,
                    space,
                    executor.handle,
                    run.dir,
                    missing=missing,
                    utility_floor=run.floor,
                    log=run.progress.line,
                    advance=run.progress.advance,
                )
        finally:
            run.progress.finish()
        recover(study, run.dir, run.floor)  # only now: no worker writes a snapshot any more


def feasible_candidates(run: Run) -> list[Candidate]:
    """All feasible candidates on record, snapshots and merges."""
    trials, merges = load_records(run.dir)
    assert run.baseline is not None
    target, floor = run.baseline.utility or 0.0, run.job.selection.utility_floor
    return [c for c in candidates(trials, merges) if feasible(c.scores.utility or 0.0, target, floor)]


def merge_pool(run: Run) -> list[Candidate]:
    """Snapshots offered to merges: the front, then the best by final, sorted by MIA AUC."""
    trials, _ = load_records(run.dir)
    scored = [c for c in feasible_candidates(run) if c.snapshot is not None]
    chosen = [scored[i] for i in front([c.scores.objectives() for c in scored])]
    by_final = sorted(scored, key=lambda c: -(c.scores.final or 0.0))
    ordered = sorted(chosen, key=lambda c: -(c.scores.final or 0.0)) + [c for c in by_final if c not in chosen]
    pool = ordered[: run.job.merge.pool]
    return sorted(pool, key=lambda c: (c.scores.mia_auc or 0.0, c.id))


def merge(run: Run) -> None:
    """Merges until the budget's records are there or the hypervolume stops growing; needs two feasible snapshots."""
    plan = run.job.merge
    done = load_records(run.dir)[1]
    pool = merge_pool(run)
    missing = plan.candidates - len(done)
    growth = merge_growth(run, done)
    if missing <= 0 or len(pool) < 2 or growth.stalled(plan.patience):
        few = missing > 0 and len(pool) < 2
        run.progress.line(
            f"merges: only {len(pool)} feasible snapshots" if few else f"merges: {len(done)} were done before"
        )
        return
    study = open_study(*study_place(run.job, run.dir, run.id, MERGES_STUDY), run.job.seed, plan.startup)
    recover_merges(study, done, run.floor)
    space = MergeSpace(
        snapshots=[c.id for c in pool],
        aucs=[c.scores.mia_auc or 0.0 for c in pool],
        methods=plan.methods,
        max_members=plan.max_members,
        remerged=plan.remerged,
        layerwise=plan.layerwise,
    )
    snapshots = {c.id: run.dir / c.snapshot.path for c in pool if c.snapshot}
    actors = min(run.job.resources.concurrency, missing)  # as many as trials run side by side
    run.progress.start("merges", plan.candidates, len(done))
    try:
        with MergePool(worker_spec(run), snapshots, run.job.resources, actors, plan.timeout) as merges:
            search_merges(
                study,
                space,
                merges,
                functools.partial(save_merge, run),
                growth,
                missing=missing,
                patience=plan.patience,
                utility_floor=run.floor,
            )
    finally:
        run.progress.finish()
    if growth.stalled(plan.patience):
        run.progress.line(f"merges: ended, the hypervolume has not grown for {growth.idle}")


def merge_growth(run: Run, done: Sequence[MergeRecord]) -> Growth:
    """The hypervolume over feasible snapshots, then over the merges on record in their order."""
    points = [c.scores.objectives() for c in feasible_candidates(run) if c.snapshot is not None]
    growth = Growth(points, run.floor, run.job.merge.remerged)
    for record in done:
        growth.add(record.id, MergeRecipe.from_json(record.recipe), record.scores)
    return growth


def save_merge(run: Run, name: str, recipe: MergeRecipe, scores: Scores | None, reason: str, seconds: float) -> None:
    """Writes a merge's record and says how it went."""
    record = MergeRecord(
        id=name,
        status="finished" if scores else "failed",
        recipe=recipe.to_json(),
        scores=scores,
        reason=reason,
        seconds=seconds,
        versions=versions(),
    )
    save_record(run.dir, record)
    run.progress.line(f"{name}: {scores.line() if scores else 'failed: ' + reason}")
    run.progress.advance()


def write_front(run: Run) -> list[Candidate]:
    """front.json over all feasible candidates; returns the front, best final first."""
    everything = feasible_candidates(run)
    points = [c.scores.objectives() for c in everything]
    members = sorted((everything[i] for i in front(points)), key=lambda c: -(c.scores.final or 0.0))
    trials_only = [c.scores.objectives() for c in everything if c.snapshot is not None]
    found = Front(
        hypervolume=hypervolume(points),
        hypervolume_trials=hypervolume(trials_only),
        members=tuple(map(FrontMember.of, members)),
    )
    write_json(run.dir / "front.json", found.to_json())
    return members


def select(run: Run) -> str | None:
    """Chooses, writes best/, scores it on unseen documents, and records the choice; None when nothing is feasible."""
    remove_unrecorded(run.dir)
    members = write_front(run)
    if not members:
        return None
    choice = selection.choose(members, run.job.selection.weights)
    run.progress.line(f"chosen: {choice.id} ({choice.scores.line()})")
    final = read_final(run.dir)
    if final is None or final.choice != choice.id or not (run.dir / "best").exists():
        selection.deliver(run, choice)
    return choice.id
