"""A run's files as one object for the report. Reads; computes no score."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.pareto import feasible
from ray_unlearn.records import Candidate, MergeRecord, Scores, TrialRecord, candidates, load_records


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a run directory holds. A file that is not there yet is None."""

    path: Path
    about: dict[str, Any]
    """The whole of job.yaml: job, versions, git_commit, data_digests."""
    trials: list[TrialRecord] = field(default_factory=list)
    merges: list[MergeRecord] = field(default_factory=list)
    baseline: Scores | None = None
    """The target on the documents of the search, so comparable with every candidate."""
    front: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None

    @property
    def candidates(self) -> list[Candidate]:
        """Every scored model on record."""
        return candidates(self.trials, self.merges)

    @property
    def front_ids(self) -> list[str]:
        """Ids of the front's members, in the order of front.json."""
        return [str(member["id"]) for member in (self.front or {}).get("members", [])]

    @property
    def choice(self) -> str | None:
        """Id of the chosen candidate."""
        return None if self.final is None else self.final.get("choice")

    @property
    def floor(self) -> float | None:
        """The job's utility floor, as a share of the target's utility."""
        value = (self.about["job"].get("selection") or {}).get("utility_floor")
        return None if value is None else float(value)

    @property
    def least_utility(self) -> float | None:
        """Utility that a candidate of the search must exceed."""
        if self.floor is None or self.baseline is None or self.baseline.utility is None:
            return None
        return self.floor * self.baseline.utility

    def feasible(self, scores: Scores, target: Scores | None = None) -> bool | None:
        """Whether the utility is above the floor; None where a part of the comparison is missing."""
        target = target or self.baseline
        if self.floor is None or target is None or target.utility is None or scores.utility is None:
            return None
        return feasible(scores.utility, target.utility, self.floor)


def load_run(run_dir: Path) -> RunView:
    """Reads a run directory; raises InputError when it is none, or when a file in it is broken."""
    job_file = run_dir / "job.yaml"
    if not job_file.is_file():
        raise InputError(
            f"not a run directory: {run_dir} has no job.yaml. Give the directory that a search wrote; "
            "it holds job.yaml, baseline.json and records/."
        )
    try:
        about = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{job_file} is not readable YAML: {error}. Restore it, or run the search anew.") from error
    if not isinstance(about, dict) or not isinstance(about.get("job"), dict):
        raise InputError(f"{job_file} must be a mapping with the key 'job'. Restore it, or run the search anew.")
    try:
        trials, merges = load_records(run_dir)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"a record in {run_dir / 'records'} cannot be read: {error!r}. Move it away.") from error
    baseline = _read(run_dir / "baseline.json")
    return RunView(
        path=run_dir,
        about=about,
        trials=trials,
        merges=merges,
        baseline=Scores.from_json(baseline) if baseline else None,
        front=_read(run_dir / "front.json"),
        final=_read(run_dir / "final.json"),
        summary=_read(run_dir / "summary.json"),
    )


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}. Move it away to report without it.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}. Move it away.")
    return value
