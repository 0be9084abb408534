"""The choice: which candidate is delivered, its directory and card, and its score on documents the search never saw."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ray_unlearn.cluster.evaluators import score_models
from ray_unlearn.files import publish, room_for, versions, write_json, write_text
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.combine import Change, member_change, merge_change
from ray_unlearn.merging.recipe_file import MERGE_FILE, merge_file
from ray_unlearn.merging.writer import check_written, write_model
from ray_unlearn.models.loading import load_model
from ray_unlearn.models.snapshot_files import read_snapshot
from ray_unlearn.pipeline.directory import Run
from ray_unlearn.protocols import CausalLM
from ray_unlearn.records import Candidate, MergeRecord, candidates, load_records
from ray_unlearn.report import model_card
from ray_unlearn.run_files import DocumentCounts, Final, ShownRow


def choose(members: Sequence[Candidate], weights: Sequence[float]) -> Candidate:
    """The candidate with the highest weighted mean of the three objectives; of equal ones, the first by id.

    The maximum over all feasible candidates is on the front, whatever the (non-negative) weights.
    """

    def value(candidate: Candidate) -> float:
        return sum(w * x for w, x in zip(weights, candidate.scores.objectives(), strict=True)) / sum(weights)

    return min(members, key=lambda candidate: (-value(candidate), candidate.id))


def deliver(run: Run, choice: Candidate) -> None:
    """Writes best/, scores it beside the target on unseen documents, then its card, then final.json."""
    difference = write_best(run, choice)
    paths = [run.model_path, str(run.dir / "best")] + ([run.reference_path] if run.reference_path else [])
    (target, before), (best, after), *reference = score_models(run.job, paths, run.inputs.final_set, run.shared_storage)
    weights = run.job.selection.weights
    even = len(set(weights)) == 1
    rule = "highest final among feasible candidates" if even else f"highest mean of the objectives, weighted {weights}"
    data = run.inputs.final_set
    final = Final(
        choice=choice.id,
        kind=choice.kind,
        rule=rule,
        recipe=recipe_of(run, choice),
        target=target,
        best=best,
        reference=reference[0][0] if reference else None,
        examples=examples(run, before, after),
        mia_documents=DocumentCounts(
            member=len(data.members),
            nonmember_search=len(run.inputs.search_set.nonmembers),
            nonmember_final=len(data.nonmembers),
        ),
        written_max_difference=difference,
    )
    job = yaml.safe_load((run.dir / "job.yaml").read_text())
    write_text(run.dir / "best" / "README.md", model_card(job, final, versions()))
    write_json(run.dir / "final.json", final.to_json())


def recipe_of(run: Run, choice: Candidate) -> dict[str, object]:
    """How to make the candidate again: a trial's config and the step of the snapshot, or a merge's recipe with
    those of its members."""
    if isinstance(choice.record, MergeRecord):
        snapshots = {c.id: c for c in candidates(load_records(run.dir)[0], [])}
        leaves = MergeRecipe.from_json(choice.record.recipe).leaves()
        members = {name: recipe_of(run, snapshots[name]) for name in leaves}
        return {**choice.record.recipe, "dtype": run.job.model.dtype, "member_trials": members}
    assert choice.snapshot is not None
    return {**choice.record.config, "snapshot_step": choice.snapshot.step}


def write_best(run: Run, choice: Candidate) -> float:
    """Writes best/ in the job's dtype as a plain Hugging Face directory, for a merge with its merge.json.

    Returns the largest difference of the files from what the merge actors, or the trial, had in memory: the base
    loaded in that dtype, and the same change of it. Raises RuntimeError when that is above 1e-5; an earlier best/
    then stays.
    """
    dtype, out = run.job.model.dtype, run.dir / f".best.{os.getpid()}.tmp"
    change_of: Callable[[CausalLM], Change]
    if isinstance(choice.record, MergeRecord):
        recipe = MergeRecipe.from_json(choice.record.recipe)
        members = {name: read_snapshot(run.dir / "snapshots" / name) for name in recipe.leaves()}
        change_of = functools.partial(merge_change, recipe=recipe, members=members)
    else:
        recipe = None
        source = read_snapshot(run.dir / "snapshots" / choice.id)
        change_of = functools.partial(member_change, name=choice.id, source=source)
    stored = sum(file.stat().st_size for file in Path(run.model_path).glob("*.safetensors"))
    with room_for(run.dir / "best", stored or None):
        write_model(run.model_path, change_of, out, dtype)
    try:
        model = load_model(run.model_path, dtype)
        try:
            difference = check_written(model, change_of(model), out, dtype)
        except RuntimeError as error:
            raise RuntimeError(f"{choice.id} was not written as it was scored: {error}") from error
        if recipe is not None:
            write_json(out / MERGE_FILE, merge_file(recipe, run.model_path, run.dir / "snapshots", dtype))
        publish(out, run.dir / "best")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return difference


def examples(run: Run, before: Sequence[str], after: Sequence[str]) -> tuple[ShownRow, ...]:
    """The first rows of each split, task and kind, with what the two models generated."""
    rows = [("forget", e) for e in run.inputs.forget] + [("retain", e) for e in run.inputs.retain]
    shown: dict[tuple[str, str, str], int] = {}
    picked = []
    for (split, row), old, new in zip(rows, before, after, strict=True):
        cell = (split, row.task, row.kind)
        shown[cell] = shown.get(cell, 0) + 1
        if shown[cell] <= run.job.selection.examples:
            picked.append(
                ShownRow(
                    split=split,
                    id=row.id,
                    task=row.task,
                    kind=row.kind,
                    input=row.input,
                    expected=row.output,
                    before=old,
                    after=new,
                )
            )
    return tuple(picked)
