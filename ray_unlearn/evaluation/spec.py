"""What a model is scored on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_unlearn.data.questions import Question
from ray_unlearn.errors import InputError
from ray_unlearn.records import Example


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
