"""`ray-unlearn submit`: sends a job to a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from ray_unlearn.cli.arguments import Commands, command, set_flag


def _submit(a: argparse.Namespace) -> int:
    from ray_unlearn.pipeline.submit import submit

    return submit(Path(a.job), a.address, a.set, a.out)


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _submit,
        "submit",
        "send a job to a Ray cluster and follow its log",
        "submit jobs/cluster.yaml --address http://head:8265",
    )
    p.add_argument("job", metavar="JOB.yaml")
    p.add_argument("--address", required=True, help="http://HOST:8265 of the cluster's dashboard")
    p.add_argument(
        "--out", help="the run's directory on the cluster (default: runs/NAME in the job's working directory)"
    )
    set_flag(p)
