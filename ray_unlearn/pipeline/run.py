"""The main job, whole: target, baseline, search, merges, selection, report. Every stage resumes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ray_unlearn.cluster.session import check_storage, cluster
from ray_unlearn.config.job import Job, load_job
from ray_unlearn.evaluation.checks import check_fit
from ray_unlearn.files import room_for
from ray_unlearn.models.loading import check_model
from ray_unlearn.pipeline.directory import (
    Run,
    check_trials,
    claim,
    make_directory,
    stage,
    study_place,
    write_job,
    write_summary,
)
from ray_unlearn.pipeline.inputs import Inputs, load_inputs
from ray_unlearn.pipeline.lock import owned
from ray_unlearn.pipeline.target import job_target
from ray_unlearn.progress import Progress
from ray_unlearn.records import Scores, load_records
from ray_unlearn.report import write_report
from ray_unlearn.run_files import read_about, read_final
from ray_unlearn.schema import from_dict
from ray_unlearn.search.spaces import Space, load_space
from ray_unlearn.training.dataloader import check_rows


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run delivers."""

    run_dir: Path
    choice: str
    target: Scores
    best: Scores


def run(
    job: Job | str | Path | dict[str, object],
    out: str | Path | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Runs or resumes a job: a Job, a YAML file or plain values; `out` is runs/NAME unless given.

    Raises InputError for bad input, another job's directory or one that another process works in, RuntimeError when
    nothing is feasible.
    """
    progress = progress or Progress(quiet=True)
    job, out = _resolve(job, out)
    make_directory(out)
    with owned(out, progress.line), room_for(out):
        claim(out, job)
        return _run(job, out, address, progress)


def _run(job: Job, out: Path, address: str | None, progress: Progress) -> RunResult:
    from ray_unlearn.search.samplers import find_sampler
    from ray_unlearn.search.study import check_space

    find_sampler(job.search.sampler)
    space, texts = load_space(job.search.spaces, {"seed": job.seed} | job.search.fixed, job.search.ranges)
    configs, points = check_space(space, job.seed, job.first_points(), list(job.search.ranges))
    _check_studies(job, out)
    inputs, model_path, reference_path = _inputs_and_target(job, out, progress)
    if job.comparison.recipes:
        from ray_unlearn.pipeline import comparison

        configs = comparison.configs(comparison.entries(job, model_path, len(inputs.forget)))
    for config in configs:
        check_rows(config, inputs.forget)
    identity = write_job(out, job, inputs, texts)
    check_trials(out, job, model_path, configs)
    with cluster(address, job.resources) as started_here:
        shared = started_here if job.resources.shared_storage is None else job.resources.shared_storage
        check_storage(job, shared)
        state = Run(
            job=job,
            id=identity,
            dir=out,
            progress=progress,
            inputs=inputs,
            model_path=model_path,
            reference_path=reference_path,
            shared_storage=shared,
        )
        choice = _stages(state, space, points)
    write_summary(out)
    write_report(out)
    if choice is None:
        raise RuntimeError(_nothing_feasible(state))
    final = read_final(out)
    assert final is not None
    return RunResult(run_dir=out, choice=choice, target=final.target, best=final.best)


def _resolve(job: Job | str | Path | dict[str, object], out: str | Path | None) -> tuple[Job, Path]:
    name = Path(job).stem if isinstance(job, (str, Path)) else "job"
    place = Path(out or f"runs/{name}").expanduser().resolve()
    if isinstance(job, Job):
        return job, place
    return (from_dict(Job, job) if isinstance(job, dict) else load_job(Path(job))), place


def _check_studies(job: Job, out: Path) -> None:
    """Opens the storage, before anything is built, and checks that the records are of the studies in it."""
    from ray_unlearn.search.study import MERGES_STUDY, TRIALS_STUDY, check_study

    if job.comparison.recipes:
        return  # numbers its trials and merges without a study
    identity = (read_about(out) or {}).get("run_id", "new")
    trials, merges = load_records(out)
    check_study(*study_place(job, out, identity, TRIALS_STUDY), [record.id for record in trials])
    check_study(*study_place(job, out, identity, MERGES_STUDY), [record.id for record in merges])


def _inputs_and_target(job: Job, out: Path, progress: Progress) -> tuple[Inputs, str, str | None]:
    """The checked data, the model that is to forget, and its retrained reference where there is one."""
    for model in (job.model.path, job.target.base):
        if model is not None:
            check_model(model)
    # A user's own files are checked before anything is trained; the benchmark's do not exist before it is built.
    inputs = None if job.target.benchmark else load_inputs(job)
    given = job.model.path or job.target.base
    if inputs is not None and given is not None:
        _check_fit(given, inputs, job, progress)
    with stage(out, "target"):
        rows = [] if inputs is None else [*inputs.forget, *inputs.retain]
        model_path, reference_path, benchmark = job_target(job, rows, progress.line)
        if inputs is None:
            inputs = load_inputs(job, benchmark)
            _check_fit(model_path, inputs, job, progress)
    return inputs, model_path, reference_path


def _check_fit(model: str, inputs: Inputs, job: Job, progress: Progress) -> None:
    """Refuses data that the model has no room for; says which generations it will cut."""
    nonmembers = [*inputs.search_set.nonmembers, *inputs.final_set.nonmembers]
    for line in check_fit(model, replace(inputs.search_set, nonmembers=nonmembers), job.eval_settings):
        progress.line(line)


def _stages(state: Run, space: Space, points: list[dict[str, object]]) -> str | None:
    """The stages that need a cluster; the chosen candidate's id, or None where none is feasible."""
    from ray_unlearn.pipeline import stages

    with stage(state.dir, "baseline"):
        state.baseline = stages.baseline(state)
    with stage(state.dir, "search"):
        if state.job.comparison.recipes:
            from ray_unlearn.pipeline import comparison

            comparison.compare(state)
        else:
            stages.search(state, space, points)
    with stage(state.dir, "merge"):
        stages.merge(state)
    with stage(state.dir, "selection"):
        return stages.select(state)


def _nothing_feasible(state: Run) -> str:
    return (
        f"no candidate is feasible: every snapshot's utility is at most {state.floor:.3f} "
        f"({state.job.selection.utility_floor:g} of the target's). {state.dir / 'report.html'} shows how they went; "
        "give a new run more trials, gentler learning rates, or a lower selection.utility_floor."
    )
