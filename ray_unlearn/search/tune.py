"""The search over trials: Tune asks, the executor trains, the records answer. The only owner of ray.tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from ray_unlearn.cluster.executor import Handle, events
from ray_unlearn.pareto import OBJECTIVES
from ray_unlearn.records import TrialRecord, load_records
from ray_unlearn.schema import to_dict
from ray_unlearn.search.spaces import Space, trial_config
from ray_unlearn.search.study import Study, Trial, tell, tell_record, trial_name

HEAD = "node:__internal_head__"


class TrialSearch(Searcher):
    """Tune's searcher over an Optuna study: trials are named by their number and told from their records.

    OptunaSearch would tell stopped trials COMPLETE, and leave those with a missing value RUNNING for ever.
    """

    def __init__(self, study: Study, space: Space, records: Callable[[str], TrialRecord | None], floor: float):
        super().__init__()
        self._study, self._space, self._records, self._floor = study, space, records, floor
        self._asked: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, object]:
        """The id and configuration of the study's next trial."""
        trial = self._asked[trial_id] = self._study.ask()
        return {"id": trial_name(trial.number), "config": to_dict(trial_config(self._space(trial)))}

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        """Tells the study what the trial's record says; FAIL where there is none."""
        trial = self._asked.pop(trial_id, None)
        if trial is None:
            return
        record = self._records(trial_name(trial.number))
        if record is None:
            tell(self._study, trial, None, self._floor, {"status": "failed"})
        else:
            tell_record(self._study, trial, record, self._floor)

    def __getstate__(self) -> dict[str, object]:
        """Without the study: Tune pickles its searcher into a folder, and the storage's URL may hold a password."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_study", "_asked")}

    def save(self, checkpoint_path: str) -> None:
        """Tune's own checkpoints are not used: a run resumes from its records and the study's storage."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def _drive(assigned: dict[str, Any], handle: Handle) -> None:
    """The Tune function of one trial: runs it through the executor and relays what it reports."""
    last: dict[str, object] = {}
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

    def on_trial_result(
        self, iteration: int, trials: object, trial: tune.experiment.Trial, result: dict[str, object], **info: object
    ) -> None:
        name = trial.config["id"]
        if "status" in result:
            reason = f": {result['reason']}" if result["reason"] else ""
            self.log(f"{name} {result['status']}{reason}")
            self.advance()
        else:
            shown = ", ".join(f"{key} {result[key]:.3f}" for key in (*OBJECTIVES, "final") if key in result)
            self.log(f"{name} step {result['step']}: {shown}")


def search_trials(
    study: Study,
    space: Space,
    handle: Handle,
    run_dir: Path,
    *,
    missing: int,
    utility_floor: float,
    log: Callable[[str], None],
    advance: Callable[[], None],
) -> None:
    """Runs the `missing` trials, at most `concurrency` side by side."""

    def find(name: str) -> TrialRecord | None:
        return next((record for record in load_records(run_dir)[0] if record.id == name), None)

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
    for error in results.errors:
        log(f"a trial's driver failed: {error}")
