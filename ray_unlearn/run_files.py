"""A run's files beside its records: what they hold, and how they are read. What is damaged is refused by its name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.files import read_json
from ray_unlearn.pareto import REFERENCE_POINT
from ray_unlearn.records import Candidate, Scores, check_format, load_records
from ray_unlearn.schema import checked_value, from_dict, require

T = TypeVar("T")

PARTS = ("model", "target", "data", "evaluation", "mmlu", "search", "resources", "merge", "comparison", "selection")
"""Keys of a stored job that are mappings where they are there."""
RESTORE_JOB = "Restore it from a copy, or begin a new run in another directory."


@dataclass(frozen=True, kw_only=True)
class FrontMember:
    """A candidate that no other dominates."""

    id: str
    kind: str
    """`snapshot` or `merge`."""
    task_aggregate: float
    mia_score: float
    utility: float
    final: float | None = None

    @classmethod
    def of(cls, candidate: Candidate) -> FrontMember:
        """The candidate's line of front.json."""
        aggregate, mia, utility = candidate.scores.objectives()
        return cls(
            id=candidate.id,
            kind=candidate.kind,
            task_aggregate=aggregate,
            mia_score=mia,
            utility=utility,
            final=candidate.scores.final,
        )


@dataclass(frozen=True, kw_only=True)
class Front:
    """front.json: what no other candidate dominates, best final first."""

    reference_point: tuple[float, ...] = REFERENCE_POINT
    hypervolume: float
    hypervolume_trials: float | None = None
    """Of the snapshots alone, without merges."""
    members: tuple[FrontMember, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Front:
        """The front of front.json's content; raises InputError for what is none."""
        return from_dict(cls, dict(data), "front.json")

    def to_json(self) -> dict[str, object]:
        """The content of front.json."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row with what the target and the choice generate for it."""

    split: str
    id: str
    task: str
    kind: str
    input: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class DocumentCounts:
    """Documents of the membership test."""

    member: int
    nonmember_search: int
    """Unseen ones that the search compared with."""
    nonmember_final: int
    """Others, that the final scores compare with."""


@dataclass(frozen=True, kw_only=True)
class Final:
    """final.json: the choice, how to make it again, and its scores beside the target's on unseen documents."""

    choice: str
    kind: str
    """`snapshot` or `merge`."""
    rule: str = ""
    """By which it was chosen, in words."""
    recipe: dict[str, object] = field(default_factory=dict)
    """A trial's configuration and the snapshot's step, or a merge's recipe with its members'."""
    target: Scores
    best: Scores
    reference: Scores | None = None
    """Of the model that was trained without the forget set, where there is one."""
    examples: tuple[ShownRow, ...] = ()
    mia_documents: DocumentCounts | None = None
    written_max_difference: float | None = None
    """Largest difference of a written weight from the one that was scored."""

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Final:
        """The outcome of final.json's content; raises InputError for what is none."""
        scored = {name: Scores.checked(data[name], name) for name in ("target", "best", "reference") if data.get(name)}
        return from_dict(cls, {**data, **scored}, "final.json")

    def to_json(self) -> dict[str, object]:
        """The content of final.json; what was not measured is absent."""
        plain = dataclasses.asdict(self)
        scored = {name: getattr(self, name) for name in ("target", "best", "reference")}
        plain |= {name: scores.to_json() for name, scores in scored.items() if scores is not None}
        return {name: value for name, value in plain.items() if value is not None}


def read_about(run_dir: Path) -> dict[str, Any] | None:
    """job.yaml: run_id, job, versions, git_commit, data_digests; None where there is none."""
    path = run_dir / "job.yaml"
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not readable YAML: {error}. {RESTORE_JOB}") from error
    try:
        require(isinstance(about, dict), f"it must be a mapping, got {about!r:.60}.")
        check_format(about.get("format", 1))
        job = about.get("job")
        require(isinstance(job, dict), "it must be a mapping with the key 'job'.")
        for name in PARTS:
            require(isinstance(job.get(name) or {}, dict), f"job.{name} must be a mapping, got {job.get(name)!r:.60}.")
        require(isinstance(about.get("data_digests") or {}, dict), "data_digests must be a mapping.")
    except InputError as error:
        raise InputError(f"{path} is not the job of a run: {error} {RESTORE_JOB}") from None
    return dict(about)


def read_baseline(run_dir: Path) -> Scores | None:
    """baseline.json: the target on the search's data."""
    make = functools.partial(Scores.checked, where="the scores")
    return _read(run_dir / "baseline.json", make, "the target is then scored again")


def read_front(run_dir: Path) -> Front | None:
    """front.json: reference point, hypervolume, members."""
    return _read(run_dir / "front.json", Front.from_json, "the same command writes it again")


def read_final(run_dir: Path) -> Final | None:
    """final.json: the choice, its recipe, and the scores of target and best on unseen documents."""
    return _read(run_dir / "final.json", Final.from_json, "the same command chooses, writes and scores again")


def read_seconds(run_dir: Path) -> dict[str, float]:
    """seconds.json: wall-clock seconds of each stage that has run."""

    def seconds(data: Mapping[str, object]) -> dict[str, float]:
        return {name: float(checked_value(float, value, name)) for name, value in data.items()}

    return _read(run_dir / "seconds.json", seconds, "the stages' times so far are then lost, and nothing else") or {}


def read_summary(run_dir: Path) -> dict[str, object] | None:
    """summary.json: what the run came to."""
    return _read(run_dir / "summary.json", dict, "the same command writes it again")


def check_files(run_dir: Path) -> None:
    """Reads every file that a resumed run builds upon, so that a damaged one is refused before any work."""
    for read in (load_records, read_baseline, read_seconds, read_front, read_final, read_summary):
        read(run_dir)


def _read(path: Path, make: Callable[[dict[str, object]], T], otherwise: str) -> T | None:
    """What `make` makes of the JSON object in a file, None where there is no file; `otherwise` says what happens once
    a damaged one is moved away."""
    mend = f"Move it away: {otherwise}."
    data = read_json(path, mend)
    try:
        return None if data is None else make(data)
    except InputError as error:
        raise InputError(f"{path}: {error} {mend}") from None
