"""The commands as functions: typed results, InputError for bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.config import TrialConfig
from ray_unlearn.data import check_cells, load_documents, load_mmlu, load_pair
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import Evaluation, device
from ray_unlearn.evaluation import workers as workers_of
from ray_unlearn.files import claim_directory, claim_file, write_json, write_text
from ray_unlearn.measuring import DIFFERENCES, check_inputs
from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.merging.recipe import Graded
from ray_unlearn.models.loading import check_model, load_model
from ray_unlearn.official import OFFICIAL, check_shots, check_terms
from ray_unlearn.predictions import check_complete, prediction_rows, read_losses, read_predictions
from ray_unlearn.records import Example, Scores, TrialRecord, load_records
from ray_unlearn.schema import from_dict, to_dict
from ray_unlearn.scoring import EvalSet, EvalSettings, Measured, make_scores


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
    predictions: str | Path | None = None,
    losses: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int = 1,
    gpus_per_worker: float = 0,
    address: str | None = None,
    metrics: Sequence[str] = (),
    reference: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Scores:
    """Scores one model; `settings` are EvalSettings. Writes scores.json to `out`, and what `score` reads, where given.

    `metrics` are further ones by name (METRICS); `reference` is a model trained without the forget set, which some of
    them need and all are then compared with; given alone, it is for the score differences.

    With one worker it runs in this process, with more on as many Ray actors; the scores are the
    same. Finished parts are kept under `cache`, by a digest of weights, data and settings, and not
    computed again.

    `official` is the shared task's procedure: its twelve terms, raw prompts, greedy decoding of 256
    tokens, no cut but the context's end, 5-shot letters on MMLU, bfloat16 (float32 where there is no
    GPU). Left out are its accidents: results read back from CSV, where an empty generation and the
    texts NA and None become `nan`; rows that several processes score twice to fill their shares; and
    pandas' reading of MMLU, which writes a column of numbers anew (2 as 2.0). Its loss of input and
    output joined without a space enters no score and is not computed.
    """
    if (mia_member is None) != (mia_nonmember is None):
        raise InputError("the MIA needs both --mia-member and --mia-nonmember.")
    if losses is not None and mia_member is None:
        raise InputError("--losses are those of the MIA's documents: give --mia-member and --mia-nonmember.")
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}.")
    for file in (out, predictions, losses):
        claim_file(file)
    if official:
        settings |= OFFICIAL
        on_gpu = gpus_per_worker > 0 if workers > 1 else device() == "cuda"
        dtype = "bfloat16" if on_gpu else "float32"
    chosen = EvalSettings(**settings)
    for path in (model, reference):
        if path is not None:
            check_model(path)
    data = eval_set(forget, retain, mia_member, mia_nonmember, mmlu, skip_bad_rows)
    names = check_inputs(metrics or [DIFFERENCES] * (reference is not None), data, reference is not None)
    if official:
        check_terms({f"{e.task}/{e.kind}" for e in data.forget})
        check_shots(data, chosen.mmlu_shots)
    job = Evaluation(model=model, adapter=adapter, dtype=dtype, data=data, settings=chosen)
    with workers_of(workers, gpus_per_worker, address, log) as each:
        measured = job.measure(each, cache, log)
        scores = job.scores(measured)
        if names:
            more = job.more(names, measured.texts, scores, reference, each, cache, log)
            scores = dataclasses.replace(scores, metrics=more)
    _write_measured(data, measured, predictions, losses)
    if out is not None:
        write_json(Path(out), scores.to_json())
    return scores


def _write_measured(
    data: EvalSet, measured: Measured, predictions: str | Path | None, losses: str | Path | None
) -> None:
    """The files that `score` reads, where asked for."""
    if predictions is not None:
        write_text(Path(predictions), "".join(json.dumps(row) + "\n" for row in prediction_rows(data, measured.texts)))
    if losses is not None:
        count = len(data.members)
        write_json(Path(losses), {"member": measured.losses[:count], "nonmember": measured.losses[count:]})


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


# -- scoring generations made elsewhere ----------------------------------------------------------


def score(
    predictions: str | Path,
    *,
    mia: str | Path | None = None,
    mmlu_accuracy: float | None = None,
    official: bool = False,
    forget: str | None = None,
    retain: str | None = None,
    out: str | Path | None = None,
) -> Scores:
    """Scores a predictions file; needs no model, Ray or GPU. Writes scores.json to `out` where given.

    With the `forget` and `retain` files that were asked, every row of theirs must be there.
    """
    claim_file(out)
    if (forget is None) != (retain is None):
        raise InputError("give both --forget and --retain, or neither.")
    rows, places = read_predictions(predictions)
    if forget is not None and retain is not None:
        check_complete(str(predictions), places, {"forget": forget, "retain": retain})
    splits = {
        split: [Example(id="", input="", output="", task=row[1], kind=row[2]) for row in rows if row[0] == split]
        for split in ("forget", "retain")
    }
    check_cells(splits["forget"], splits["retain"])
    if official:
        check_terms({f"{row.task}/{row.kind}" for row in splits["forget"]})
    if mmlu_accuracy is not None and not (math.isfinite(mmlu_accuracy) and 0 <= mmlu_accuracy <= 1):
        raise InputError(f"--mmlu-accuracy must be in [0, 1], got {mmlu_accuracy}.")
    members, nonmembers = ((), ()) if mia is None else read_losses(Path(mia))
    scores = make_scores(
        rows,
        [name for _, name in places],
        {"predictions": str(predictions)},
        members=members,
        nonmembers=nonmembers,
        utility=mmlu_accuracy,
    )
    if out is not None:
        write_json(Path(out), scores.to_json())
    return scores


# -- one trial -----------------------------------------------------------------------------------


def read_trial_config(
    recipe_name: str | None,
    config: str | None,
    overrides: Sequence[str],
    geometry: Any = None,
    log: Callable[[str], None] = lambda line: None,
) -> TrialConfig:
    """The configuration of a recipe or a YAML file, with overrides applied; a recipe's is adapted to `geometry`."""
    from ray_unlearn.job import apply_override
    from ray_unlearn.recipes import recipe, scaled

    if (recipe_name is None) == (config is None):
        raise InputError("give either --recipe NAME or --config FILE.")
    if recipe_name is not None:
        found = recipe(recipe_name)
        found.trial()
        data = dict(found.config)
        if geometry is not None:
            data, changed = scaled(found.config, found.model, geometry)
            log(f"{recipe_name} scaled to the model: {'; '.join(changed) or 'nothing had to change'}")
    else:
        assert config is not None
        if geometry is not None:
            raise InputError("--scale-to-model goes with --recipe, which says what model it was made for.")
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
    scale_to_model: bool = False,
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
    from ray_unlearn.feed import check_rows
    from ray_unlearn.job import ResourcesPart
    from ray_unlearn.models.loading import empty_model
    from ray_unlearn.recipes import Geometry
    from ray_unlearn.tuning import check_tuning

    check_model(model)
    data = eval_set(forget, retain, skip_bad_rows=skip_bad_rows)
    shapes = empty_model(model)
    here = Geometry(layers=shapes.config.num_hidden_layers, hidden=shapes.config.hidden_size, rows=len(data.forget))
    trial = read_trial_config(recipe, config, overrides, here if scale_to_model else None, log)
    check_tuning(shapes, trial)
    check_rows(trial, data.forget)
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
    from ray_unlearn.models.loading import check_adapter

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
