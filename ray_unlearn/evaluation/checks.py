"""What is refused before any work: data that do not fit the model's context, or are not the shared task's."""

from __future__ import annotations

from collections.abc import Sequence

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.mmlu import check_questions
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.forward import context_limit
from ray_unlearn.models.likelihood import check_documents
from ray_unlearn.models.loading import load_config, load_tokenizer
from ray_unlearn.protocols import Tokenizer
from ray_unlearn.records import Example

OFFICIAL_TERMS = 12
OFFICIAL = {"max_new_tokens": 256, "mmlu_mode": "letters", "mmlu_shots": 5}


def check_terms(cells: set[str]) -> None:
    """Refuses data whose tasks and kinds are not those of the twelve terms."""
    expected = {f"Task{task}/{kind}" for task in (1, 2, 3) for kind in ("sc", "qa")}
    if cells != expected:
        raise InputError(
            f"--official demands the shared task's {OFFICIAL_TERMS} terms; "
            f"missing {sorted(expected - cells)}, unexpected {sorted(cells - expected)}."
        )


def check_shots(data: EvalSet, shots: int) -> None:
    """Refuses MMLU subjects with fewer solved examples than are asked for."""
    short = [f"{subject} has {len(dev)}" for subject, dev in data.dev.items() if len(dev) < shots]
    if short:
        raise InputError(f"--official asks MMLU with {shots} examples of each subject; {'; '.join(short[:5])}.")


def check_fit(model: str, data: EvalSet, settings: EvalSettings) -> list[str]:
    """Refuses rows, documents and questions that the model at this path has no room for; no weights are loaded.

    Returns a line for each row whose generation its context will cut.
    """
    tokenizer, context = load_tokenizer(model), context_limit(load_config(model))
    lines = check_prompts(context, tokenizer, [*data.forget, *data.retain], settings.max_new_tokens)
    documents = [*data.members, *data.nonmembers]
    encoded = tokenizer(documents)["input_ids"] if documents else []
    check_documents([Encoded(tuple(ids), 1) for ids in encoded], context)
    check_questions(context, tokenizer, data.questions, settings.mmlu_mode)
    return lines


def check_prompts(context: int | None, tokenizer: Tokenizer, rows: Sequence[Example], max_new_tokens: int) -> list[str]:
    """Refuses prompts that fill the model's context; returns a line for each row whose generation it will cut.

    The organisers set no limit, and would let the model run past its context.
    """
    if context is None or not rows:
        return []
    lengths = [len(ids) for ids in tokenizer([row.input for row in rows])["input_ids"]]
    for row, length in zip(rows, lengths, strict=True):
        if length >= context:
            raise InputError(
                f"row {row.id!r}: its prompt has {length} tokens, and the model's context is {context}: no room to "
                "answer. Drop the row, or use a model with a longer context."
            )
    return [
        f"row {row.id!r}: its prompt has {length} tokens; its generation ends with the context after {context - length}"
        for row, length in zip(rows, lengths, strict=True)
        if length + max_new_tokens > context
    ]
