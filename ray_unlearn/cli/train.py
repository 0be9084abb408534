"""`ray-unlearn train`: one trial."""

from __future__ import annotations

import argparse
from pathlib import Path

from ray_unlearn.cli.arguments import (
    Commands,
    command,
    evaluation_flags,
    evaluation_settings,
    json_flag,
    model_and_data,
    plugin_flag,
    print_json,
    set_flag,
)


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _train,
        "train",
        "run one unlearning trial on Ray Train and DeepSpeed",
        "train --model M --forget forget.jsonl --retain retain.jsonl --recipe zjuklab-model2 --out trials/zju2",
    )
    model_and_data(p)
    p.add_argument("--recipe", metavar="NAME", help="a published configuration (see: ray-unlearn recipes)")
    p.add_argument(
        "--scale-to-model",
        action="store_true",
        help="adapt the recipe's layers, learning rate and batch to this model and data, and say what was changed",
    )
    p.add_argument("--config", metavar="FILE", help="YAML mapping of trial settings")
    set_flag(p)
    plugin_flag(p)
    p.add_argument("--address", metavar="RAY")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--gpus-per-worker", type=float, default=0)
    evaluation_flags(p)
    json_flag(p)
    p.add_argument("--out", required=True, metavar="DIR")


def _train(a: argparse.Namespace) -> int:
    from ray_unlearn.api.training import train
    from ray_unlearn.progress import Progress

    record = train(
        model=a.model,
        forget=a.forget,
        retain=a.retain,
        recipe=a.recipe,
        scale_to_model=a.scale_to_model,
        config=a.config,
        overrides=a.set,
        out=a.out,
        address=a.address,
        workers=a.workers,
        gpus_per_worker=a.gpus_per_worker,
        dtype=a.dtype,
        evaluation=evaluation_settings(a),
        skip_bad_rows=a.skip_bad_rows,
        log=Progress().line,
    )
    if a.json:
        print_json(
            {"id": record.id, "status": record.status, "reason": record.reason, "snapshots": len(record.snapshots)}
        )
    else:
        print(f"{record.id} {record.status} {record.reason}".strip())
        for snapshot in record.snapshots:
            print(f"  step {snapshot.step}: {snapshot.scores.line(4)}  {Path(a.out) / snapshot.path}")
    return 0 if record.status != "failed" else 1
