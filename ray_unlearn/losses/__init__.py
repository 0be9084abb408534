"""Unlearning losses: pure functions of tensors to a scalar, and the table of methods made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray_unlearn.losses.ascent import cross_entropy, gradient_ascent
from ray_unlearn.losses.distillation import kl_divergence
from ray_unlearn.losses.preference import npo


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss and what it is called with."""

    compute: Callable[..., Any]
    tensors: tuple[str, ...]
    """In the order of its arguments: logits, ref_logits [B,T,V], logps, ref_logps [B,T], mask [B,T]."""
    options: dict[str, str] = field(default_factory=dict)
    """Keyword argument -> the field of TrialConfig that gives it."""
    whole_document: bool = False
    """Whether its mask is every token, whatever the configuration says."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the untrained model."""
        return any(name.startswith("ref_") for name in self.tensors)


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(compute=cross_entropy, tensors=("logps", "mask")),
    "gradient_ascent": Loss(compute=gradient_ascent, tensors=("logps", "mask"), options={"bound": "ascent_bound"}),
    "kl_divergence": Loss(compute=kl_divergence, tensors=("logits", "ref_logits", "mask"), whole_document=True),
    "npo": Loss(
        compute=npo, tensors=("logps", "ref_logps", "mask"), options={"beta": "npo_beta", "ratio": "npo_ratio"}
    ),
}
RETAIN_TERMS = {"cross_entropy": ("retain", "retain_weight"), "kl_divergence": ("kl", "kl_weight")}
"""Loss on retain rows -> the name of its part in a trial's course, and the field of TrialConfig that weighs it."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: the loss of the forget rows and the losses of the retain rows, by name in LOSSES."""

    forget: str
    retain: tuple[str, ...]
    formula: str
    parameters: tuple[str, ...]
    """Fields of TrialConfig that this method reads beyond those every method reads."""
    source: str

    def needs_reference(self, forget: bool, retain: bool) -> bool:
        """Whether a batch with forget rows, with retain rows, takes a forward pass of the untrained model."""
        on_retain = any(LOSSES[name].needs_reference for name in self.retain)
        return (forget and LOSSES[self.forget].needs_reference) or (retain and on_retain)


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
