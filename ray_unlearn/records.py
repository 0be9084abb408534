"""What travels and what is saved: examples, scores, snapshots, trial and merge records; atomic files."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_unlearn.errors import InputError
from ray_unlearn.files import read_json, write_json
from ray_unlearn.schema import from_dict, one_of, require

FORMAT = 1
"""Of records and job.yaml, as their `format`; files without one are of format 1. A further key has a default and needs
no new number; what changes the meaning of a key does."""
HEADLINES = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")
"""The numbers of a model that stand beside each other wherever it is shown."""
RECORD_NAME = re.compile(r"(trial|merge)-\d{4,}")
STATUSES = {"trial": ("finished", "stopped", "failed"), "merge": ("finished", "failed")}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a forget or retain set; `kind` is `sc` (sentence completion) or `qa` (question answering)."""

    id: str
    input: str
    output: str
    task: str
    kind: str
    alternate: str | None = None
    """Another answer, in data made for methods that prefer it to the one to be forgotten."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers, in data made for truth ratios."""
    paraphrased: tuple[str, ...] = ()
    """The right answer in other words, in data made for truth ratios."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one model scored. A part that was not measured is None, and then `final` is None too."""

    terms: dict[str, float]
    """split/task/kind -> mean, forget ones already 1 - mean; kinds are regurgitation and knowledge."""
    raw: dict[str, float]
    """The same keys, before the inversion."""
    counts: dict[str, int]
    """The same keys: rows behind each mean."""
    task_aggregate: float | None = None
    mia_auc: float | None = None
    mia_score: float | None = None
    utility: float | None = None
    final: float | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Objective, `mia_auc` or `final` -> low and high end of its 95 % bootstrap interval; empty in older records."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further metrics that were asked for: name -> part -> value, interval, reference, difference."""
    settings: dict[str, object] = field(default_factory=dict)

    def objectives(self) -> tuple[float, float, float]:
        """Task aggregate, MIA score and utility; raises ValueError when one was not measured."""
        values = (self.task_aggregate, self.mia_score, self.utility)
        if any(value is None for value in values):
            raise ValueError(f"an objective was not measured: {values}")
        return values  # type: ignore[return-value]

    def headlines(self) -> dict[str, float]:
        """What was measured of HEADLINES, in their order."""
        return {name: value for name in HEADLINES if (value := getattr(self, name)) is not None}

    def line(self, digits: int = 3) -> str:
        """The headlines in words, without the AUC that the MIA score is made of."""
        return ", ".join(f"{name} {value:.{digits}f}" for name, value in self.headlines().items() if name != "mia_auc")

    def to_json(self) -> dict[str, object]:
        """The fields of scores.json; parts that were not measured are absent."""
        return _without_absent(dataclasses.asdict(self))

    @classmethod
    def checked(cls, data: object, where: str) -> Scores:
        """from_json of what a file holds; raises InputError for what are no scores."""
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        return from_dict(cls, data, where)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        """The inverse of to_json; keys of other metrics beside these are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in names})


def _without_absent(scores: dict[str, object]) -> dict[str, object]:
    return {
        key: value
        for key, value in scores.items()
        if value is not None and not (key in ("intervals", "metrics") and not value)
    }


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A point of a trial that scored itself and kept its weights."""

    id: str
    """trial id / step, e.g. trial-0003/00120."""
    step: int
    """Optimiser steps done."""
    phase: str
    scores: Scores
    path: str
    """Folder of the weights, relative to the run's directory."""
    seconds: float
    """Since the trial began."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial, written once when it ends. A failed one has a reason and no snapshots that count."""

    id: str
    status: str
    """`finished`, `stopped` (by its own guard; snapshots count) or `failed`."""
    config: dict[str, object]
    reason: str = ""
    snapshots: tuple[Snapshot, ...] = ()
    course: tuple[dict[str, object], ...] = ()
    """Step, loss and its parts, gradient norm, tokens/s, memory in MB, as they came."""
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    attempts: int = 1
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """One merge candidate: its recipe and its scores, or why it failed."""

    id: str
    status: str
    recipe: dict[str, Any]
    """method, members (snapshot ids), weights, densities, lambda."""
    scores: Scores | None = None
    reason: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that can be chosen: a snapshot of a trial, or a merge."""

    id: str
    scores: Scores
    record: TrialRecord | MergeRecord
    snapshot: Snapshot | None = None

    @property
    def kind(self) -> str:
        """`snapshot` or `merge`."""
        return "merge" if self.snapshot is None else "snapshot"


def save_record(run_dir: Path, record: TrialRecord | MergeRecord) -> None:
    """Writes records/<id>.json. The file's existence means the trial or merge has ended."""
    data = {"format": FORMAT, **dataclasses.asdict(record)}
    for snapshot in data.get("snapshots", ()):
        snapshot["scores"] = _without_absent(snapshot["scores"])
    if data.get("scores"):
        data["scores"] = _without_absent(data["scores"])
    elif "scores" in data:
        del data["scores"]  # a failed merge has no scores
    write_json(run_dir / "records" / f"{record.id}.json", data)


def load_records(run_dir: Path) -> tuple[list[TrialRecord], list[MergeRecord]]:
    """All trials and merges of a run, in order of their ids. Raises InputError for a file that is no record."""
    trials: list[TrialRecord] = []
    merges: list[MergeRecord] = []
    for path in sorted((run_dir / "records").glob("[!.]*.json")):
        record = load_record(path)
        if isinstance(record, TrialRecord):
            trials.append(record)
        else:
            merges.append(record)
    return trials, merges


def load_record(path: Path) -> TrialRecord | MergeRecord:
    """One record. Raises InputError, naming the file, for one that is damaged, not a record, or of a newer format."""
    mend = "Restore it, or move it away to go on without it."
    data = read_json(path, mend) or {}
    try:
        name = RECORD_NAME.fullmatch(path.stem)
        require(name is not None, f"its name is not that of a trial or a merge, like trial-0000{path.suffix}.")
        assert name is not None
        check_format(data.pop("format", 1))
        require(data.get("id") == path.stem, f"its id is {data.get('id')!r}.")
        record: TrialRecord | MergeRecord
        if name[1] == "trial":
            record = from_dict(TrialRecord, data, "the record")
        else:
            record = from_dict(MergeRecord, data, "the record")
        one_of("status", record.status, STATUSES[name[1]])
    except InputError as error:
        raise InputError(f"{path} is not a record of this run: {error} {mend}") from None
    return record


def check_format(number: object) -> None:
    """Refuses a file's format number that this version does not know."""
    require(
        isinstance(number, int) and 1 <= number <= FORMAT,
        f"its format is {number!r}, and this version reads up to {FORMAT}; use the version that wrote it.",
    )


def candidates(trials: list[TrialRecord], merges: list[MergeRecord]) -> list[Candidate]:
    """Every scored model of a run: snapshots of trials that did not fail, then merges."""
    found = [
        Candidate(id=snapshot.id, scores=snapshot.scores, record=trial, snapshot=snapshot)
        for trial in trials
        if trial.status != "failed"
        for snapshot in trial.snapshots
    ]
    return found + [
        Candidate(id=merge.id, scores=merge.scores, record=merge)
        for merge in merges
        if merge.status == "finished" and merge.scores is not None
    ]


def document_id(row_id: str) -> str:
    """The document a row belongs to: its id without `sc` or `qa` and the character after; other ids stand alone."""
    return row_id[:-3] if row_id[:-1].endswith(("sc", "qa")) else row_id
