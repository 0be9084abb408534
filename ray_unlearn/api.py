"""The commands as functions: typed results, InputError for bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.config import TrialConfig, from_dict, to_dict
from ray_unlearn.data import (
    check_cells,
    find_file,
    kind_of,
    kind_problem,
    listing,
    load_documents,
    load_mmlu,
    load_pair,
    read_rows,
    row_problem,
)
from ray_unlearn.errors import InputError
from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.merging.recipe import Graded
from ray_unlearn.models import check_model, load_model, load_tokenizer
from ray_unlearn.records import (
    Example,
    Scores,
    TrialRecord,
    claim_directory,
    claim_file,
    load_records,
    write_json,
    write_text,
)
from ray_unlearn.scoring import EvalSet, EvalSettings, evaluate_model, make_scores

OFFICIAL_TERMS = 12


def evaluate(
    model: str,
    forget: str,
    retain: str,
    *,
    adapter: str | None = None,
    mia_member: str | None = None,
    mia_nonmember: str | None = None,
    mmlu: str | None = None,
    official: bool = False,
    dtype: str = "float32",
    skip_bad_rows: bool = False,
    out: str | Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Scores:
    """Scores one model in this process; `settings` are EvalSettings. Writes scores.json to `out` where given."""
    if (mia_member is None) != (mia_nonmember is None):
        raise InputError("the MIA needs both --mia-member and --mia-nonmember.")
    claim_file(out)
    if official:
        settings = {**settings, "max_new_tokens": 256, "mmlu_mode": "letters", "mmlu_shots": 5}
    chosen = EvalSettings(**settings)
    check_model(model)
    data = eval_set(forget, retain, mia_member, mia_nonmember, mmlu, skip_bad_rows)
    if official:
        _check_official({f"{e.task}/{e.kind}" for e in data.forget})
    loaded = load_model(model, dtype, adapter).to(_device())
    scores, _ = evaluate_model(loaded, load_tokenizer(model), data, chosen, log=log)
    if out is not None:
        write_json(Path(out), scores.to_json())
    return scores


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def eval_set(
    forget: str,
    retain: str,
    mia_member: str | None = None,
    mia_nonmember: str | None = None,
    mmlu: str | None = None,
    skip_bad_rows: bool = False,
) -> EvalSet:
    """The files as an EvalSet, checked; parts without a file stay empty."""
    left, right = load_pair(forget, retain, skip_bad_rows)
    members = load_documents(mia_member, skip_bad_rows) if mia_member else []
    nonmembers = load_documents(mia_nonmember, skip_bad_rows) if mia_nonmember else []
    dev, questions = load_mmlu(mmlu) if mmlu else ({}, [])
    return EvalSet(
        forget=left.examples,
        retain=right.examples,
        members=members,
        nonmembers=nonmembers,
        dev=dev,
        questions=questions,
    )


def _check_official(cells: set[str]) -> None:
    expected = {f"Task{task}/{kind}" for task in (1, 2, 3) for kind in ("sc", "qa")}
    if cells != expected:
        raise InputError(
            f"--official demands the shared task's {OFFICIAL_TERMS} terms; "
            f"missing {sorted(expected - cells)}, unexpected {sorted(cells - expected)}."
        )


# -- scoring generations made elsewhere ----------------------------------------------------------


def score(
    predictions: str | Path,
    *,
    mia: str | Path | None = None,
    mmlu_accuracy: float | None = None,
    official: bool = False,
    out: str | Path | None = None,
) -> Scores:
    """Scores a predictions file; needs no model, Ray or GPU. Writes scores.json to `out` where given."""
    from ray_unlearn.metrics import auc

    claim_file(out)
    rows = _read_predictions(predictions)
    splits = {
        split: [Example(id="", input="", output="", task=row[1], kind=row[2]) for row in rows if row[0] == split]
        for split in ("forget", "retain")
    }
    check_cells(splits["forget"], splits["retain"])
    if official:
        _check_official({f"{row.task}/{row.kind}" for row in splits["forget"]})
    if mmlu_accuracy is not None and not (math.isfinite(mmlu_accuracy) and 0 <= mmlu_accuracy <= 1):
        raise InputError(f"--mmlu-accuracy must be in [0, 1], got {mmlu_accuracy}.")
    area = None if mia is None else auc(*_read_losses(Path(mia)))
    scores = make_scores(rows, area, mmlu_accuracy, {"predictions": str(predictions)})
    if out is not None:
        write_json(Path(out), scores.to_json())
    return scores


def _read_predictions(given: str | Path) -> list[tuple[str, str, str, str, str]]:
    """(split, task, kind, expected, generated) of each row; all problems at once."""
    path = find_file(given, "predictions")
    good, problems = [], []
    seen: dict[tuple[str, str], int] = {}
    for number, row in read_rows(path):
        problem = _prediction_problem(row, seen)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        else:
            seen[row["split"], row["id"]] = number
            good.append((row["split"], row["task"], kind_of(row) or "", row["expected_output"], row["model_output"]))
    if problems:
        raise InputError(listing("bad rows", problems, "Mend them."))
    if not good:
        raise InputError(f"{path} has no rows; at least one is needed.")
    return good


def _prediction_problem(row: Any, seen: dict[tuple[str, str], int]) -> str | None:
    fields = ("id", "task", "split", "expected_output", "model_output")
    problem = row_problem(row, fields, may_be_empty=("model_output",))  # an empty generation is a generation
    if problem:
        return problem
    if row["split"] not in ("forget", "retain"):
        return f"split must be forget or retain, got {row['split']!r}"
    if (row["split"], row["id"]) in seen:
        return f"id {row['id']!r} is already used in row {seen[row['split'], row['id']]}"
    return kind_problem(row)


def _read_losses(path: Path) -> tuple[list[float], list[float]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("member", "nonmember")):
        raise InputError(f'{path} must be {{"member": [..], "nonmember": [..]}}, got {str(data)[:80]}.')
    return data["member"], data["nonmember"]


# -- one trial -----------------------------------------------------------------------------------


def read_trial_config(recipe_name: str | None, config: str | None, overrides: Sequence[str]) -> TrialConfig:
    """The configuration of a recipe or a YAML file, with overrides applied."""
    from ray_unlearn.job import apply_override
    from ray_unlearn.recipes import recipe

    if (recipe_name is None) == (config is None):
        raise InputError("give either --recipe NAME or --config FILE.")
    if recipe_name is not None:
        data = dict(recipe(recipe_name).config)
    else:
        assert config is not None
        try:
            data = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise InputError(f"no such file: {config}.") from error
        except yaml.YAMLError as error:
            raise InputError(f"{config} is not readable YAML: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"{config} must hold a mapping of trial settings, got {data!r:.60}.")
    for override in overrides:
        apply_override(data, override)
    return from_dict(TrialConfig, data, "trial")


def train(
    *,
    model: str,
    forget: str,
    retain: str,
    out: str | Path,
    recipe: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    workers: int = 1,
    gpus_per_worker: float = 0,
    dtype: str = "float32",
    evaluation: dict[str, Any] | None = None,
    skip_bad_rows: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> TrialRecord:
    """One trial through the same Ray Train and DeepSpeed path as in a search; records and snapshots go to `out`."""
    from ray_unlearn.cluster import cluster
    from ray_unlearn.job import ResourcesPart

    trial = read_trial_config(recipe, config, overrides)
    check_model(model)
    data = eval_set(forget, retain, skip_bad_rows=skip_bad_rows)
    settings = EvalSettings(**(evaluation or {}))
    resources = ResourcesPart(workers=workers, gpus_per_worker=gpus_per_worker, executor="cold", dashboard=False)
    run_dir = Path(out).expanduser().resolve()
    claim_file(run_dir / "records" / "trial")
    number = 1 + max((int(record.id[-4:]) for record in load_records(run_dir)[0]), default=-1)
    name = f"trial-{number:04d}"
    with cluster(address, resources) as started_here:
        from ray_unlearn.executor import Executor, events
        from ray_unlearn.workbench import BenchSpec, ModelSource

        spec = BenchSpec(
            model=ModelSource.of(model, shared=started_here),
            forget=data.forget,
            retain=data.retain,
            eval_set=data,
            eval_settings=settings,
            dtype=dtype,
            utility_floor=0.0,
        )
        executor = Executor(run_dir, spec, resources, run_dir / "ray")
        for event, content in events(executor.handle, name, to_dict(trial)):
            log(f"{name} {event}: " + ", ".join(f"{key} {value}" for key, value in content.items() if value != ""))
        executor.close()
    return next(record for record in load_records(run_dir)[0] if record.id == name)


# -- merging -------------------------------------------------------------------------------------


def merge(
    base: str,
    members: Sequence[str],
    out: str | Path,
    *,
    method: str = "ties",
    densities: Sequence[Graded] = (1.0,),
    weights: Sequence[Graded] | None = None,
    lambda_: Graded = 1.0,
    as_adapter: bool = False,
    rank: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Path:
    """Merges adapters, snapshots or full checkpoints of one base into a model directory, or an adapter, at `out`.

    A density or weight for each member, or one for all; a list in place of a number is a gradient
    over depth. `options` are the recipe's others: normalize, rescale, epsilon, gamma, seed.
    """
    names = [str(member) for member in members]
    if len(set(names)) != len(names):
        raise InputError(f"a member is named twice: {names}. Give it once, with the sum of its weights.")
    recipe = MergeRecipe(
        method=method,
        members=names,
        weights=list(weights) if weights else [1.0] * len(names),
        densities=list(densities) * (len(names) if len(densities) == 1 else 1),
        lambda_=lambda_,
        **options,
    )
    if not MERGES[method].uses_density and any(density != 1.0 for density in recipe.densities):
        raise InputError(f"{method} thins nothing out: a density of {list(densities)} would change nothing; leave it.")
    return merge_by_recipe(recipe, base, out, as_adapter=as_adapter, rank=rank, log=log)


def merge_by_recipe(
    recipe: MergeRecipe | str | Path,
    base: str | None,
    out: str | Path,
    *,
    folder: str | Path | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """The merge that a recipe names, or the file or model card it stands in; the same bytes each time on one machine.

    `base` and `folder` (what members' names are relative to) are the file's own where None.
    """
    from ray_unlearn.merging.files import MERGE_FILE, MergePlan, merge_file, read_plan
    from ray_unlearn.models import check_adapter

    given = (
        MergePlan(recipe=recipe, base=None, folder=None) if isinstance(recipe, MergeRecipe) else read_plan(Path(recipe))
    )
    base = base or given.base
    if base is None:
        raise InputError("the recipe names no base model; give --base.")
    if rank is not None and not (as_adapter and rank >= 1):
        raise InputError(f"--rank belongs to --as-adapter and must be at least 1, got {rank}.")
    place = claim_directory(out, MERGE_FILE)
    check_model(base)
    sources = given.sources(Path(folder) if folder else None)
    for source in sources.values():
        if not source.is_dir():
            raise InputError(f"no such member: {source}. Names in a recipe are relative to its folder; give --folder.")
        if (source / "adapter_config.json").exists():
            check_adapter(str(source), base)
    if as_adapter:
        _merge_into_adapter(given.recipe, base, sources, place, rank, log)
    else:
        from ray_unlearn.merging.writer import write_merge

        write_merge(given.recipe, base, sources, place)
    from ray_unlearn.report.card import merge_card

    content = merge_file(given.recipe, base, Path(folder) if folder else given.folder)
    write_text(place / "README.md", merge_card(content))
    write_json(place / MERGE_FILE, content)
    return place


def _merge_into_adapter(
    recipe: MergeRecipe, base: str, sources: dict[str, Path], place: Path, rank: int | None, log: Callable[[str], None]
) -> None:
    from ray_unlearn.merging.adapter import write_adapter

    report = write_adapter(recipe, load_model(base), base, sources, place, rank)
    if report.exact:
        log(f"an adapter of rank {report.rank}, exact")
    else:
        name, share = report.worst
        log(
            f"an adapter of rank {report.rank}: {report.error:.4f} of the merged delta's Frobenius norm is cut off, "
            f"at most {share:.4f} of one tensor's ({name})"
        )
