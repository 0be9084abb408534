"""What a model is scored on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_unlearn.data.questions import Question
from ray_unlearn.metrics import METRICS
from ray_unlearn.records import Example
from ray_unlearn.schema import check_fields, option

MMLU_MODES = ("letters", "cloze")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How a model is scored; stated in every scores.json."""

    max_new_tokens: int = option(256, at_least=1)
    """Tokens generated at most for a row (the organisers' 256)."""
    batch_size: int = option(32, at_least=1)
    """Rows in one forward pass."""
    mmlu_mode: str = option("letters", choices=MMLU_MODES)
    """`letters`: next-token probabilities of A-D; `cloze`: length-normalised log-probability of the option texts."""
    mmlu_shots: int = option(5, at_least=0)
    """Solved examples before a question, in `letters` mode."""
    metrics: tuple[str, ...] = option((), choices=METRICS)
    """Further metrics that are measured with every score, by name."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What a model is scored on. Empty parts are not measured."""

    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    members: Sequence[str] = ()
    nonmembers: Sequence[str] = ()
    dev: dict[str, list[Question]] = field(default_factory=dict)
    questions: Sequence[Question] = ()
