"""`ray-unlearn evaluate`: scores one model."""

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
)


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _evaluate,
        "evaluate",
        "score one model",
        "evaluate --model M --forget forget.jsonl --retain retain.jsonl --mmlu mmlu --out scores.json",
    )
    model_and_data(p)
    p.add_argument("--adapter", metavar="A", help="PEFT adapter directory on top of the model")
    p.add_argument("--mia-member", metavar="F")
    p.add_argument("--mia-nonmember", metavar="F")
    p.add_argument("--mmlu", metavar="DIR")
    p.add_argument(
        "--official",
        action="store_true",
        help="the organisers' procedure: twelve terms, 256 tokens, 5-shot letters, bfloat16 on a GPU",
    )
    evaluation_flags(p)
    p.add_argument("--metrics", default="", metavar="A,B,C", help="further metrics by name (see: ray-unlearn metrics)")
    plugin_flag(p)
    p.add_argument("--reference", metavar="M", help="a model trained without the forget set, to compare metrics with")
    p.add_argument("--predictions", metavar="P.jsonl", help="write each row's generation, as `score` reads it")
    p.add_argument("--losses", metavar="losses.json", help="write each MIA document's loss, as `score --mia` reads it")
    p.add_argument("--workers", type=int, default=1, help="Ray actors that share the work (default: this process)")
    p.add_argument("--gpus-per-worker", type=float, default=0)
    p.add_argument("--address", metavar="RAY")
    p.add_argument(
        "--cache",
        metavar="DIR",
        help="where finished parts are kept, and found again by the same command (default: .evaluations beside --out)",
    )
    p.add_argument("--no-cache", action="store_true", help="compute everything anew and keep nothing")
    json_flag(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _evaluate(a: argparse.Namespace) -> int:
    from ray_unlearn.api.evaluation import Outputs, evaluate
    from ray_unlearn.cluster.evaluators import WorkerPool
    from ray_unlearn.progress import Progress

    scores = evaluate(
        a.model,
        a.forget,
        a.retain,
        adapter=a.adapter,
        mia_member=a.mia_member,
        mia_nonmember=a.mia_nonmember,
        mmlu=a.mmlu,
        official=a.official,
        dtype=a.dtype,
        skip_bad_rows=a.skip_bad_rows,
        metrics=[name for name in a.metrics.split(",") if name],
        reference=a.reference,
        out=Outputs(
            scores=a.out,
            predictions=a.predictions,
            losses=a.losses,
            cache=None if a.no_cache else a.cache or Path(a.out).parent / ".evaluations",
        ),
        workers=WorkerPool(count=a.workers, gpus_each=a.gpus_per_worker, address=a.address),
        log=Progress().line,
        **evaluation_settings(a),
    )
    print_json(scores.to_json()) if a.json else print(f"{scores.line(4)}  {a.out}")
    return 0
