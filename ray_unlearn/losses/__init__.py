"""Unlearning losses: pure functions of tensors to a scalar, and the table of methods made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray_unlearn.losses.ascent import cross_entropy, gradient_ascent
from ray_unlearn.losses.distillation import kl_divergence
from ray_unlearn.losses.preference import npo

LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": cross_entropy,
    "gradient_ascent": gradient_ascent,
    "kl_divergence": kl_divergence,
    "npo": npo,
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: the loss of the forget rows and the losses of the retain rows, by name in LOSSES."""

    forget: str
    retain: tuple[str, ...]
    formula: str
    parameters: tuple[str, ...]
    """Fields of TrialConfig that this method reads beyond those every method reads."""
    source: str

    @property
    def needs_reference(self) -> bool:
        """Whether the forget loss needs the reference model's log-probabilities."""
        return self.forget == "npo"


METHODS: dict[str, Method] = {
    "grad_ascent": Method(
        forget="gradient_ascent",
        retain=(),
        formula="-w_f CE_f",
        parameters=("forget_weight", "ascent_bound"),
        source="TOFU (Maini et al. 2024, arXiv 2401.06121), gradient ascent; the bound is this project's",
    ),
    "grad_diff": Method(
        forget="gradient_ascent",
        retain=("cross_entropy",),
        formula="-w_f CE_f + w_r CE_r",
        parameters=("forget_weight", "retain_weight", "retain_on", "ascent_bound"),
        source="Liu et al. 2022 (Continual Learning and Private Unlearning); TOFU, gradient difference",
    ),
    "kl_ascent": Method(
        forget="gradient_ascent",
        retain=("kl_divergence",),
        formula="-w_f CE_f + w_kl KL(ref || model)_r",
        parameters=("forget_weight", "kl_weight", "ascent_bound"),
        source="TOFU, KL minimisation",
    ),
    "ascent_kl_ce": Method(
        forget="gradient_ascent",
        retain=("kl_divergence", "cross_entropy"),
        formula="-w_f CE_f + w_kl KL(ref || model)_r + w_r CE_r",
        parameters=("forget_weight", "kl_weight", "retain_weight", "retain_on", "ascent_bound"),
        source="sum of TOFU's gradient difference and KL minimisation",
    ),
    "npo": Method(
        forget="npo",
        retain=(),
        formula="w_f (2/beta) mean log(1 + (p/p_ref)^beta)",
        parameters=("forget_weight", "npo_beta", "npo_ratio"),
        source="Zhang et al. 2024 (arXiv 2404.05868), eq. 3",
    ),
    "npo_kl_ce": Method(
        forget="npo",
        retain=("kl_divergence", "cross_entropy"),
        formula="w_f NPO_f + w_kl KL(ref || model)_r + w_r CE_r",
        parameters=("forget_weight", "kl_weight", "retain_weight", "retain_on", "npo_beta", "npo_ratio"),
        source="ZJUKLAB at SemEval-2025 Task 4 (arXiv 2503.21088)",
    ),
}
