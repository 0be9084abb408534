"""A run's files beside its records, read strictly: what is damaged or foreign is refused by its name, with a way on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.files import read_json
from ray_unlearn.records import Scores, check_format, load_records
from ray_unlearn.schema import checked_value, from_dict, require

PARTS = ("model", "target", "data", "evaluation", "mmlu", "search", "resources", "merge", "comparison", "selection")
"""Keys of a stored job that are mappings where they are there."""
RESTORE_JOB = "Restore it from a copy, or begin a new run in another directory."


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
    found = _read(run_dir / "baseline.json", {}, "Move it away: the target is then scored again.")
    return None if found is None else _scores(found, run_dir / "baseline.json")


def read_front(run_dir: Path) -> dict[str, Any] | None:
    """front.json: reference point, hypervolume, members."""
    types = {"hypervolume": float, "members": list[dict[str, Any]]}
    return _read(run_dir / "front.json", types, "Move it away: the same command writes it again.")


def read_final(run_dir: Path) -> dict[str, Any] | None:
    """final.json: the choice, its recipe, and the scores of target and best on unseen documents."""
    types = {"choice": str, "kind": str, "target": dict, "best": dict}
    path = run_dir / "final.json"
    final = _read(path, types, "Move it away: the same command chooses, writes and scores again.")
    if final is not None:
        for part in (final["target"], final["best"], final.get("reference")):
            if part is not None:
                _scores(part, path)
    return final


def read_seconds(run_dir: Path) -> dict[str, float]:
    """seconds.json: wall-clock seconds of each stage that has run."""
    path, mend = run_dir / "seconds.json", "Move it away: the stages' times so far are then lost, and nothing else."
    return {name: _typed(float, value, path, name, mend) for name, value in (_read(path, {}, mend) or {}).items()}


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json: what the run came to."""
    return _read(run_dir / "summary.json", {}, "Move it away: the same command writes it again.")


def check_files(run_dir: Path) -> None:
    """Reads every file that a resumed run builds upon, so that a damaged one is refused before any work."""
    for read in (load_records, read_baseline, read_seconds, read_front, read_final, read_summary):
        read(run_dir)


def _read(path: Path, types: Mapping[str, Any], mend: str) -> dict[str, Any] | None:
    data = read_json(path, mend)
    if data is None:
        return None
    for key, kind in types.items():
        if key not in data:
            raise InputError(f"{path} lacks the key {key!r}. {mend}")
        _typed(kind, data[key], path, key, mend)
    return data


def _typed(kind: Any, value: object, path: Path, key: str, mend: str) -> Any:
    try:
        return checked_value(kind, value, key)
    except InputError as error:
        raise InputError(f"{path}: {error} {mend}") from None


def _scores(data: dict[str, Any], path: Path) -> Scores:
    known = {key: value for key, value in data.items() if key in Scores.__dataclass_fields__}
    try:
        return from_dict(Scores, known, "the scores")
    except InputError as error:
        raise InputError(f"{path} does not hold scores: {error} Move it away: they are then made again.") from None
