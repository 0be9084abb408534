"""Sending a job to a Ray cluster through the Ray Jobs API, and following its log."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from ray_unlearn.config.job import Job, load_job
from ray_unlearn.errors import InputError
from ray_unlearn.files import PACKAGE
from ray_unlearn.plugins import loaded
from ray_unlearn.schema import to_dict
from ray_unlearn.search.spaces import find_space

JOB_FILE = "job.yaml"
"""The job's name where it travels to: a user's own would be part of a shell's line there."""


def submit(path: Path, address: str, overrides: Sequence[str] = (), out: str | None = None) -> int:
    """Submits the job, prints its log as it comes, and returns 0 if it succeeded, 1 if not.

    What travels is this package, the job, its own search spaces and the plugins. Models and data do not: the job's
    paths are paths of the cluster (shared storage), or hub ids.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    job = load_job(path, list(overrides))
    out = out or f"runs/{path.stem}"
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--address must be http://HOST:8265, the cluster's dashboard, got {address!r}.")
    with tempfile.TemporaryDirectory() as folder:
        pack(job, Path(folder))
        try:
            client = JobSubmissionClient(address)
            name = client.submit_job(
                # The cluster's own interpreter: ours has another path, or another version.
                entrypoint=shlex.join([*"python -m ray_unlearn run --address auto".split(), JOB_FILE, "--out", out]),
                runtime_env={"working_dir": folder},
                metadata={"tool": "ray_unlearn", "job": path.stem},
            )
        except (ConnectionError, RuntimeError) as error:
            raise RuntimeError(f"the cluster at {address} did not take the job: {error}") from error
    print(f"submitted {name}", file=sys.stderr, flush=True)
    asyncio.run(_follow(client, name))
    status = client.get_job_status(name)
    print(f"{name} {status}", file=sys.stderr)
    return 0 if status == JobStatus.SUCCEEDED else 1


def pack(job: Job, folder: Path) -> None:
    """Writes what travels with a job into a folder: the job with its overrides, its spaces, the plugins that
    are loaded here, this package.

    Variables in search.storage stay variables: the cluster's environment must have them.
    """
    data = to_dict(job)
    names = {space: space for space in job.search.spaces}
    for number, space in enumerate(name for name in names if name.endswith(".py")):
        # A folder each: two may have one file name, and both must arrive.
        place = folder / "own_spaces" / str(number) / Path(space).name
        place.parent.mkdir(parents=True)
        shutil.copy(find_space(space), place)
        names[space] = place.relative_to(folder).as_posix()
    data["search"]["spaces"] = list(names.values())
    for point in data["search"]["first_points"]:
        if isinstance(point, dict) and point.get("space") in names:
            point["space"] = names[point["space"]]
    data["plugins"] = [plugin.module for plugin in loaded()]
    (folder / JOB_FILE).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignore)
    for code in dict.fromkeys(plugin.code for plugin in loaded()):
        if code.is_dir():
            shutil.copytree(code, folder / code.name, ignore=ignore)
        else:
            shutil.copy(code, folder)
    for extra in ("search_spaces", "jobs"):
        if not (PACKAGE / extra).exists() and (PACKAGE.parent / extra).exists():
            shutil.copytree(PACKAGE.parent / extra, folder / extra, ignore=ignore)


async def _follow(client: object, name: str) -> None:
    async for text in client.tail_job_logs(name):  # type: ignore[attr-defined]
        print(text, end="", flush=True)
