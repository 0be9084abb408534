"""What an attack is: a row of ATTACKS. It works on a model and rows, and knows no Ray and no run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an attack read off rows."""

    rows: tuple[str, ...]
    """Ids of the rows, none of which the attack itself used."""
    values: Mapping[str, Sequence[float]]
    """Signal -> its value for each of the rows."""

    def means(self) -> dict[str, float]:
        """Signal -> mean over the rows."""
        return {signal: sum(values) / len(values) for signal, values in self.values.items()}


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on one model."""

    forget: Findings
    control: Findings
    """The same of control rows: unseen ones say what can be guessed, retain rows what is still known."""
    settings: Mapping[str, object]
    """What the attack was done with."""


class RunAttack(Protocol):
    """An attack's function."""

    def __call__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        forget: Sequence[Example],
        control: Sequence[Example],
        *,
        batch_size: int = 32,
        seed: int = 0,
    ) -> AttackResult:
        """The findings on forget rows and on control rows. The model is left as it was. Raises InputError for rows
        that it cannot be made on."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack: how it is made, and what its signals mean."""

    run: RunAttack
    signals: Mapping[str, float]
    """Signal -> its value where everything is known. The nearer the forget rows' value is to it, beyond that of the
    control rows, the more has been left."""
    formula: str
    source: str
