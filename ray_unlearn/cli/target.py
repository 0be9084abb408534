"""`ray-unlearn target`: a model that knows both sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from ray_unlearn.cli.arguments import Commands, command, plugin_flag, skip_flag
from ray_unlearn.errors import InputError


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _target,
        "target",
        "build a model that knows both sets",
        "target --benchmark embedded --out targets/embedded",
    )
    p.add_argument("--benchmark", metavar="NAME", help="embedded, or a plugin's: data, target, retrained reference")
    p.add_argument("--base", metavar="M", help="model directory, .gguf file or hub id to fine-tune on the rows")
    p.add_argument("--forget", metavar="F")
    p.add_argument("--retain", metavar="R")
    p.add_argument("--limit", type=int, metavar="N", help="documents of each task that are kept")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=2e-4)
    p.add_argument("--seed", type=int, default=None)
    skip_flag(p)
    plugin_flag(p)
    p.add_argument("--out", required=True, metavar="DIR")


def _target(a: argparse.Namespace) -> int:
    from ray_unlearn.pipeline.target import build_benchmark_at, build_target_at
    from ray_unlearn.progress import Progress

    log = Progress().line
    if (a.benchmark is None) == (a.base is None):
        raise InputError("give either --benchmark NAME, or --base with --forget and --retain.")
    if a.benchmark is not None:
        build_benchmark_at(a.benchmark, Path(a.out), a.seed, log)
    else:
        if not (a.forget and a.retain):
            raise InputError("--base needs --forget and --retain: the rows that the target is to know.")
        options = {"epochs": a.epochs, "batch_size": a.batch_size, "learning_rate": a.learning_rate, "seed": a.seed}
        build_target_at(a.base, a.forget, a.retain, a.limit, a.skip_bad_rows, Path(a.out), log, **options)
    print(a.out)
    return 0
