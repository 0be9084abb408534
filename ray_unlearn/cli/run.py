"""`ray-unlearn run`: the main job."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ray_unlearn.cli.arguments import Commands, command, json_flag, print_json, set_flag, skip_flag


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _run,
        "run",
        "run or resume the main job: target, search, merges, selection, report",
        "run jobs/quickstart.yaml --out runs/first --set search.trials=20",
    )
    p.add_argument("job", nargs="?", metavar="JOB.yaml", help="job file (default: the embedded quickstart)")
    p.add_argument("--out", help="the run's directory (default: runs/NAME); an unfinished run in it is resumed")
    p.add_argument(
        "--address", metavar="RAY", help="Ray cluster to join (default: RAY_ADDRESS, else one is started here)"
    )
    skip_flag(p)
    set_flag(p)
    json_flag(p)


def _run(a: argparse.Namespace) -> int:
    from ray_unlearn.config.job import load_job
    from ray_unlearn.files import shipped
    from ray_unlearn.pipeline.run import run
    from ray_unlearn.progress import Progress

    path = Path(a.job) if a.job else shipped("jobs") / "quickstart.yaml"
    out = a.out or f"runs/{path.stem}"
    overrides = [*a.set, *(["data.skip_bad_rows=true"] if a.skip_bad_rows else [])]
    result = run(load_job(path, overrides), out, a.address, Progress())
    summary = json.loads((result.run_dir / "summary.json").read_text())
    if a.json:
        print_json(summary)
        return 0
    print(f"{'':16}{'target':>9}{'best':>9}   {result.choice}")
    for name in ("task_aggregate", "mia_score", "utility", "final"):
        print(f"{name:16}{getattr(result.target, name):9.3f}{getattr(result.best, name):9.3f}")
    print(f"model {result.run_dir / 'best'}\nreport {result.run_dir / 'report.html'}")
    return 0
