"""An evaluation in shares that are computed as a whole: the same shares whoever computes which."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_unlearn.data.questions import Question
from ray_unlearn.data.tokens import Encoded
from ray_unlearn.evaluation import generation, mmlu
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models import likelihood
from ray_unlearn.models.forward import context_of, scoring_mode
from ray_unlearn.protocols import CausalLM, Tokenizer

T = TypeVar("T")
Gather = Callable[[list[Any]], list[Any]]
"""All workers' lists to their concatenation on every worker; the identity when there is one worker."""


@dataclass(frozen=True)
class Shard:
    """This worker's part of a sharded evaluation."""

    rank: int = 0
    world: int = 1
    gather: Gather = list

    def take(self, items: Sequence[T]) -> list[T]:
        """Every world-th item, from rank."""
        return list(items[self.rank :: self.world])

    def join(self, mine: Sequence[T], total: int) -> list[T]:
        """All workers' results in the order of the whole."""
        if self.world == 1:
            return list(mine)
        together = self.gather(list(mine))
        sizes = [len(range(rank, total, self.world)) for rank in range(self.world)]
        starts = [0, *itertools.accumulate(sizes)]
        return [together[starts[i % self.world] + i // self.world] for i in range(total)]


ALONE = Shard()


BATCHES_IN_UNIT = 8
"""Rows of a unit decode together: the more there are, the less often a single one that rambles on is waited for."""


@dataclass(frozen=True)
class WorkUnit:
    """A share of an evaluation that is computed as a whole: indices into the rows, documents or questions.

    Units depend on data and settings alone, so results are the same whoever computes which.
    """

    part: str
    """`texts` (of the forget rows, then the retain rows), `losses` (members, then the others) or `choices`."""
    rows: tuple[int, ...]


def split_work(data: EvalSet, settings: EvalSettings) -> list[WorkUnit]:
    """All units of an evaluation, each of a few batches."""
    size = BATCHES_IN_UNIT * settings.batch_size
    rows = [*data.forget, *data.retain]
    documents = [*data.members, *data.nonmembers] if data.members and data.nonmembers else []
    parts = {
        "texts": balanced_shares([len(row.input) + len(row.output) for row in rows], size),
        "losses": balanced_shares([len(document) for document in documents], size),
        "choices": _by_subject(data.questions, size),
    }
    return [WorkUnit(part, tuple(indices)) for part, groups in parts.items() for indices in groups]


def balanced_shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, each with its share of short and long ones."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = -(-len(order) // size)
    return [order[group::groups] for group in range(groups)]


def _by_subject(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`; a subject's questions stay together as far as they fit."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].subject, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def compute(
    unit: WorkUnit,
    model: CausalLM,
    tokenizer: Tokenizer,
    data: EvalSet,
    settings: EvalSettings,
    exact_texts: bool = True,
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


def document_losses(
    model: CausalLM, tokenizer: Tokenizer, documents: Sequence[str], settings: EvalSettings
) -> list[float]:
    """Mean next-token cross-entropy over each whole document, the MIA's signal; as finite numbers or InputError."""
    rows = [Encoded(tuple(tokenizer(text)["input_ids"]), 1) for text in documents]
    likelihood.check_documents(rows, context_of(model))
    losses = likelihood.row_losses(model, tokenizer.pad_token_id, rows, settings.batch_size, "document")
    likelihood.check_losses(losses)
    return losses


def mmlu_choices(
    model: CausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    dev: dict[str, list[Question]],
    settings: EvalSettings,
) -> list[int]:
    """Index of the option that the model chooses for each question."""
    if settings.mmlu_mode == "cloze":
        return mmlu.cloze_choices(model, tokenizer, questions, settings.batch_size)
    return mmlu.letter_choices(model, tokenizer, questions, dev, settings.mmlu_shots, settings.batch_size)
