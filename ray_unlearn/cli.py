"""The command line: what each command calls, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_unlearn.arguments import build_parser
from ray_unlearn.cluster.session import prepare_environment
from ray_unlearn.errors import InputError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on a run-time failure, 2 on bad arguments or input."""
    arguments = build_parser().parse_args(argv)
    prepare_environment()
    try:
        return COMMANDS[arguments.command](arguments)
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
        _print(summary)
        return 0
    print(f"{'':16}{'target':>9}{'best':>9}   {result.choice}")
    for name in ("task_aggregate", "mia_score", "utility", "final"):
        print(f"{name:16}{getattr(result.target, name):9.3f}{getattr(result.best, name):9.3f}")
    print(f"model {result.run_dir / 'best'}\nreport {result.run_dir / 'report.html'}")
    return 0


def _target(a: argparse.Namespace) -> int:
    from ray_unlearn.pipeline.target import build_benchmark_at, build_target_at
    from ray_unlearn.progress import Progress

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
        evaluation=_evaluation(a),
        skip_bad_rows=a.skip_bad_rows,
        log=Progress().line,
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
    from ray_unlearn.api.evaluation import evaluate
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
        out=a.out,
        metrics=[name for name in a.metrics.split(",") if name],
        reference=a.reference,
        predictions=a.predictions,
        losses=a.losses,
        cache=None if a.no_cache else a.cache or Path(a.out).parent / ".evaluations",
        workers=a.workers,
        gpus_per_worker=a.gpus_per_worker,
        address=a.address,
        log=Progress().line,
        **_evaluation(a),
    )
    _print(scores.to_json()) if a.json else print(f"{_shown(scores)}  {a.out}")
    return 0


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
    _print(scores.to_json()) if a.json else print(f"{_shown(scores)}  {a.out}")
    return 0


def _merge(a: argparse.Namespace) -> int:
    from ray_unlearn.api.merging import merge, merge_by_recipe
    from ray_unlearn.progress import Progress

    if (a.recipe is None) == (a.adapters is None):
        raise InputError("give either --adapters A B ... or --recipe FILE.")
    common = {"as_adapter": a.as_adapter, "rank": a.rank, "log": Progress().line}
    if a.recipe is not None:
        out = merge_by_recipe(a.recipe, a.base, a.out, folder=a.folder, **common)
    else:
        if a.base is None:
            raise InputError("--adapters needs --base, the model they change.")
        options = {name: getattr(a, name) for name in ("normalize", "rescale", "epsilon", "gamma", "seed")}
        numbers = {"densities": a.density, "weights": a.weights, "lambda_": a.lambda_}
        out = merge(a.base, a.adapters, a.out, method=a.method, **numbers, **options, **common)
    print(out)
    return 0


def _report(a: argparse.Namespace) -> int:
    from ray_unlearn.report import write_report

    print(write_report(Path(a.run_dir)))
    return 0


def _methods(a: argparse.Namespace) -> int:
    from ray_unlearn.config.trial import TrialConfig
    from ray_unlearn.losses import METHODS, OPTIONS, parameters_of
    from ray_unlearn.schema import to_dict

    defaults = to_dict(TrialConfig())
    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {
                key: OPTIONS[key].default if key in OPTIONS else defaults[key] for key in parameters_of(name)
            },
            "meanings": {key: OPTIONS[key].meaning for key in parameters_of(name) if key in OPTIONS},
            "source": method.source,
        }
        for name, method in METHODS.items()
    ]
    return _table(rows, a.json)


def _recipes(a: argparse.Namespace) -> int:
    from ray_unlearn.config.recipes import recipes
    from ray_unlearn.losses import METHODS

    rows = [
        {
            "name": name,
            "formula": METHODS[recipe.config["method"]].formula if recipe.config else "a merge of recipes' models",
            "parameters": recipe.config or recipe.merge,
            "system": recipe.system,
            "source": recipe.source,
            "origin": recipe.origin,
            "notes": recipe.notes,
            "unverified": recipe.unverified,
        }
        for name, recipe in recipes().items()
    ]
    return _table(rows, a.json)


def _metrics(a: argparse.Namespace) -> int:
    from ray_unlearn.metrics import METRICS

    rows = [
        {
            "name": name,
            "formula": metric.formula,
            "best": {part: str(value) for part, value in metric.best.items()},
            "range": " to ".join(f"{end:g}" for end in metric.range),
            "collapsed": metric.collapsed,
            "source": metric.source,
        }
        for name, metric in METRICS.items()
    ]
    return _table(rows, a.json)


def _merge_methods(a: argparse.Namespace) -> int:
    from ray_unlearn.merging import MERGES

    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {
                key: value
                for key, value in (
                    {"weight": 1.0, "density": 1.0, "lambda": 1.0, "epsilon": 0.15, "gamma": 0.01, "seed": 0}
                    | {"normalize": method.normalize, "rescale": method.rescale}
                ).items()
                if key in method.parameters
            },
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
        for key in ("system", "formula", "parameters", "best", "range", "collapsed", "source", "notes", "unverified"):
            value = row.get(key)
            if value:
                text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
                print(f"  {key:11}{'; '.join(text) if isinstance(text, list) else text}")
    return 0


def _submit(a: argparse.Namespace) -> int:
    from ray_unlearn.pipeline.submit import submit

    return submit(Path(a.job), a.address, a.set, a.out)


COMMANDS: dict[str, Command] = {
    "run": _run,
    "target": _target,
    "train": _train,
    "evaluate": _evaluate,
    "score": _score,
    "merge": _merge,
    "report": _report,
    "methods": _methods,
    "recipes": _recipes,
    "metrics": _metrics,
    "merge-methods": _merge_methods,
    "submit": _submit,
}


def entry() -> None:
    """The console script."""
    sys.exit(main())
