"""The commands as functions: typed results, InputError for bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray_unlearn.cluster.evaluators import WorkerPool
from ray_unlearn.cluster.evaluators import workers as workers_of
from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.data.rows import check_cells, load_membership, load_pair
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.checks import OFFICIAL, check_fit, check_shots, check_terms
from ray_unlearn.evaluation.evaluator import Evaluated, Evaluation, device
from ray_unlearn.evaluation.metric_suite import check_inputs, more_metrics, of_scores
from ray_unlearn.evaluation.predictions import check_complete, prediction_rows, read_losses, read_predictions
from ray_unlearn.evaluation.scoring import ModelOutputs, make_scores
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.files import claim_files, write_json, write_text
from ray_unlearn.metrics.summaries import Part
from ray_unlearn.models.loading import check_adapter, check_model, load_tokenizer
from ray_unlearn.plugins import load_plugins
from ray_unlearn.protocols import Log
from ray_unlearn.records import Example, Scores
from ray_unlearn.schema import from_dict


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files of an evaluation, those that are asked for."""

    scores: str | Path | None = None
    """scores.json."""
    predictions: str | Path | None = None
    """Each row's generation, as `score` reads it."""
    losses: str | Path | None = None
    """Each MIA document's loss, as `score` reads it for its `mia`."""
    cache: str | Path | None = None
    """Folder of finished parts, by a digest of weights, data and settings: they are not computed again."""

    def claim(self, inputs: Sequence[str | None]) -> None:
        """Refuses files that cannot be written, or that the inputs are in, before any work."""
        claim_files({"--out": self.scores, "--predictions": self.predictions, "--losses": self.losses}, inputs)

    def write(self, data: EvalSet, outputs: ModelOutputs, scores: Scores) -> None:
        """All but the cache."""
        if self.predictions is not None:
            rows = prediction_rows(data, outputs.texts)
            write_text(Path(self.predictions), "".join(json.dumps(row) + "\n" for row in rows))
        if self.losses is not None:
            count = len(data.members)
            write_json(Path(self.losses), {"member": outputs.losses[:count], "nonmember": outputs.losses[count:]})
        if self.scores is not None:
            write_json(Path(self.scores), scores.to_json())


def evaluate(
    model: str,
    forget: str,
    retain: str,
    *,
    adapter: str | None = None,
    mia_member: str | None = None,
    mia_nonmember: str | None = None,
    mmlu: str | None = None,
    skip_bad_rows: bool = False,
    official: bool = False,
    dtype: str = "float32",
    metrics: Sequence[str] = (),
    plugins: Sequence[str] = (),
    reference: str | None = None,
    out: str | Path | Outputs | None = None,
    workers: int | WorkerPool = 1,
    log: Log = lambda line: None,
    **settings: object,
) -> Scores:
    """Scores one model; `settings` are EvalSettings: max_new_tokens, batch_size, mmlu_mode, mmlu_shots.

    `out` is where scores.json goes, or an Outputs that names further files and a cache.

    `metrics` are further ones by name: of METRICS, to which `plugins` may add (see ray_unlearn.plugins). `reference` is
    a model trained without the forget set, which some of them need and all are then compared with; given alone, it is
    for the score differences.

    With one worker it runs in this process, with more on as many Ray actors (a WorkerPool says on what GPUs and which
    cluster); the scores are the same.

    `official` is the shared task's procedure: its twelve terms, raw prompts, greedy decoding of 256
    tokens, no cut but the context's end, 5-shot letters on MMLU in pandas' reading of its files (option
    None as nan), bfloat16 (float32 where there is no GPU). Left out are its accidents: results read back
    from CSV, where an empty generation and the texts NA and None become `nan`; and rows that several
    processes score twice to fill their shares. Its loss of input and output joined without a space
    enters no score and is not computed.
    """
    load_plugins(plugins)
    files = out if isinstance(out, Outputs) else Outputs(scores=out)
    pool = workers if isinstance(workers, WorkerPool) else WorkerPool(count=workers)
    chosen = from_dict(EvalSettings, settings | (OFFICIAL if official else {}), "settings")
    if official:
        on_gpu = pool.gpus_each > 0 if pool.count > 1 else device() == "cuda"
        dtype = "bfloat16" if on_gpu else "float32"
    if (mia_member is None) != (mia_nonmember is None):
        raise InputError("the MIA needs both --mia-member and --mia-nonmember.")
    if files.losses is not None and mia_member is None:
        raise InputError("--losses are those of the MIA's documents: give --mia-member and --mia-nonmember.")
    files.claim([model, adapter, forget, retain, mia_member, mia_nonmember, mmlu, reference])
    for path in (model, reference):
        if path is not None:
            check_model(path)
    if adapter is not None:
        check_adapter(adapter, model)
    data = eval_set(forget, retain, mia_member, mia_nonmember, mmlu, skip_bad_rows)
    names = check_inputs(metrics or (of_scores() if reference is not None else ()), data, reference is not None)
    if official:
        check_terms({f"{e.task}/{e.kind}" for e in data.forget})
        check_shots(data, chosen.mmlu_shots)
    for path in (model, reference):
        if path is not None:
            check_fit(path, data, chosen)  # what it has to say, the workers say
    job = Evaluation(model=model, adapter=adapter, dtype=dtype, data=data, settings=chosen)
    with workers_of(pool, log) as who:
        found = Evaluated(job, who, files.cache, log)
        scores = replace(found.scores, metrics=_further(names, found, reference)) if names else found.scores
    files.write(data, found.outputs, scores)
    return scores


def _further(names: Sequence[str], found: Evaluated, reference: str | None) -> dict[str, dict[str, Part]]:
    """The named metrics of what is evaluated, by the same workers, beside those of a reference."""
    other = None if reference is None else found.of(reference)
    job = found.evaluation
    tokenizer = load_tokenizer(job.model)
    batch_size = job.settings.batch_size
    return more_metrics(names, found, tokenizer, job.data, reference=other, batch_size=batch_size, log=found.log)


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
    members, nonmembers = (
        load_membership(mia_member, mia_nonmember, skip_bad_rows) if mia_member and mia_nonmember else ([], [])
    )
    dev, questions = load_mmlu(mmlu) if mmlu else ({}, [])
    return EvalSet(
        forget=left.examples,
        retain=right.examples,
        members=members,
        nonmembers=nonmembers,
        dev=dev,
        questions=questions,
    )


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
    claim_files({"--out": out}, [predictions, mia, forget, retain])
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
