"""The search over trials and its storage. The only owner of ray.tune and optuna."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from ray_unlearn.cluster.executor import Handle, events
from ray_unlearn.pareto import OBJECTIVES
from ray_unlearn.records import TrialRecord, load_records
from ray_unlearn.schema import to_dict
from ray_unlearn.search.spaces import Space, trial_config
from ray_unlearn.search.study import tell, tell_record

HEAD = "node:__internal_head__"
optuna.logging.set_verbosity(optuna.logging.WARNING)


# -- studies -------------------------------------------------------------------------------------


# -- the search over trials ----------------------------------------------------------------------


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


# -- the search over merges ----------------------------------------------------------------------
