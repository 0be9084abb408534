"""Optuna's studies: opened, told, recovered after a kill. The only owner of optuna."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import Study as Study
from optuna.trial import FrozenTrial, TrialState
from optuna.trial import Trial as Trial

from ray_unlearn.config.job import FirstPoint
from ray_unlearn.config.secrets import redacted, revealed, without_secrets
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.pareto import OBJECTIVES
from ray_unlearn.records import Scores, TrialRecord, load_records
from ray_unlearn.search.samplers import SAMPLERS, Sampler
from ray_unlearn.search.spaces import SAMPLES_CHECKED, Space, trial_config

TRIALS_STUDY, MERGES_STUDY = "trials", "merges"
UTILITY_CONSTRAINT = "utility_floor"
optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(storage: str, name: str, seed: int, startup: int, sampler: Sampler = SAMPLERS["tpe"]) -> Study:
    """The study of that name in the RDB storage, made when new: three objectives, all maximised."""
    backend = _storage(storage)
    study = optuna.create_study(
        storage=backend, study_name=name, directions=["maximize"] * len(OBJECTIVES), load_if_exists=True
    )
    study.sampler = sampler.open(seed, startup, len(study.trials))
    return study


def _storage(url: str) -> Any:
    try:
        return optuna.storages.RDBStorage(revealed(url))
    except Exception as error:  # its traceback would show the URL too
        raise _unusable(url, error) from None


def _unusable(url: str, error: Exception) -> InputError:
    why = without_secrets(error, url).partition("\n")[0]
    return InputError(
        f"the studies' storage {redacted(url)} cannot be opened: {type(error).__name__}: {why}. If another program has "
        "it open, end that; if it is damaged, restore it, or give another --out; if it is search.storage, correct that."
    )


def check_study(storage: str, name: str, records: Sequence[str]) -> None:
    """Opens the storage, and refuses a study that lacks trials of which there are records, as one that was deleted or
    is an older copy: it would give their numbers again, and the records would be overwritten."""
    opened = _storage(storage)
    try:
        there = name in optuna.get_all_study_names(opened)
        trials = optuna.load_study(study_name=name, storage=opened).get_trials(deepcopy=False) if there else []
    except Exception as error:  # whatever a damaged database makes of it
        raise _unusable(storage, error) from None
    last = max(records, key=_number, default=None)
    if last is not None and _number(last) >= len(trials):
        raise InputError(
            f"the study {name!r} in {redacted(storage)} has {len(trials)} trials, and there is a record of {last}: the "
            "study was deleted, or is an older copy. It would number anew and overwrite records: restore it, or give "
            "another --out."
        )


def _number(record: str) -> int:
    return int(record.rpartition("-")[2])


def best_scores(record: TrialRecord, utility_floor: float) -> Scores | None:
    """The one vector that Optuna is told for a trial: its feasible snapshot with the highest final, else the
    snapshot with the highest utility, which the constraint then marks as infeasible."""
    scored = [snapshot.scores for snapshot in record.snapshots]
    feasible = [scores for scores in scored if (scores.utility or 0.0) > utility_floor]
    if feasible:
        return max(feasible, key=lambda scores: scores.final or 0.0)
    return max(scored, key=lambda scores: scores.utility or 0.0, default=None)


def tell_record(study: Study, trial: Trial, record: TrialRecord, utility_floor: float) -> None:
    """Tells a trial's outcome: values and the utility constraint, or FAIL when it failed."""
    scores = best_scores(record, utility_floor) if record.status != "failed" else None
    tell(study, trial, scores, utility_floor, {"record": record.id, "status": record.status})


def tell(
    study: Study, trial: Trial, scores: Scores | None, utility_floor: float, attributes: Mapping[str, str]
) -> None:
    """Tells Optuna three numbers and how far utility is from its floor (at most 0 is feasible), or FAIL."""
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    if scores is None or not all(math.isfinite(value) for value in scores.objectives()):
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_constraint(UTILITY_CONSTRAINT, utility_floor - scores.objectives()[2])
    study.tell(trial, list(scores.objectives()))


def handle(study: Study, trial: FrozenTrial) -> Trial:
    """The trial as `ask` gave it, for one that another process asked for. Optuna has no public way from a number."""
    return Trial(study, trial._trial_id)


def trial_name(number: int) -> str:
    """The id of a study's trial."""
    return f"trial-{number:04d}"


def check_space(
    space: Space, seed: int, points: Sequence[FirstPoint] = (), ranges: Sequence[str] = ()
) -> tuple[list[TrialConfig], list[dict[str, object]]]:
    """Samples the space without a storage and builds every TrialConfig; raises InputError for an unknown parameter
    or value, in what the space returns, in the job's first points or in its ranges.

    Returns the samples, from which the disk that snapshots may need is worked out, and the first
    points without what a recipe says but the space never asks for or does not offer.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    configs = [_sample(study, space) for _ in range(SAMPLES_CHECKED)]
    asked = {name: distribution for trial in study.trials for name, distribution in trial.distributions.items()}
    unused = sorted(name for name in ranges if name not in asked)
    if unused:
        raise unknown_name("parameter in search.ranges:", unused[0], asked)
    kept = []
    for point in points:
        unknown = sorted(name for name in point.parameters if name not in asked)
        if unknown and point.recipe is None:
            raise unknown_name("parameter in search.first_points:", unknown[0], asked)
        kept.append(
            {
                name: value
                for name, value in point.parameters.items()
                if name in asked and (point.recipe is None or value in getattr(asked[name], "choices", [value]))
            }
        )
        study.enqueue_trial(kept[-1])
        configs.append(_sample(study, space))
    return configs, kept


def _sample(study: Study, space: Space) -> TrialConfig:
    try:
        return trial_config(space(study.ask()))
    except InputError:
        raise
    except Exception as error:  # a value that the space does not offer
        raise InputError(f"the search space refuses a trial: {type(error).__name__}: {error}") from error


def recover(study: Study, run_dir: Path, utility_floor: float) -> int:
    """Brings a study that a killed driver left in line with the records; returns how many trials are to be redone.

    A RUNNING trial with a record is told its outcome. One without is told FAIL, and its parameters
    are queued again, so that the trial in flight restarts.
    """
    records = {record.id: record for record in load_records(run_dir)[0]}
    redone = 0
    for trial in running(study):
        record = records.get(trial_name(trial.number))
        if record is not None:
            tell_record(study, handle(study, trial), record, utility_floor)
        else:
            redone += queue_again(study, trial)
            shutil.rmtree(run_dir / "snapshots" / trial_name(trial.number), ignore_errors=True)
    return redone


def queue_again(study: Study, trial: FrozenTrial) -> bool:
    """Queues a RUNNING trial's parameters anew, then tells it FAIL: in this order nothing is lost to another kill."""
    known = {other.user_attrs.get("restarts") for other in study.get_trials(deepcopy=False)}
    if trial.params and trial.number not in known:
        study.enqueue_trial(trial.params, user_attrs={"restarts": trial.number})
    study.tell(trial.number, state=TrialState.FAIL)
    return bool(trial.params)


def running(study: Study) -> list[FrozenTrial]:
    """Trials that were asked for and not told yet."""
    return study.get_trials(deepcopy=False, states=[TrialState.RUNNING])


def has_waiting(study: Study) -> bool:
    """Whether a queued point has not been asked for yet."""
    return bool(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))


def enqueue(study: Study, points: Sequence[dict[str, object]], most: int | None = None) -> None:
    """Queues those first points of a study that were never queued, whatever killed an earlier start; `most` of them."""
    queued = {trial.user_attrs.get("first_point") for trial in study.get_trials(deepcopy=False)}
    for number in [number for number in range(len(points)) if number not in queued][:most]:
        study.enqueue_trial(points[number], user_attrs={"first_point": number})
