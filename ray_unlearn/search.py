"""The search over trials and its storage. The only owner of ray.tune and optuna."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from ray_unlearn.config import TrialConfig
from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.executor import Handle, events
from ray_unlearn.job import FirstPoint
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.proposals import Growth, MergeSpace
from ray_unlearn.pareto import OBJECTIVES
from ray_unlearn.records import MergeRecord, Scores, TrialRecord, load_records
from ray_unlearn.schema import to_dict
from ray_unlearn.spaces import SAMPLES_CHECKED, Space, trial_config

TRIALS_STUDY, MERGES_STUDY = "trials", "merges"
UTILITY_CONSTRAINT = "utility_floor"
HEAD = "node:__internal_head__"
optuna.logging.set_verbosity(optuna.logging.WARNING)


# -- studies -------------------------------------------------------------------------------------


def open_study(storage: str, name: str, seed: int, startup: int) -> optuna.Study:
    """The study of that name in the RDB storage, made when new: three objectives, all maximised.

    TPE over all parameters jointly, with conditional ones in groups. A resumed study draws from
    another stream than its beginning did, or it would propose its first points again.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    backend = _storage(storage)
    study = optuna.create_study(
        storage=backend, study_name=name, directions=["maximize"] * len(OBJECTIVES), load_if_exists=True
    )
    study.sampler = _sampler(seed + len(study.trials), startup)
    return study


def _storage(url: str) -> Any:
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:
        raise InputError(f"search.storage {url!r} cannot be opened: {error}") from error


def _sampler(seed: int, startup: int) -> Any:
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
    )


def best_scores(record: TrialRecord, utility_floor: float) -> Scores | None:
    """The one vector that Optuna is told for a trial: its feasible snapshot with the highest final, else the
    snapshot with the highest utility, which the constraint then marks as infeasible."""
    scored = [snapshot.scores for snapshot in record.snapshots]
    feasible = [scores for scores in scored if (scores.utility or 0.0) > utility_floor]
    if feasible:
        return max(feasible, key=lambda scores: scores.final or 0.0)
    return max(scored, key=lambda scores: scores.utility or 0.0, default=None)


def tell_record(study: optuna.Study, number: int, record: TrialRecord, utility_floor: float) -> None:
    """Tells a trial's outcome: values and the utility constraint, or FAIL when it failed."""
    scores = best_scores(record, utility_floor) if record.status != "failed" else None
    tell(study, number, scores, utility_floor, {"record": record.id, "status": record.status})


def tell(
    study: optuna.Study, number: int, scores: Scores | None, utility_floor: float, attributes: dict[str, Any]
) -> None:
    """Tells Optuna three numbers and how far utility is from its floor (at most 0 is feasible), or FAIL."""
    trial = study.trials[number]
    handle = optuna.trial.Trial(study, trial._trial_id)
    for name, value in attributes.items():
        handle.set_user_attr(name, value)
    if scores is None or not all(math.isfinite(value) for value in scores.objectives()):
        study.tell(number, state=TrialState.FAIL)
        return
    handle.set_constraint(UTILITY_CONSTRAINT, utility_floor - scores.objectives()[2])
    study.tell(number, list(scores.objectives()))


# -- the search over trials ----------------------------------------------------------------------


def check_space(
    space: Space, seed: int, points: Sequence[FirstPoint] = (), ranges: Sequence[str] = ()
) -> tuple[list[TrialConfig], list[dict[str, Any]]]:
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


def _sample(study: optuna.Study, space: Space) -> TrialConfig:
    try:
        return trial_config(space(study.ask()))
    except InputError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError) as error:  # the space's own, or a value it does not offer
        raise InputError(f"the search space refuses a trial: {type(error).__name__}: {error}") from error


class TrialSearch(OptunaSearch):
    """OptunaSearch whose trials are told from their records: constraint set, failed ones FAIL, names from numbers.

    On its own it would tell stopped trials COMPLETE, and leave those with a missing value RUNNING for ever.
    """

    def __init__(self, study: optuna.Study, space: Space, records: Callable[[str], TrialRecord | None], floor: float):
        super().__init__(
            space=lambda trial: {"config": space(trial)},  # what was suggested is not yet what is configured
            metric=list(OBJECTIVES),
            mode=["max"] * len(OBJECTIVES),
            sampler=study.sampler,
            storage=study._storage,
            study_name=study.study_name,
        )
        self._records, self._floor = records, floor

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        suggested = super().suggest(trial_id) or {}
        name = f"trial-{self._ot_trials[trial_id].number:04d}"
        return {"id": name, "config": to_dict(trial_config(suggested["config"]))}

    def save(self, checkpoint_path: str) -> None:
        """Tune's own checkpoints are not used: a run resumes from its records and the study's storage."""
        Path(checkpoint_path).touch()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        number = self._ot_trials[trial_id].number
        record = self._records(f"trial-{number:04d}")
        if record is None:
            tell(self._ot_study, number, None, self._floor, {"status": "failed"})
        else:
            tell_record(self._ot_study, number, record, self._floor)
        self._completed_trials.add(trial_id)


def _drive(assigned: dict[str, Any], handle: Handle) -> None:
    """The Tune function of one trial: runs it through the executor and relays what it reports."""
    last: dict[str, Any] = {}
    for name, content in events(handle, assigned["id"], assigned["config"]):
        if name == "snapshot":
            last = content
            tune.report(content)
        else:
            tune.report({**last, "status": content["status"], "reason": content["reason"]})


class Announcer(tune.Callback):
    """Tells the user how each trial goes, a line at a time."""

    def __init__(self, log: Callable[[str], None], advance: Callable[[], None]) -> None:
        self.log, self.advance = log, advance

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.config["id"]
        if "status" in result:
            reason = f": {result['reason']}" if result["reason"] else ""
            self.log(f"{name} {result['status']}{reason}")
            self.advance()
        else:
            shown = ", ".join(f"{key} {result[key]:.3f}" for key in (*OBJECTIVES, "final") if key in result)
            self.log(f"{name} step {result['step']}: {shown}")


def recover(study: optuna.Study, run_dir: Path, utility_floor: float) -> int:
    """Brings a study that a killed driver left in line with the records; returns how many trials are to be redone.

    A RUNNING trial with a record is told its outcome. One without is told FAIL, and its parameters
    are queued again, so that the trial in flight restarts.
    """
    records = {record.id: record for record in load_records(run_dir)[0]}
    redone = 0
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        record = records.get(f"trial-{trial.number:04d}")
        if record is not None:
            tell_record(study, trial.number, record, utility_floor)
        else:
            redone += _queue_again(study, trial)
            shutil.rmtree(run_dir / "snapshots" / f"trial-{trial.number:04d}", ignore_errors=True)
    return redone


def _queue_again(study: optuna.Study, trial: Any) -> bool:
    """Queues a RUNNING trial's parameters anew, then tells it FAIL: in this order nothing is lost to another kill."""
    known = {other.user_attrs.get("restarts") for other in study.get_trials(deepcopy=False)}
    if trial.params and trial.number not in known:
        study.enqueue_trial(trial.params, user_attrs={"restarts": trial.number})
    study.tell(trial.number, state=TrialState.FAIL)
    return bool(trial.params)


def search_trials(
    study: optuna.Study,
    space: Space,
    handle: Handle,
    run_dir: Path,
    *,
    num_trials: int,
    utility_floor: float,
    log: Callable[[str], None],
    advance: Callable[[], None],
) -> None:
    """Runs trials until the run has `num_trials` records, at most `concurrency` side by side."""

    def find(name: str) -> TrialRecord | None:
        return next((record for record in load_records(run_dir)[0] if record.id == name), None)

    missing = num_trials - len(load_records(run_dir)[0])
    if missing <= 0:
        return
    concurrency = handle.resources.concurrency
    searcher = TrialSearch(study, space, find, utility_floor)
    # The drivers only wait. They take no CPU, or on a small machine they would keep the workers from
    # starting; and they stay on the head, which is not a node that a cluster takes away.
    drive = tune.with_resources(tune.with_parameters(_drive, handle=handle), {"cpu": 0, HEAD: 0.001})
    results = tune.Tuner(
        drive,
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=concurrency), num_samples=missing, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=handle.storage,
            name=f"tune-{len(study.trials):04d}",
            verbose=0,
            callbacks=[Announcer(log, advance)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    ).fit()
    for result in results:
        if result.error is not None:
            log(f"a trial's driver failed: {result.error}")


def enqueue(study: optuna.Study, points: Sequence[dict[str, Any]], most: int | None = None) -> None:
    """Queues those first points of a study that were never queued, whatever killed an earlier start; `most` of them."""
    queued = {trial.user_attrs.get("first_point") for trial in study.get_trials(deepcopy=False)}
    for number in [number for number in range(len(points)) if number not in queued][:most]:
        study.enqueue_trial(points[number], user_attrs={"first_point": number})


# -- the search over merges ----------------------------------------------------------------------


def search_merges(
    study: optuna.Study,
    space: MergeSpace,
    score: Sequence[Callable[[MergeRecipe], Any]],
    save: Callable[[str, MergeRecipe, Scores | None, str, float], None],
    growth: Growth,
    *,
    missing: int,
    patience: int,
    utility_floor: float,
) -> None:
    """Asks for `missing` merges and scores them, one at a time on each of the scorers; fewer where the hypervolume
    has not grown for `patience` of them.

    A scorer takes a recipe and returns a Ray reference to Scores. `save` writes the record before
    the study is told, so that a killed driver finds its outcome again.
    """
    free = list(score)
    running: dict[Any, tuple[int, MergeRecipe, Callable[[MergeRecipe], Any], float]] = {}
    while running or (missing > 0 and not growth.stalled(patience)):
        while missing > 0 and free and not growth.stalled(patience):
            in_flight = [(recipe, None) for _, recipe, _, _ in running.values()]
            trial = _ask_for_merge(study, space, [*growth.known, *in_flight])
            recipe = space.suggest(trial, growth.joined)
            scorer = free.pop(0)
            running[scorer(recipe)] = (trial.number, recipe, scorer, time.monotonic())
            missing -= 1
        (done,), _ = ray.wait(list(running), num_returns=1)
        number, recipe, scorer, began = running.pop(done)
        free.append(scorer)
        name, scores, reason = f"merge-{number:04d}", None, ""
        try:
            scores = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
        save(name, recipe, scores, reason, time.monotonic() - began)
        tell(study, number, scores, utility_floor, {"record": name})
        growth.add(name, recipe, scores)


def _ask_for_merge(study: optuna.Study, space: MergeSpace, known: Sequence[tuple[MergeRecipe, Scores | None]]) -> Any:
    """A trial of what a killed driver left queued, else of the bisected segment, else of the next first point, else of
    the sampler. A merge in flight counts as known without scores: the bisection waits for it."""
    if not study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
        point = space.segment_point(known)
        if point is not None:
            study.enqueue_trial(point)
        else:
            enqueue(study, space.first_points(), most=1)
    return study.ask()


def recover_merges(study: optuna.Study, records: Sequence[MergeRecord], utility_floor: float) -> None:
    """Tells the outcome of merges that a killed driver had scored, and queues those again that it was scoring."""
    known = {record.id: record for record in records}
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        record = known.get(f"merge-{trial.number:04d}")
        if record is not None:
            tell(study, trial.number, record.scores, utility_floor, {})
        else:
            _queue_again(study, trial)
