"""`ray-unlearn score`: scores generations made elsewhere."""

from __future__ import annotations

import argparse

from ray_unlearn.cli.arguments import Commands, command, json_flag, print_json


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _score,
        "score",
        "score generations made elsewhere",
        "score --predictions P.jsonl --mia losses.json --mmlu-accuracy 0.44 --out scores.json",
    )
    p.add_argument("--predictions", required=True, metavar="P.jsonl")
    p.add_argument("--mia", metavar="losses.json")
    p.add_argument("--mmlu-accuracy", type=float, metavar="X")
    p.add_argument("--official", action="store_true", help="demand the shared task's twelve terms")
    p.add_argument("--forget", metavar="F", help="the rows that were asked: each must be predicted, once")
    p.add_argument("--retain", metavar="R")
    json_flag(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _score(a: argparse.Namespace) -> int:
    from ray_unlearn.api.evaluation import score

    scores = score(
        a.predictions,
        mia=a.mia,
        mmlu_accuracy=a.mmlu_accuracy,
        official=a.official,
        forget=a.forget,
        retain=a.retain,
        out=a.out,
    )
    print_json(scores.to_json()) if a.json else print(f"{scores.line(4)}  {a.out}")
    return 0
