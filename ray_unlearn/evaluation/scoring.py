"""A model and examples to Scores. Treats a trained and a merged model alike; nothing here trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_unlearn import metrics
from ray_unlearn.evaluation.checks import check_prompts
from ray_unlearn.evaluation.metric_suite import more_metrics
from ray_unlearn.evaluation.signals import ModelHere
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import ALONE, Shard, WorkUnit, compute, split_work
from ray_unlearn.metrics import METRICS
from ray_unlearn.metrics.summaries import Part
from ray_unlearn.models.forward import context_of
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Scores

Log = Callable[[str], None]


# -- the work, in units --------------------------------------------------------------------------


# -- from results to scores ----------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOutputs:
    """What a model said, lost and chose, in the order of the data."""

    texts: list[str]
    losses: list[float]
    choices: list[int]

    @classmethod
    def of(cls, units: Sequence[WorkUnit], results: Sequence[Sequence[object]]) -> ModelOutputs:
        """The units' results, put back in the order of the data."""
        parts: dict[str, dict[int, Any]] = {"texts": {}, "losses": {}, "choices": {}}
        for unit, found in zip(units, results, strict=True):
            parts[unit.part].update(zip(unit.rows, found, strict=True))
        texts, losses, choices = ([part[i] for i in range(len(part))] for part in parts.values())
        return cls(texts, losses, choices)

    def scores(self, data: EvalSet, settings: EvalSettings, dtype: str) -> Scores:
        """The data's Scores; parts without data are not measured."""
        count = len(data.members)
        right = [choice == question.answer for choice, question in zip(self.choices, data.questions, strict=True)]
        stated = {
            "max_new_tokens": settings.max_new_tokens,
            "dtype": dtype,
            "mmlu_mode": settings.mmlu_mode,
            "mmlu_shots": settings.mmlu_shots if settings.mmlu_mode == "letters" else 0,
            "members": len(data.members),
            "nonmembers": len(data.nonmembers),
            "questions": len(data.questions),
        }
        rows = [
            ("forget" if index < len(data.forget) else "retain", row.task, row.kind, row.output, text)
            for index, (row, text) in enumerate(zip([*data.forget, *data.retain], self.texts, strict=True))
        ]
        return make_scores(
            rows,
            [row.id for row in (*data.forget, *data.retain)],
            stated,
            members=self.losses[:count],
            nonmembers=self.losses[count:],
            right=right,
        )


def evaluate_model(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: EvalSet,
    settings: EvalSettings,
    shard: Shard = ALONE,
    log: Log = lambda line: None,
) -> tuple[Scores, list[str]]:
    """Scores of a model, and the generations for the forget rows followed by the retain rows.

    Every worker of a sharded evaluation gets the same result, whatever their number.
    """
    measured = _measure(model, tokenizer, data, settings, shard, log, exact_texts=True)
    return _scores(measured, model, tokenizer, data, settings, shard), measured.texts


def score_model(
    model: CausalLM, tokenizer: Tokenizer, data: EvalSet, settings: EvalSettings, shard: Shard = ALONE
) -> Scores:
    """The same Scores where nobody reads the generations: rows end as soon as their score is certain."""
    read = any("generated" in METRICS[name].signals for name in settings.metrics)
    measured = _measure(model, tokenizer, data, settings, shard, lambda line: None, exact_texts=read)
    return _scores(measured, model, tokenizer, data, settings, shard)


def _scores(
    measured: ModelOutputs, model: CausalLM, tokenizer: Tokenizer, data: EvalSet, settings: EvalSettings, shard: Shard
) -> Scores:
    """Scores, with the further metrics that the settings ask for. A part that is no finite number is left out: it
    could not be written down."""
    scores = measured.scores(data, settings, dtype_of(model))
    if not settings.metrics:
        return scores
    here = ModelHere(model=model, texts=measured.texts, scores=scores, shard=shard)
    found = more_metrics(settings.metrics, here, tokenizer, data, batch_size=settings.batch_size)
    finite = {name: {part: one for part, one in parts.items() if _finite(one)} for name, parts in found.items()}
    return replace(scores, metrics=finite)


def _finite(part: Part) -> bool:
    values = [value if isinstance(value, list) else [value] for value in part.values()]
    return all(math.isfinite(number) for value in values for number in value if not isinstance(number, str))


def _measure(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: EvalSet,
    settings: EvalSettings,
    shard: Shard,
    log: Log,
    exact_texts: bool,
) -> ModelOutputs:
    rows = [*data.forget, *data.retain]
    for line in check_prompts(context_of(model), tokenizer, rows, settings.max_new_tokens):
        log(line)
    units = split_work(data, settings)
    log(f"evaluating {describe(data)}")
    mine = [compute(unit, model, tokenizer, data, settings, exact_texts) for unit in shard.take(units)]
    return ModelOutputs.of(units, shard.join(mine, len(units)))


def describe(data: EvalSet) -> str:
    """What an evaluation is made of, in one line."""
    documents = f"{len(data.members)} members and {len(data.nonmembers)} others"
    return f"{len(data.forget) + len(data.retain)} rows, {documents}, {len(data.questions)} questions"


def dtype_of(model: CausalLM) -> str:
    """The precision of the model's weights, as settings state it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def make_scores(
    rows: Sequence[tuple[str, str, str, str, str]],
    ids: Sequence[str],
    settings: dict[str, object],
    *,
    members: Sequence[float] = (),
    nonmembers: Sequence[float] = (),
    right: Sequence[bool] = (),
    utility: float | None = None,
) -> Scores:
    """Scores and their intervals from rows of (split, task, kind, expected, generated) with their ids, the losses of
    the MIA's documents, and which questions were answered; `utility` where only their share is known."""
    values = metrics.row_values(rows)
    terms, raw, counts = metrics.cell_terms(values)
    aggregate = metrics.harmonic_mean(list(terms.values())) if terms else None
    area = metrics.auc(members, nonmembers) if len(members) or len(nonmembers) else None
    mia = None if area is None else metrics.mia_score(area)
    utility = sum(right) / len(right) if right else utility
    final = None
    if aggregate is not None and mia is not None and utility is not None:
        final = metrics.final_score(aggregate, mia, utility)
    documents = metrics.with_documents(values, ids)
    return Scores(
        terms=terms,
        raw=raw,
        counts=counts,
        task_aggregate=aggregate,
        mia_auc=area,
        mia_score=mia,
        utility=utility,
        final=final,
        settings=settings,
        intervals=metrics.objective_intervals(documents, members=members, nonmembers=nonmembers, right=right),
    )
