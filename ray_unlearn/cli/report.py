"""`ray-unlearn report`: a run's report, written again."""

from __future__ import annotations

import argparse
from pathlib import Path

from ray_unlearn.cli.arguments import Commands, command


def _report(a: argparse.Namespace) -> int:
    from ray_unlearn.report import write_report

    print(write_report(Path(a.run_dir)))
    return 0


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(commands, _report, "report", "write a run's report again from its records", "report runs/quickstart")
    p.add_argument("run_dir", metavar="RUN_DIR")
