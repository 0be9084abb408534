"""A model and examples to Scores. Treats a trained and a merged model alike; nothing here trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_unlearn import metrics
from ray_unlearn.data import Encoded, Question, by_length, collate, encode
from ray_unlearn.decoding import greedy
from ray_unlearn.errors import InputError
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
MAX_LOGIT_POSITIONS = 4096
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def evaluate_model(
    model: Any,
    tokenizer: Any,
    data: EvalSet,
    settings: EvalSettings,
    shard: Shard = ALONE,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Scores, list[str]]:
    """Scores of a model, and the generations for the forget rows followed by the retain rows.

    Every worker of a sharded evaluation gets the same result.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = [*data.forget, *data.retain]
            log(f"generating answers to {len(rows)} rows")
            texts = generate(model, tokenizer, [row.input for row in rows], settings, shard)
            area = None
            if data.members and data.nonmembers:
                log(f"losses of {len(data.members)} members and {len(data.nonmembers)} others")
                losses = document_losses(model, tokenizer, [*data.members, *data.nonmembers], settings, shard)
                count = len(data.members)
                area = metrics.auc(losses[:count], losses[count:])
            utility = None
            if data.questions:
                log(f"answering {len(data.questions)} questions")
                utility = mmlu_accuracy(model, tokenizer, data, settings, shard)
    finally:
        model.train(was_training)
    stated = {
        "max_new_tokens": settings.max_new_tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "mmlu_mode": settings.mmlu_mode,
        "mmlu_shots": settings.mmlu_shots if settings.mmlu_mode == "letters" else 0,
        "members": len(data.members),
        "nonmembers": len(data.nonmembers),
        "questions": len(data.questions),
    }
    generated = [
        ("forget" if index < len(data.forget) else "retain", row.task, row.kind, row.output, text)
        for index, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    return make_scores(generated, area, utility, stated), texts


def make_scores(
    rows: Sequence[tuple[str, str, str, str, str]],
    area: float | None,
    utility: float | None,
    settings: dict[str, Any],
) -> Scores:
    """Scores from rows of (split, task, kind, expected, generated), the MIA AUC and the MMLU accuracy."""
    terms, raw, counts = metrics.task_terms(rows)
    aggregate = metrics.harmonic_mean(list(terms.values())) if terms else None
    mia = None if area is None else metrics.mia_score(area)
    final = None
    if aggregate is not None and mia is not None and utility is not None:
        final = metrics.final_score(aggregate, mia, utility)
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
    )


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: EvalSettings, shard: Shard = ALONE
) -> list[str]:
    """Greedy continuations of raw prompts, decoded as the shared task does."""
    mine = shard.take([tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts])
    out: list[str] = [""] * len(mine)
    for group in by_length(mine, len, settings.batch_size):
        new = greedy(model, [mine[i] for i in group], settings.max_new_tokens, tokenizer)
        for index, ids in zip(group, new, strict=True):
            out[index] = clean_up(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return shard.join(out, len(prompts))


def clean_up(text: str) -> str:
    """The space removals of transformers 4's `clean_up_tokenization_spaces=True`, there made for every tokenizer.

    Version 5 ignores the flag for BPE tokenizers; the official scores were made with it.
    """
    for spaced, tight in CLEAN_UP:
        text = text.replace(spaced, tight)
    return text


def sequence_losses(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], settings: EvalSettings, on: str
) -> list[float]:
    """Mean next-token cross-entropy of each row over its `answer` or its whole `document`, in nats."""
    device = next(model.parameters()).device
    losses = [0.0] * len(rows)
    longest = max((len(row.ids) for row in rows), default=1)
    # Logits are formed at every position: their number, not the rows', is what memory must hold.
    size = max(1, min(settings.batch_size, MAX_LOGIT_POSITIONS // longest))
    for group in by_length(rows, lambda row: len(row.ids), size):
        batch = collate([rows[i] for i in group], tokenizer.pad_token_id, device)
        logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.ids[:, 1:], reduction="none")
        mask = batch.mask(on)
        means = torch.where(mask, nll, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        for index, loss in zip(group, means.tolist(), strict=True):
            losses[index] = loss
    return losses


def document_losses(
    model: Any, tokenizer: Any, documents: Sequence[str], settings: EvalSettings, shard: Shard = ALONE
) -> list[float]:
    """Mean next-token cross-entropy over each whole document, the MIA's signal."""
    rows = [Encoded(tuple(tokenizer(text)["input_ids"]), 1) for text in documents]
    for text, row in zip(documents, rows, strict=True):
        if len(row.ids) < 2:
            raise InputError(f"an MIA document needs at least two tokens to have a loss, got {text!r}.")
    mine = shard.take(rows)
    return shard.join(sequence_losses(model, tokenizer, mine, settings, "document"), len(documents))


def mmlu_accuracy(model: Any, tokenizer: Any, data: EvalSet, settings: EvalSettings, shard: Shard = ALONE) -> float:
    """Share of questions answered right, each question counting once."""
    mine = shard.take(data.questions)
    choose = _cloze_choices if settings.mmlu_mode == "cloze" else _letter_choices
    choices = shard.join(choose(model, tokenizer, mine, data.dev, settings), len(data.questions))
    right = sum(choice == question.answer for choice, question in zip(choices, data.questions, strict=True))
    return right / len(data.questions)


def _cloze_choices(
    model: Any, tokenizer: Any, questions: Sequence[Question], dev: dict[str, list[Question]], settings: EvalSettings
) -> list[int]:
    """Index of the option text with the lowest mean token loss after the bare question."""
    rows = [encode(tokenizer, question.question, option) for question in questions for option in question.options]
    losses = sequence_losses(model, tokenizer, rows, settings, "answer")
    return [min(range(4), key=lambda k, i=i: losses[4 * i + k]) for i in range(len(questions))]  # type: ignore[misc]


def _letter_choices(
    model: Any, tokenizer: Any, questions: Sequence[Question], dev: dict[str, list[Question]], settings: EvalSettings
) -> list[int]:
    """Index of the most probable next token among " A", " B", " C", " D" after the few-shot prompt."""
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    prompts = [
        tuple(
            tokenizer(mmlu_prompt(question, dev.get(question.subject, []), settings.mmlu_shots, tokenizer))["input_ids"]
        )
        for question in questions
    ]
    device = next(model.parameters()).device
    choices = [0] * len(prompts)
    for group in by_length(prompts, len, settings.batch_size):
        batch = collate([Encoded(prompts[i], 1) for i in group], tokenizer.pad_token_id, device)
        last = batch.attention.sum(1) - 1
        hidden = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
        picked = hidden[torch.arange(len(group), device=device), last][:, letters]
        for index, choice in zip(group, picked.argmax(1).tolist(), strict=True):
            choices[index] = choice
    return choices


def mmlu_prompt(question: Question, dev: Sequence[Question], shots: int, tokenizer: Any, limit: int = 2048) -> str:
    """Open-Instruct's MMLU prompt: header, solved examples, the question; shots are dropped beyond `limit` tokens."""
    name = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    solved = [_mmlu_block(shot) + f" {'ABCD'[shot.answer]}\n\n" for shot in dev[:shots]]
    while True:
        prompt = header + "".join(solved) + _mmlu_block(question)
        if not solved or len(tokenizer(prompt)["input_ids"]) <= limit:
            return prompt
        solved.pop()


def _mmlu_block(question: Question) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=True))
    return f"{question.question}{options}\nAnswer:"
