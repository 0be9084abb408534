"""A model and examples to Scores. Treats a trained and a merged model alike; nothing here trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_unlearn import generation, likelihood, metrics, mmlu
from ray_unlearn.data import Encoded, Question
from ray_unlearn.errors import InputError
from ray_unlearn.forward import scoring_mode
from ray_unlearn.records import Example, Scores

Gather = Callable[[list[Any]], list[Any]]
"""All workers' lists to their concatenation on every worker; the identity when there is one worker."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How a model is scored; stated in every scores.json."""

    max_new_tokens: int = 256
    """Tokens generated at most for a row (the organisers' 256)."""
    batch_size: int = 32
    """Rows in one forward pass."""
    mmlu_mode: str = "letters"
    """`letters`: next-token probabilities of A-D; `cloze`: length-normalised log-probability of the option texts."""
    mmlu_shots: int = 5
    """Solved examples before a question, in `letters` mode."""

    def __post_init__(self) -> None:
        if self.mmlu_mode not in ("letters", "cloze"):
            raise InputError(f"mmlu.mode (--mmlu-mode) must be letters or cloze, got {self.mmlu_mode!r}.")
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.mmlu_shots < 0:
            raise InputError(
                f"max_new_tokens and batch_size must be at least 1 and mmlu.shots at least 0, got "
                f"{self.max_new_tokens}, {self.batch_size}, {self.mmlu_shots}."
            )


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What a model is scored on. Empty parts are not measured."""

    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    members: Sequence[str] = ()
    nonmembers: Sequence[str] = ()
    dev: dict[str, list[Question]] = field(default_factory=dict)
    questions: Sequence[Question] = ()


@dataclass(frozen=True)
class Shard:
    """This worker's part of a sharded evaluation."""

    rank: int = 0
    world: int = 1
    gather: Gather = list

    def take(self, items: Sequence[Any]) -> list[Any]:
        """Every world-th item, from rank."""
        return list(items[self.rank :: self.world])

    def join(self, mine: list[Any], total: int) -> list[Any]:
        """All workers' results in the order of the whole."""
        if self.world == 1:
            return mine
        together = self.gather(mine)
        sizes = [len(range(rank, total, self.world)) for rank in range(self.world)]
        starts = [0, *itertools.accumulate(sizes)]
        return [together[starts[i % self.world] + i // self.world] for i in range(total)]


ALONE = Shard()
BATCHES_IN_UNIT = 8
"""Rows of a unit decode together: the more there are, the less often a single one that rambles on is waited for."""
Log = Callable[[str], None]


# -- the work, in units --------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A share of an evaluation that is computed as a whole: indices into the rows, documents or questions.

    Units depend on data and settings alone, so results are the same whoever computes which.
    """

    part: str
    """`texts` (of the forget rows, then the retain rows), `losses` (members, then the others) or `choices`."""
    rows: tuple[int, ...]


def plan(data: EvalSet, settings: EvalSettings) -> list[Unit]:
    """All units of an evaluation, each of a few batches."""
    size = BATCHES_IN_UNIT * settings.batch_size
    rows = [*data.forget, *data.retain]
    documents = [*data.members, *data.nonmembers] if data.members and data.nonmembers else []
    parts = {
        "texts": dealt([len(row.input) + len(row.output) for row in rows], size),
        "losses": dealt([len(document) for document in documents], size),
        "choices": _by_subject(data.questions, size),
    }
    return [Unit(part, tuple(indices)) for part, groups in parts.items() for indices in groups]


def dealt(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, each with its share of short and long ones."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = -(-len(order) // size)
    return [order[group::groups] for group in range(groups)]


def _by_subject(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`; a subject's questions stay together as far as they fit."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].subject, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def compute(
    unit: Unit, model: Any, tokenizer: Any, data: EvalSet, settings: EvalSettings, exact_texts: bool = True
) -> list[Any]:
    """The unit's results, one for each of its rows: a text, a loss, or the index of an option."""
    with scoring_mode(model):
        if unit.part == "texts":
            rows = [*data.forget, *data.retain]
            return generation.continuations(
                model,
                tokenizer,
                [rows[i] for i in unit.rows],
                settings.max_new_tokens,
                settings.batch_size,
                exact_texts,
            )
        if unit.part == "losses":
            documents = [*data.members, *data.nonmembers]
            return document_losses(model, tokenizer, [documents[i] for i in unit.rows], settings)
        return mmlu_choices(model, tokenizer, [data.questions[i] for i in unit.rows], data.dev, settings)


def document_losses(model: Any, tokenizer: Any, documents: Sequence[str], settings: EvalSettings) -> list[float]:
    """Mean next-token cross-entropy over each whole document, the MIA's signal; as finite numbers or InputError."""
    rows = [Encoded(tuple(tokenizer(text)["input_ids"]), 1) for text in documents]
    likelihood.check_documents(rows, model)
    losses = likelihood.row_losses(model, tokenizer.pad_token_id, rows, settings.batch_size, "document")
    likelihood.check_losses(losses)
    return losses


def mmlu_choices(
    model: Any, tokenizer: Any, questions: Sequence[Question], dev: dict[str, list[Question]], settings: EvalSettings
) -> list[int]:
    """Index of the option that the model chooses for each question."""
    if settings.mmlu_mode == "cloze":
        return mmlu.cloze_choices(model, tokenizer, questions, settings.batch_size)
    return mmlu.letter_choices(model, tokenizer, questions, dev, settings.mmlu_shots, settings.batch_size)


# -- from results to scores ----------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a model said, lost and chose, in the order of the data."""

    texts: list[str]
    losses: list[float]
    choices: list[int]

    @classmethod
    def of(cls, units: Sequence[Unit], results: Sequence[Sequence[Any]]) -> Measured:
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
    model: Any,
    tokenizer: Any,
    data: EvalSet,
    settings: EvalSettings,
    shard: Shard = ALONE,
    log: Log = lambda line: None,
) -> tuple[Scores, list[str]]:
    """Scores of a model, and the generations for the forget rows followed by the retain rows.

    Every worker of a sharded evaluation gets the same result, whatever their number.
    """
    measured = _measure(model, tokenizer, data, settings, shard, log, exact_texts=True)
    return measured.scores(data, settings, dtype_of(model)), measured.texts


def score_model(model: Any, tokenizer: Any, data: EvalSet, settings: EvalSettings, shard: Shard = ALONE) -> Scores:
    """The same Scores where nobody reads the generations: rows end as soon as their score is certain."""
    measured = _measure(model, tokenizer, data, settings, shard, lambda line: None, exact_texts=False)
    return measured.scores(data, settings, dtype_of(model))


def _measure(
    model: Any,
    tokenizer: Any,
    data: EvalSet,
    settings: EvalSettings,
    shard: Shard,
    log: Log,
    exact_texts: bool,
) -> Measured:
    for line in generation.check_prompts(model, tokenizer, [*data.forget, *data.retain], settings.max_new_tokens):
        log(line)
    units = plan(data, settings)
    log(f"evaluating {describe(data)}")
    mine = [compute(unit, model, tokenizer, data, settings, exact_texts) for unit in shard.take(units)]
    return Measured.of(units, shard.join(mine, len(units)))


def describe(data: EvalSet) -> str:
    """What an evaluation is made of, in one line."""
    documents = f"{len(data.members)} members and {len(data.nonmembers)} others"
    return f"{len(data.forget) + len(data.retain)} rows, {documents}, {len(data.questions)} questions"


def dtype_of(model: Any) -> str:
    """The precision of the model's weights, as settings state it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def make_scores(
    rows: Sequence[tuple[str, str, str, str, str]],
    ids: Sequence[str],
    settings: dict[str, Any],
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
