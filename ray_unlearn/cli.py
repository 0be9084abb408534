"""The command line: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_unlearn.cluster import prepare_environment
from ray_unlearn.errors import InputError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on a run-time failure, 2 on bad arguments or input."""
    arguments = build_parser().parse_args(argv)
    prepare_environment()
    try:
        return int(arguments.command(arguments))
    except InputError as error:
        return _fail(arguments, error, 2)
    except KeyboardInterrupt:
        print("ray-unlearn: interrupted; the same command resumes a run", file=sys.stderr)
        return 1
    except Exception as error:
        return _fail(arguments, error, 1)


def _fail(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    else:
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print(f"ray-unlearn: {name}{error}", file=sys.stderr)
    return code


def _print(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


# -- commands ------------------------------------------------------------------------------------


def _run(a: argparse.Namespace) -> int:
    from ray_unlearn.job import load_job
    from ray_unlearn.pipeline import run
    from ray_unlearn.progress import Progress
    from ray_unlearn.spaces import shipped

    path = Path(a.job) if a.job else shipped("jobs") / "quickstart.yaml"
    out = a.out or f"runs/{path.stem}"
    result = run(load_job(path, a.set), out, a.address, Progress())
    summary = json.loads((result.run_dir / "summary.json").read_text())
    if a.json:
        _print(summary)
        return 0
    print(f"{'':16}{'target':>9}{'best':>9}   {result.choice}")
    for name in ("task_aggregate", "mia_score", "utility", "final"):
        print(f"{name:16}{getattr(result.target, name):9.3f}{getattr(result.best, name):9.3f}")
    print(f"model {result.run_dir / 'best'}\nreport {result.run_dir / 'report.html'}")
    return 0


def _target(a: argparse.Namespace) -> int:
    from ray_unlearn.progress import Progress
    from ray_unlearn.target import build_benchmark_at, build_target_at

    log = Progress().line
    if (a.benchmark is None) == (a.base is None):
        raise InputError("give either --benchmark embedded, or --base with --forget and --retain.")
    if a.benchmark is not None:
        build_benchmark_at(Path(a.out), a.seed, log)
    else:
        if not (a.forget and a.retain):
            raise InputError("--base needs --forget and --retain: the rows that the target is to know.")
        options = {"epochs": a.epochs, "batch_size": a.batch_size, "learning_rate": a.learning_rate, "seed": a.seed}
        build_target_at(a.base, a.forget, a.retain, a.limit, a.skip_bad_rows, Path(a.out), log, **options)
    print(a.out)
    return 0


def _train(a: argparse.Namespace) -> int:
    from ray_unlearn.api import train

    record = train(
        model=a.model,
        forget=a.forget,
        retain=a.retain,
        recipe=a.recipe,
        config=a.config,
        overrides=a.set,
        out=a.out,
        address=a.address,
        workers=a.workers,
        gpus_per_worker=a.gpus_per_worker,
        dtype=a.dtype,
        evaluation=_evaluation(a),
        skip_bad_rows=a.skip_bad_rows,
    )
    if a.json:
        _print({"id": record.id, "status": record.status, "reason": record.reason, "snapshots": len(record.snapshots)})
    else:
        print(f"{record.id} {record.status} {record.reason}".strip())
        for snapshot in record.snapshots:
            print(f"  step {snapshot.step}: {_shown(snapshot.scores)}  {Path(a.out) / snapshot.path}")
    return 0 if record.status != "failed" else 1


def _shown(scores: Any) -> str:
    names = ("task_aggregate", "mia_score", "utility", "final")
    return ", ".join(f"{name} {getattr(scores, name):.4f}" for name in names if getattr(scores, name) is not None)


def _evaluation(a: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": a.max_new_tokens,
        "batch_size": a.batch_size,
        "mmlu_mode": a.mmlu_mode,
        "mmlu_shots": a.mmlu_shots,
    }


def _evaluate(a: argparse.Namespace) -> int:
    from ray_unlearn.api import evaluate

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
        out=a.out,
        **_evaluation(a),
    )
    _print(scores.to_json()) if a.json else print(f"{_shown(scores)}  {a.out}")
    return 0


def _score(a: argparse.Namespace) -> int:
    from ray_unlearn.api import score

    scores = score(a.predictions, mia=a.mia, mmlu_accuracy=a.mmlu_accuracy, official=a.official, out=a.out)
    _print(scores.to_json()) if a.json else print(f"{_shown(scores)}  {a.out}")
    return 0


def _merge(a: argparse.Namespace) -> int:
    from ray_unlearn.api import merge

    out = merge(
        a.base,
        a.adapters,
        a.out,
        method=a.method,
        densities=a.density,
        weights=a.weights,
        lambda_=a.lambda_,
    )
    print(out)
    return 0


def _report(a: argparse.Namespace) -> int:
    from ray_unlearn.report import write_report

    print(write_report(Path(a.run_dir)))
    return 0


def _methods(a: argparse.Namespace) -> int:
    from ray_unlearn.config import TrialConfig, to_dict
    from ray_unlearn.losses import METHODS

    defaults = to_dict(TrialConfig())
    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {key: defaults[key] for key in (*method.parameters, "forget_on")},
            "source": method.source,
        }
        for name, method in METHODS.items()
    ]
    return _table(rows, a.json)


def _recipes(a: argparse.Namespace) -> int:
    from ray_unlearn.losses import METHODS
    from ray_unlearn.recipes import RECIPES

    rows = [
        {
            "name": name,
            "formula": METHODS[recipe.config["method"]].formula,
            "parameters": recipe.config,
            "source": recipe.source,
            "notes": recipe.notes,
            "unverified": list(recipe.unverified),
        }
        for name, recipe in RECIPES.items()
    ]
    return _table(rows, a.json)


def _merge_methods(a: argparse.Namespace) -> int:
    from ray_unlearn.merging import MERGES

    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {"weights": "1 each", "lambda": 1.0} | ({"density": 1.0} if method.uses_density else {}),
            "source": method.source,
        }
        for name, method in MERGES.items()
    ]
    return _table(rows, a.json)


def _table(rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        _print(rows)
        return 0
    for row in rows:
        print(row["name"])
        for key in ("formula", "parameters", "source", "notes", "unverified"):
            value = row.get(key)
            if value:
                text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
                print(f"  {key:11}{'; '.join(text) if isinstance(text, list) else text}")
    return 0


def _submit(a: argparse.Namespace) -> int:
    from ray_unlearn.submit import submit

    return submit(Path(a.job), a.address, a.set, a.out)


# -- arguments -----------------------------------------------------------------------------------


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
    p = _command(commands, "report", _report, "write a run's report again from its records", "report runs/quickstart")
    p.add_argument("run_dir", metavar="RUN_DIR")
    for name, function, what in (
        ("methods", _methods, "unlearning methods"),
        ("recipes", _recipes, "published configurations"),
        ("merge-methods", _merge_methods, "merge methods"),
    ):
        p = _command(commands, name, function, f"list {what} with formula, parameters, source", f"{name} --json")
        _json(p)
    p = _command(
        commands,
        "submit",
        _submit,
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


def _command(commands: Any, name: str, function: Command, what: str, example: str) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  ray-unlearn {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(command=function)
    p.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return p


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (dotted); repeatable"
    )


def _add_run(commands: Any) -> None:
    p = _command(
        commands,
        "run",
        _run,
        "run or resume the main job: target, search, merges, selection, report",
        "run jobs/quickstart.yaml --out runs/first --set search.trials=20",
    )
    p.add_argument("job", nargs="?", metavar="JOB.yaml", help="job file (default: the embedded quickstart)")
    p.add_argument("--out", help="the run's directory (default: runs/NAME); an unfinished run in it is resumed")
    p.add_argument(
        "--address", metavar="RAY", help="Ray cluster to join (default: RAY_ADDRESS, else one is started here)"
    )
    _set(p)
    _json(p)


def _add_target(commands: Any) -> None:
    p = _command(
        commands,
        "target",
        _target,
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
    p.add_argument("--skip-bad-rows", action="store_true")
    p.add_argument("--out", required=True, metavar="DIR")


def _add_train(commands: Any) -> None:
    p = _command(
        commands,
        "train",
        _train,
        "run one unlearning trial on Ray Train and DeepSpeed",
        "train --model M --forget forget.jsonl --retain retain.jsonl --recipe zjuklab-model2 --out trials/zju2",
    )
    _model_and_data(p)
    p.add_argument("--recipe", metavar="NAME", help="a published configuration (see: ray-unlearn recipes)")
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
        _evaluate,
        "score one model",
        "evaluate --model M --forget forget.jsonl --retain retain.jsonl --mmlu mmlu --out scores.json",
    )
    _model_and_data(p)
    p.add_argument("--adapter", metavar="A", help="PEFT adapter directory on top of the model")
    p.add_argument("--mia-member", metavar="F")
    p.add_argument("--mia-nonmember", metavar="F")
    p.add_argument("--mmlu", metavar="DIR")
    p.add_argument("--official", action="store_true", help="demand the shared task's twelve terms and its settings")
    _eval_options(p)
    _json(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _add_score(commands: Any) -> None:
    p = _command(
        commands,
        "score",
        _score,
        "score generations made elsewhere",
        "score --predictions P.jsonl --mia losses.json --mmlu-accuracy 0.44 --out scores.json",
    )
    p.add_argument("--predictions", required=True, metavar="P.jsonl")
    p.add_argument("--mia", metavar="losses.json")
    p.add_argument("--mmlu-accuracy", type=float, metavar="X")
    p.add_argument("--official", action="store_true", help="demand the shared task's twelve terms")
    _json(p)
    p.add_argument("--out", required=True, metavar="scores.json")


def _add_merge(commands: Any) -> None:
    p = _command(
        commands,
        "merge",
        _merge,
        "merge adapters or full checkpoints into a model directory",
        "merge --base M --adapters A B --method ties --density 0.8 --weights 1 1 --out merged",
    )
    p.add_argument("--base", required=True, metavar="M")
    p.add_argument(
        "--adapters", required=True, nargs="+", metavar="A", help="adapter, snapshot or full model directories"
    )
    p.add_argument("--method", default="ties")
    p.add_argument("--density", type=float, nargs="+", default=[1.0], metavar="D", help="one for all, or one for each")
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: 1)")
    p.add_argument("--lambda", dest="lambda_", type=float, default=1.0, metavar="L")
    p.add_argument("--out", required=True, metavar="DIR")


def _model_and_data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="M", help="model directory, .gguf file or hub id")
    p.add_argument("--forget", required=True, metavar="F", help=".jsonl or .parquet, or a directory with forget.*")
    p.add_argument("--retain", required=True, metavar="R", help=".jsonl or .parquet, or a directory with retain.*")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--skip-bad-rows", action="store_true", help="drop and count bad rows instead of refusing the file")


def _eval_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--mmlu-mode", default="letters", choices=["letters", "cloze"])
    p.add_argument("--mmlu-shots", type=int, default=5)


def entry() -> None:
    """The console script."""
    sys.exit(main())
