"""What a trial needs around it: the process group it runs in, and what stays in a worker between trials."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.forward import context_of
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example

T = TypeVar("T")
UNSTATED_CONTEXT = 2048
"""Tokens that a model is taken to read where its configuration names no limit."""


class Worker(Protocol):
    """What a trial needs of the process group it runs in."""

    rank: int
    world: int

    def gather(self, items: list[T]) -> list[T]:
        """All ranks' lists, joined in rank order, on every rank."""

    def agree(self, value: float) -> float:
        """The smallest value over ranks."""

    def report(self, metrics: Mapping[str, object]) -> None:
        """Metrics to Ray Train; called by every rank alike."""

    def post(self, event: str, **content: object) -> None:
        """An event to the coordinator; only rank 0's count."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What the search shares under that name; made here when nobody has made it."""


@dataclass(kw_only=True)
class WorkerState:
    """What stays in a worker between trials: base model, tokenizer, data, and what to score on."""

    model: CausalLM
    tokenizer: Tokenizer
    forget: Sequence[Example]
    retain: Sequence[Example]
    eval_set: EvalSet
    eval_settings: EvalSettings
    dtype: str = "float32"
    utility_floor: float = 0.0
    """The utility under which a candidate is not feasible (absolute, not a share)."""
    _encoded: dict[Hashable, list[Encoded]] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Tokens that the model can take."""
        return context_of(self.model) or UNSTATED_CONTEXT

    def encoded(self, key: Hashable, make: Callable[[], list[Encoded]]) -> list[Encoded]:
        """Tokenised rows, made once for each way of tokenising."""
        if key not in self._encoded:
            self._encoded[key] = make()
        return self._encoded[key]
