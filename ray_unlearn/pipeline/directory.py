"""A run's directory: whose it is, what stands in it, and whether it has room; the state the stages share."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.config.job import Job, differences
from ray_unlearn.config.secrets import written
from ray_unlearn.errors import InputError
from ray_unlearn.files import git_commit, versions, write_json, write_text
from ray_unlearn.pipeline.inputs import Inputs
from ray_unlearn.plugins import loaded
from ray_unlearn.progress import Progress
from ray_unlearn.records import FORMAT, Scores, load_records
from ray_unlearn.run_files import (
    RESTORE_JOB,
    check_files,
    read_about,
    read_baseline,
    read_final,
    read_front,
    read_seconds,
)
from ray_unlearn.schema import from_dict

DISK_MARGIN = 1.2
LEFT_BY_KILLED_WRITES = (".*.tmp", ".merge-*", ".best.*.old", "records/.*.tmp", "snapshots/*/.*.tmp", "best/.*.tmp")


@dataclass(kw_only=True)
class Run:
    """A run under way: its job, its folder, and what the stages hand to each other."""

    job: Job
    id: str
    """Drawn when the run began; sets its studies apart in a storage that several runs share."""
    dir: Path
    progress: Progress
    inputs: Inputs
    model_path: str
    reference_path: str | None
    shared_storage: bool
    baseline: Scores | None = None

    @property
    def floor(self) -> float:
        """The utility that a candidate must exceed."""
        assert self.baseline is not None
        return self.job.selection.utility_floor * (self.baseline.utility or 0.0)


def make_directory(out: Path) -> None:
    """Makes the run's directory; raises InputError where it cannot be written."""
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"the run's directory {out} cannot be written: {error.strerror}. Give another with --out."
        ) from error


def claim(out: Path, job: Job) -> None:
    """Checks that a run in the directory is of the same job and that its files can be read; removes what a killed
    write left. Raises InputError for another job and for a damaged file."""
    about = read_about(out)
    check_files(out)
    if about is None:
        if any(load_records(out)):
            raise InputError(
                f"{out} holds records and no job.yaml, so whose they are is not known: restore job.yaml, or give "
                "another --out."
            )
        return
    if not isinstance(about.get("run_id"), str):
        raise InputError(f"{out / 'job.yaml'} has no run_id. {RESTORE_JOB}")
    differ = differences(_stored_job(out, about), written(job))
    if differ:
        raise InputError(
            f"{out} holds a run of another job; these keys differ:\n  "
            + "\n  ".join(differ)
            + "\nGive another --out, or the same job to resume."
        )
    for pattern in LEFT_BY_KILLED_WRITES:
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _stored_job(out: Path, about: dict[str, Any]) -> Mapping[str, object]:
    """The job of job.yaml with this version's defaults for keys that it did not know yet."""
    try:
        return written(from_dict(Job, about["job"], "job"))
    except InputError as error:
        raise InputError(
            f"{out / 'job.yaml'} holds a job that this version does not take: {error} It is of ray-unlearn "
            f"{(about.get('versions') or {}).get('ray-unlearn', 'unknown')}; go on with that, or give another --out."
        ) from None


def study_place(job: Job, out: Path, identity: str, name: str) -> tuple[str, str]:
    """The storage's URL and the name of a run's study; where other runs may share the storage, with the run's id."""
    if job.search.storage is None:
        return f"sqlite:///{out / 'study.db'}", name
    return job.search.storage, f"{identity}-{name}"


def write_job(out: Path, job: Job, inputs: Inputs, space_texts: dict[str, str]) -> str:
    """Writes job.yaml: job with defaults, versions, commit, digests of plugins and data, texts of the
    spaces; returns the run's id.

    On a resumed run it is only read; changed data are refused.
    """
    before = read_about(out)
    if before is not None:
        stated = before.get("data_digests") or {}
        changed = [name for name, value in inputs.digests.items() if stated.get(name) != value]
        if changed:
            raise InputError(
                f"the data of {out} have changed since it was begun: {', '.join(changed)}. Give another --out."
            )
        return str(before["run_id"])
    identity = uuid.uuid4().hex[:12]
    stated = {
        "format": FORMAT,
        "run_id": identity,
        "job": written(job),
        "versions": versions(),
        "git_commit": git_commit(),
        "plugins": {plugin.module: plugin.digest() for plugin in loaded()},
        "data_digests": inputs.digests,
        "rows": {"forget": len(inputs.forget), "retain": len(inputs.retain), "dropped": inputs.dropped},
        "search_spaces": space_texts,
    }
    write_text(out / "job.yaml", yaml.safe_dump(stated, sort_keys=False, allow_unicode=True))
    return identity


def check_trials(out: Path, job: Job, model_path: str, configs: list[Any]) -> None:
    """Refuses trials that name layers which the model does not have, and a run whose missing snapshots and outputs
    may not fit on the disk, with the arithmetic."""
    from ray_unlearn.models.loading import empty_model
    from ray_unlearn.training.parameters import check_trainable, snapshot_bytes

    trials = max(0, job.trials - len(load_records(out)[0]))
    model = empty_model(model_path)
    for config in configs:
        check_trainable(model, config)
    model_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = max(snapshot_bytes(model, config) for config in configs)
    count = trials * max(config.snapshots for config in configs)
    members = 0 if (out / "best").exists() else 2  # best/, and the base where it has no safetensors of its own
    needed = int(DISK_MARGIN * (count * largest + members * model_bytes))
    free = shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"{out} has {free / 2**30:.2f} GiB free, and the run may need {needed / 2**30:.2f}: "
            f"{count} snapshots of up to {largest / 2**20:.1f} MiB, {members} models of {model_bytes / 2**20:.1f} MiB "
            f"to write, times {DISK_MARGIN}. Free some, or lower search.trials or snapshots."
        )


@contextmanager
def stage(out: Path, name: str) -> Iterator[None]:
    """Adds a stage's wall-clock seconds to seconds.json; a start that was killed in the stage adds nothing."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds = read_seconds(out)
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 2)
        write_json(out / "seconds.json", seconds)


def remove_unrecorded(out: Path) -> None:
    """Removes snapshots that no record names."""
    named = {record.id for record in load_records(out)[0] if record.status != "failed"}
    for folder in (out / "snapshots").glob("trial-*"):
        if folder.name not in named:
            shutil.rmtree(folder)


def write_summary(out: Path) -> dict[str, object]:
    """summary.json from the run's files; computes nothing but counts."""
    trials, merges = load_records(out)
    front, final, baseline = read_front(out), read_final(out), read_baseline(out)
    # Contract: finished, pruned and failed; a trial that its own guard stopped is what Optuna's users call pruned.
    statuses = {"finished": "finished", "stopped": "pruned", "failed": "failed"}
    target = final.target if final else baseline
    summary: dict[str, object] = {
        "target": target and target.to_json(),
        "best": final and final.best.to_json(),
        "choice": final and final.choice,
        "front_size": len(front.members) if front else 0,
        "hypervolume": front.hypervolume if front else 0.0,
        "trials": {shown: sum(t.status == status for t in trials) for status, shown in statuses.items()},
        "merges": {status: sum(m.status == status for m in merges) for status in ("finished", "failed")},
        "seconds": read_seconds(out),
    }
    summary = {key: value for key, value in summary.items() if value is not None}
    write_json(out / "summary.json", summary)
    return summary
