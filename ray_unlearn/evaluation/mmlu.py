"""MMLU: what is asked, in which words, and which option a model chooses. Shared prefixes are computed once."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import torch
from torch import Tensor

from ray_unlearn.data.questions import LETTERS, Question
from ray_unlearn.data.tokens import Encoded, encode
from ray_unlearn.errors import InputError, problem_list
from ray_unlearn.models.forward import (
    MAX_LOGITS,
    MAX_TOKENS,
    batches,
    context_of,
    device_of,
    picked_logits,
    right_padded,
    rope_switch,
    vocabulary_of,
)
from ray_unlearn.models.likelihood import row_losses, token_losses
from ray_unlearn.protocols import CausalLM, Tokenizer

PROMPT_LIMIT = 2048
"""Tokens of a few-shot prompt in Open-Instruct; shots are dropped beyond it."""
MAX_CACHED = 4 * MAX_TOKENS
"""Tokens, prefixes included, whose keys and values one batch of questions may hold."""


def mmlu_prompt(question: Question, dev: Sequence[Question], shots: int, tokenizer: Tokenizer, limit: int) -> str:
    """Open-Instruct's MMLU prompt: header, solved examples, the question; shots are dropped beyond `limit` tokens.

    The header's two spaces before the subject are Open-Instruct's (format_subject), and so are questions and options
    as pandas reads them (Question.printed).
    """
    header = f"The following are multiple choice questions (with answers) about  {question.subject.replace('_', ' ')}."
    solved = [_block(shot) + f" {LETTERS[shot.answer]}\n\n" for shot in dev[:shots]]
    while True:
        prompt = f"{header}\n\n" + "".join(solved) + _block(question)
        if not solved or len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) <= limit:
            return prompt
        solved.pop()


def _block(question: Question) -> str:
    text, *four = question.printed or (question.question, *question.options)
    options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, four, strict=True))
    return f"{text}{options}\nAnswer:"


def letter_choices(
    model: CausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    dev: dict[str, list[Question]],
    shots: int,
    batch_size: int,
) -> list[int]:
    """Index of the most probable next token among " A", " B", " C", " D" after the few-shot prompt."""
    logits = letter_logits(model, tokenizer, questions, dev, shots, batch_size)
    return [four.index(max(four)) for four in logits]


def letter_logits(
    model: CausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    dev: dict[str, list[Question]],
    shots: int,
    batch_size: int,
) -> list[list[float]]:
    """Logits of " A", " B", " C", " D" after each question's few-shot prompt.

    The questions of a subject share the tokens of their header and examples, which are computed
    once. Raises InputError for letters that are one token, and for NaN logits.
    """
    letters = _letter_ids(tokenizer)
    context = context_of(model)
    limit = PROMPT_LIMIT if context is None else min(PROMPT_LIMIT, context - 1)
    texts = [mmlu_prompt(q, dev.get(q.subject, []), shots, tokenizer, limit) for q in questions]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    _refuse(_too_long(questions, [len(prompt) for prompt in prompts], context))
    found: list[list[float]] = [[]] * len(prompts)
    shared = [text.removesuffix(_block(question)) for text, question in zip(texts, questions, strict=True)]
    for prefix, group in _by_prefix(model, shared, prompts):
        for index, values in _last_logits(model, tokenizer.pad_token_id, prompts, prefix, group, batch_size):
            found[index] = _finite(values[letters]).tolist()
    return found


def _by_prefix(
    model: CausalLM, shared: Sequence[str], prompts: Sequence[tuple[int, ...]]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Groups of prompts whose texts begin with the same header and examples, and the tokens that they share.

    Prompts that are alone with theirs are one group, which shares nothing.
    """
    from ray_unlearn.models.cached_passes import reads_in_pieces

    groups: dict[str, list[int]] = {}
    for index, text in enumerate(shared):
        groups.setdefault(text, []).append(index)
    if not reads_in_pieces(model, max(map(len, prompts), default=0)):
        return [((), list(range(len(prompts))))]
    found: list[tuple[tuple[int, ...], list[int]]] = []
    alone: list[int] = []
    for group in groups.values():
        if len(group) == 1:
            alone += group
            continue
        common = len(os.path.commonprefix([prompts[i] for i in group]))
        shortest = min(len(prompts[i]) for i in group)
        found.append((prompts[group[0]][: min(common, shortest - 1)], group))
    return [*found, ((), alone)] if alone else found


def _last_logits(
    model: CausalLM,
    pad: int,
    prompts: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    group: Sequence[int],
    batch_size: int,
) -> list[tuple[int, Tensor]]:
    """(index, logits [V] after its last token) of each prompt of a group."""
    from ray_unlearn.models.kv_cache import selected, whole_cache

    device = device_of(model)
    filled = None
    if prefix:
        filled = whole_cache()
        last = torch.tensor([len(prefix) - 1], device=device)
        picked_logits(model, torch.zeros_like(last), last, filled, input_ids=torch.tensor([prefix], device=device))
    rests = [prompts[i][len(prefix) :] for i in group]
    found = []
    most = max(1, min(batch_size, MAX_CACHED // max(1, max(len(prompts[i]) for i in group))))
    for batch in batches([len(rest) for rest in rests], most, MAX_TOKENS, rope_switch(model)):
        ids = right_padded([rests[i] for i in batch], pad, device)
        rows = torch.arange(len(batch), device=device)
        last = torch.tensor([len(rests[i]) - 1 for i in batch], device=device)
        cache = selected(filled, torch.zeros_like(rows)) if filled is not None else None
        logits = picked_logits(model, rows, last, cache, input_ids=ids)
        found += [(group[i], values) for i, values in zip(batch, logits, strict=True)]
    return found


def cloze_choices(model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int) -> list[int]:
    """Index of the option text with the lowest mean token loss after the bare question."""
    losses = cloze_losses(model, tokenizer, questions, batch_size)
    return [four.index(min(four)) for four in losses]


def cloze_losses(
    model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int
) -> list[list[float]]:
    """Mean token loss of each question's four option texts after the bare question, which is computed once for them.

    Raises InputError for an option without a token, and for NaN logits.
    """
    from ray_unlearn.models.cached_passes import reads_after_gaps

    rows = _cloze_rows(tokenizer, questions)
    _refuse(_cloze_problems(questions, rows, context_of(model)))
    pad = tokenizer.pad_token_id
    prompts = [rows[4 * i].ids[: rows[4 * i].prompt] for i in range(len(questions))]
    answers = [row.ids[row.prompt :] for row in rows]
    if not reads_after_gaps(model, max(map(len, prompts), default=0) + max(map(len, answers), default=0)):
        losses = row_losses(model, pad, rows, batch_size, "answer")
    else:
        losses = [0.0] * len(rows)
        room = min(MAX_TOKENS, MAX_LOGITS // vocabulary_of(model)) // 4
        for group in batches([len(prompt) for prompt in prompts], max(1, batch_size // 4), room):
            means = _answer_losses(model, pad, [prompts[i] for i in group], [answers[4 * i : 4 * i + 4] for i in group])
            for index, four in zip(group, means, strict=True):
                losses[4 * index : 4 * index + 4] = four
    _finite(torch.tensor(losses))
    return [losses[i : i + 4] for i in range(0, len(losses), 4)]


def _answer_losses(
    model: CausalLM, pad: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Mean token loss of each prompt's four answers.

    The prompts' pass predicts the answers' first tokens; a second one, over its cache four times,
    reads the answers but their last token.
    """
    from ray_unlearn.models.cached_passes import read_after_gap
    from ray_unlearn.models.kv_cache import selected, whole_cache

    device = device_of(model)
    flat = [answer for four in answers for answer in four]
    owner = torch.arange(len(prompts), device=device).repeat_interleave(4)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = whole_cache()
    ids = right_padded(prompts, pad, device)
    first = picked_logits(model, torch.arange(len(prompts), device=device), lengths - 1, cache, input_ids=ids)
    targets = torch.tensor([answer[0] for answer in flat], device=device)
    totals = token_losses(first[owner], targets).double()
    counts = torch.tensor([len(answer) for answer in flat], device=device)
    if int(counts.max()) > 1:
        texts = right_padded(flat, pad, device)
        rows, columns = (torch.arange(texts.shape[1] - 1, device=device) < counts[:, None] - 1).nonzero(as_tuple=True)
        logits = read_after_gap(model, selected(cache, owner), lengths[owner], texts[:, :-1], rows, columns)
        totals.index_add_(0, rows, token_losses(logits, texts[rows, columns + 1]).double())
    return (totals / counts).view(-1, 4).tolist()


def check_questions(context: int | None, tokenizer: Tokenizer, questions: Sequence[Question], mode: str) -> None:
    """Refuses, all of them listed, questions that cannot be asked: longer alone than the context, or in cloze with an
    option of no token; and a tokenizer for which the letters are one."""
    if mode == "cloze":
        _refuse(_cloze_problems(questions, _cloze_rows(tokenizer, questions), context))
        return
    _letter_ids(tokenizer)
    bare = [mmlu_prompt(question, [], 0, tokenizer, 0) for question in questions]
    _refuse(_too_long(questions, [len(ids) for ids in tokenizer(bare)["input_ids"]] if bare else [], context))


def _letter_ids(tokenizer: Tokenizer) -> list[int]:
    letters: list[int] = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
    if len(set(letters)) < 4:
        raise InputError(
            f"the tokenizer does not tell the letters A to D apart: their last ids are {letters}. "
            "Score the option texts instead (mmlu.mode: cloze)."
        )
    return letters


def _cloze_rows(tokenizer: Tokenizer, questions: Sequence[Question]) -> list[Encoded]:
    """Each question with each of its four options."""
    return [encode(tokenizer, question.question, option) for question in questions for option in question.options]


def _cloze_problems(questions: Sequence[Question], rows: Sequence[Encoded], context: int | None) -> list[str]:
    longest = [max(len(row.ids) for row in rows[i : i + 4]) for i in range(0, len(rows), 4)]
    empty = [number for number, row in enumerate(rows) if len(row.ids) == row.prompt]
    return _too_long(questions, longest, context) + [
        f"{_name(questions[number // 4], number // 4)}: option {LETTERS[number % 4]} has no token to score"
        for number in empty
    ]


def _too_long(questions: Sequence[Question], lengths: Sequence[int], context: int | None) -> list[str]:
    return [
        f"{_name(question, number)}: {length} tokens without any example, and the model's context is {context}"
        for number, (question, length) in enumerate(zip(questions, lengths, strict=True))
        if context is not None and length > context
    ]


def _name(question: Question, number: int) -> str:
    return f"{question.subject} ({question.place or f'question {number + 1}'})"


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        what = f"MMLU question{'s' * (len(problems) > 1)} cannot be asked"
        raise InputError(problem_list(what, problems, "Remove the rows from the files, or use another model."))


def _finite(values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise InputError("the model's logits are NaN on MMLU: its weights have diverged, and no option is chosen.")
    return values
