"""A run's files as one object for the report. Reads; computes no score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_unlearn import run_files
from ray_unlearn.errors import InputError
from ray_unlearn.pareto import feasible
from ray_unlearn.records import Candidate, MergeRecord, Scores, TrialRecord, candidates, load_records
from ray_unlearn.run_files import Final, Front


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
    front: Front | None = None
    final: Final | None = None
    summary: dict[str, object] | None = None

    @property
    def candidates(self) -> list[Candidate]:
        """Every scored model on record."""
        return candidates(self.trials, self.merges)

    @property
    def front_ids(self) -> list[str]:
        """Ids of the front's members, in the order of front.json."""
        return [member.id for member in self.front.members] if self.front else []

    @property
    def choice(self) -> str | None:
        """Id of the chosen candidate."""
        return None if self.final is None else self.final.choice

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
    about = run_files.read_about(run_dir)
    if about is None:
        raise InputError(
            f"not a run directory: {run_dir} has no job.yaml. Give the directory that a search wrote; "
            "it holds job.yaml, baseline.json and records/."
        )
    trials, merges = load_records(run_dir)
    return RunView(
        path=run_dir,
        about=about,
        trials=trials,
        merges=merges,
        baseline=run_files.read_baseline(run_dir),
        front=run_files.read_front(run_dir),
        final=run_files.read_final(run_dir),
        summary=run_files.read_summary(run_dir),
    )
