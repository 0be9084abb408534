"""How the weight of the cross-entropy on retain rows moves: pure steps, and the states that take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray_unlearn.schema import Option, Range


def dual_step(multiplier: float, retain_loss: float, epsilon: float, rate: float) -> float:
    """The next multiplier of the constraint CE_r <= epsilon: max(0, l + rate (CE_r - epsilon)).

    Entesari et al. 2025 (arXiv 2506.05314). `retain_loss` must be the step's mean over all ranks.
    """
    return max(0.0, multiplier + rate * (retain_loss - epsilon))


def adaptive_weight(excess: float, low: float = 1.2, high: float = 2.3) -> float:
    """clip(round(0.3 * 6^excess + 0.8, 1), low, high) for CE_r above its baseline by `excess` nats, else low.

    SHA256's code (high 2.3; its paper, arXiv 2504.12996, is said to have 2.8).
    """
    if excess <= 0:
        return low
    return min(high, max(low, round(0.3 * 6 ** min(excess, 10.0) + 0.8, 1)))


class Weighting(Protocol):
    """The weight of the retain term of the next step."""

    weight: float

    def update(self, epoch: int, retain_loss: float) -> None:
        """Takes a step's cross-entropy on retain rows, the mean over all ranks."""


@dataclass
class Fixed:
    """The weight of the configuration, throughout."""

    weight: float
    options: Mapping[str, object]

    def update(self, epoch: int, retain_loss: float) -> None:
        """Nothing moves."""


@dataclass
class Dual:
    """PDU's multiplier: still during its warm-up epochs, then a dual step after each step."""

    weight: float
    options: Mapping[str, Any]

    def update(self, epoch: int, retain_loss: float) -> None:
        """One dual step."""
        if epoch >= self.options["pdu_warmup_epochs"]:
            self.weight = dual_step(self.weight, retain_loss, self.options["pdu_epsilon"], self.options["pdu_rate"])


@dataclass
class Adaptive:
    """SHA256's weight: the first epoch's mean loss is the baseline, and what exceeds it later weighs more.

    It follows the step before, averaged over ranks, where the published code uses each micro-batch's
    own loss. The baseline is the mean over steps; the code's is too low by the batch size.
    """

    weight: float
    options: Mapping[str, Any]
    low: float = field(init=False)
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.low = self.weight

    def update(self, epoch: int, retain_loss: float) -> None:
        """Adds to the baseline, or follows the excess over it."""
        if epoch == 0:
            self.seen.append(retain_loss)
        elif self.seen:
            excess = retain_loss - sum(self.seen) / len(self.seen)
            self.weight = adaptive_weight(excess, self.low, max(self.low, self.options["adaptive_max"]))


OPTIONS = {
    "pdu_epsilon": Option(
        hint=float,
        default=0.1,
        at_least=0,
        meaning="nats per retain token that PDU tolerates",
        search=Range(0.01, 0.5, log=True),
    ),
    "pdu_rate": Option(
        hint=float, default=1.0, above=0, meaning="step size of PDU's multiplier", search=Range(0.1, 5.0, log=True)
    ),
    "pdu_warmup_epochs": Option(
        hint=int, default=0, at_least=0, meaning="epochs before PDU's multiplier moves", search=Range(0, 5)
    ),
    "adaptive_max": Option(
        hint=float, default=2.3, above=0, meaning="largest retain weight of grad_diff_adaptive", search=Range(1.5, 4.0)
    ),
}
WEIGHTINGS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "fixed": (Fixed, ()),
    "dual": (Dual, ("pdu_epsilon", "pdu_rate", "pdu_warmup_epochs")),
    "adaptive": (Adaptive, ("adaptive_max",)),
}
"""Name -> the state's class, and the options that it reads."""
