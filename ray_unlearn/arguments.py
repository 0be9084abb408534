"""The arguments of every command, each with an example in its help."""

from __future__ import annotations

import argparse
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """All commands, each with an example in its help."""
    parser = argparse.ArgumentParser(
        prog="ray-unlearn", description="Distributed search and merging for LLM unlearning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_target(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_merge(commands)
    p = _command(commands, "report", "write a run's report again from its records", "report runs/quickstart")
    p.add_argument("run_dir", metavar="RUN_DIR")
    for name, what in (
        ("methods", "unlearning methods"),
        ("recipes", "published configurations"),
        ("metrics", "what a model can be scored by"),
        ("merge-methods", "merge methods"),
    ):
        p = _command(commands, name, f"list {what} with formula, parameters, source", f"{name} --json")
        _json(p)
    p = _command(
        commands,
        "submit",
        "send a job to a Ray cluster and follow its log",
        "submit jobs/cluster.yaml --address http://head:8265",
    )
    p.add_argument("job", metavar="JOB.yaml")
    p.add_argument("--address", required=True, help="http://HOST:8265 of the cluster's dashboard")
    p.add_argument(
        "--out", help="the run's directory on the cluster (default: runs/NAME in the job's working directory)"
    )
    _set(p)
    return parser


def _command(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  ray-unlearn {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(command=name)
    p.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return p


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (dotted); repeatable"
    )


def _skip(p: argparse.ArgumentParser) -> None:
    p.add_argument("--skip-bad-rows", action="store_true", help="drop and count bad rows instead of refusing the file")


def _add_run(commands: Any) -> None:
    p = _command(
        commands,
        "run",
        "run or resume the main job: target, search, merges, selection, report",
        "run jobs/quickstart.yaml --out runs/first --set search.trials=20",
    )
    p.add_argument("job", nargs="?", metavar="JOB.yaml", help="job file (default: the embedded quickstart)")
    p.add_argument("--out", help="the run's directory (default: runs/NAME); an unfinished run in it is resumed")
    p.add_argument(
        "--address", metavar="RAY", help="Ray cluster to join (default: RAY_ADDRESS, else one is started here)"
    )
    _skip(p)
    _set(p)
    _json(p)


def _add_target(commands: Any) -> None:
    p = _command(
        commands,
        "target",
        "build a model that knows both sets",
        "target --benchmark embedded --out targets/embedded",
    )
    p.add_argument(
        "--benchmark", choices=["embedded"], help="the embedded benchmark: data, target, retrained reference"
    )
    p.add_argument("--base", metavar="M", help="model directory, .gguf file or hub id to fine-tune on the rows")
    p.add_argument("--forget", metavar="F")
    p.add_argument("--retain", metavar="R")
    p.add_argument("--limit", type=int, metavar="N", help="documents of each task that are kept")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=2e-4)
    p.add_argument("--seed", type=int, default=None)
    _skip(p)
    p.add_argument("--out", required=True, metavar="DIR")


def _add_train(commands: Any) -> None:
    p = _command(
        commands,
        "train",
        "run one unlearning trial on Ray Train and DeepSpeed",
        "train --model M --forget forget.jsonl --retain retain.jsonl --recipe zjuklab-model2 --out trials/zju2",
    )
    _model_and_data(p)
    p.add_argument("--recipe", metavar="NAME", help="a published configuration (see: ray-unlearn recipes)")
    p.add_argument(
        "--scale-to-model",
        action="store_true",
        help="adapt the recipe's layers, learning rate and batch to a smaller model, and say what was changed",
    )
    p.add_argument("--config", metavar="FILE", help="YAML mapping of trial settings")
    _set(p)
    p.add_argument("--address", metavar="RAY")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--gpus-per-worker", type=float, default=0)
    _eval_options(p)
    _json(p)
    p.add_argument("--out", required=True, metavar="DIR")


def _add_evaluate(commands: Any) -> None:
    p = _command(
        commands,
        "evaluate",
        "score one model",
        "evaluate --model M --forget forget.jsonl --retain retain.jsonl --mmlu mmlu --out scores.json",
    )
    _model_and_data(p)
    p.add_argument("--adapter", metavar="A", help="PEFT adapter directory on top of the model")
    p.add_argument("--mia-member", metavar="F")
    p.add_argument("--mia-nonmember", metavar="F")
    p.add_argument("--mmlu", metavar="DIR")
    p.add_argument(
        "--official",
        action="store_true",
        help="the organisers' procedure: twelve terms, 256 tokens, 5-shot letters, bfloat16 on a GPU",
    )
    _eval_options(p)
    p.add_argument("--metrics", default="", metavar="A,B,C", help="further metrics by name (see: ray-unlearn metrics)")
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
    _json(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _add_score(commands: Any) -> None:
    p = _command(
        commands,
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
    _json(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _add_merge(commands: Any) -> None:
    p = _command(
        commands,
        "merge",
        "merge adapters or full checkpoints into a model directory",
        "merge --base M --adapters A B --method ties --density 0.8 --weights 1 1 --out merged",
    )
    p.add_argument("--base", metavar="M", help="(default: the recipe's)")
    p.add_argument("--adapters", nargs="+", metavar="A", help="adapter, snapshot or full model directories")
    p.add_argument("--recipe", metavar="FILE", help="merge.json, YAML, model card or merged model to make again")
    p.add_argument("--folder", metavar="DIR", help="what the recipe's members are relative to (default: the recipe's)")
    p.add_argument("--method", default="ties", help="(see: ray-unlearn merge-methods)")
    p.add_argument(
        "--density", type=_number_or_gradient, nargs="+", default=[1.0], metavar="D", help="one for all, or for each"
    )
    p.add_argument("--weights", type=_number_or_gradient, nargs="+", metavar="W", help="one for each (default: 1)")
    p.add_argument("--lambda", dest="lambda_", type=_number_or_gradient, default=1.0, metavar="L")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide by the weights (see methods)")
    p.add_argument("--rescale", action=argparse.BooleanOptionalAction, help="restore each delta's sum of magnitudes")
    p.add_argument("--epsilon", type=float, default=0.15, help="della: spread of the chance to stay")
    p.add_argument("--gamma", type=float, default=0.01, help="breadcrumbs: share of largest entries that go")
    p.add_argument("--seed", type=int, default=0, help="of random masks")
    p.add_argument("--as-adapter", action="store_true", help="write a PEFT adapter; exact where the method is linear")
    p.add_argument("--rank", type=int, metavar="R", help="of the adapter (default: the members' sum)")
    p.add_argument("--out", required=True, metavar="DIR")
    p.epilog = f"{p.epilog}\n\nA number may be a gradient over depth: 1,0.5 falls from the first layer to the last."


def _number_or_gradient(text: str) -> float | list[float]:
    """A number, or several with commas between: anchors over the layers."""
    values = [float(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def _model_and_data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="M", help="model directory, .gguf file or hub id")
    p.add_argument("--forget", required=True, metavar="F", help=".jsonl or .parquet, or a directory with forget.*")
    p.add_argument("--retain", required=True, metavar="R", help=".jsonl or .parquet, or a directory with retain.*")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    _skip(p)


def _eval_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--mmlu-mode", default="letters", choices=["letters", "cloze"])
    p.add_argument("--mmlu-shots", type=int, default=5)
