"""Cross-entropy, its negation, and its weighted negations. B rows, T predicted tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_unlearn.losses.rows import mean, row_mean, scatter_tokens, token_mean
from ray_unlearn.losses.table import Method, mean_loss
from ray_unlearn.schema import Option, Range


def cross_entropy(logps: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: mean token cross-entropy, in nats; which mean, by `rows.mean`."""
    return mean(-logps, mask, pool)


def gradient_ascent(logps: Tensor, mask: Tensor, bound: float | None = None, pool: bool = False) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: minus the cross-entropy; rows at or above `bound` nats per token stop pushing.

    Minimising -min(CE, bound) has no gradient on a row already as surprising as `bound`, which keeps
    ascent from running away; with `pool` all rows are bounded as one. Unbounded: TOFU (arXiv 2401.06121), gradient
    ascent.
    """
    nll = token_mean(-logps, mask) if pool else row_mean(-logps, mask)
    return -(nll if bound is None else torch.where(nll < bound, nll, bound)).mean()


def weighted_ascent(logps: Tensor, mask: Tensor, beta: float = 1.0, pool: bool = False) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: weighted gradient ascent, mean of p^beta log p, p^beta without gradient.

    Tokens already improbable hardly count. Wang et al. 2025 (arXiv 2502.19301), WGA.
    """
    return mean((beta * logps).exp().detach() * logps, mask, pool)


def satimp(logps: Tensor, mask: Tensor, beta1: float = 5.0, beta2: float = 1.0, pool: bool = False) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: mean of p^beta1 (1-p)^beta2 log p, the weight without gradient.

    Saturation and importance weights: Yang et al. 2025 (arXiv 2505.11953), SatImp.
    """
    p = logps.exp()
    return mean((p**beta1 * (1 - p) ** beta2).detach() * logps, mask, pool)


def logit_margin(logits: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(logits [N,V], mask [B,T]) -> []: squared distance of the largest logit from the mean logit.

    Zero for a uniform distribution: bounded below, unlike ascent. The forget term of PDU (Entesari et
    al. 2025, arXiv 2506.05314).
    """
    return mean(scatter_tokens((logits.amax(-1) - logits.mean(-1)) ** 2, mask), mask, pool)


OPTIONS = {
    "pool_tokens": Option(
        hint=bool,
        default=False,
        meaning="whether means are over all tokens of a micro-batch alike, as in most published code; else each row "
        "counts once",
    ),
    "ascent_bound": Option(
        hint=float | None,
        default=None,
        above=0,
        meaning="nats per token at which ascent on a row stops pushing; null for unbounded ascent",
        search=Range(2.0, 8.0),
    ),
    "wga_beta": Option(
        hint=float, default=1.0, at_least=0, meaning="power of p in WGA's weight", search=Range(0.25, 4.0, log=True)
    ),
    "satimp_beta1": Option(
        hint=float, default=5.0, at_least=0, meaning="power of p in SatImp's weight", search=Range(0.5, 8.0, log=True)
    ),
    "satimp_beta2": Option(
        hint=float,
        default=1.0,
        at_least=0,
        meaning="power of 1 - p in SatImp's weight",
        search=Range(0.25, 2.0, log=True),
    ),
}
LOSSES = {
    "cross_entropy": mean_loss(compute=cross_entropy, tensors=("logps", "mask")),
    "gradient_ascent": mean_loss(compute=gradient_ascent, tensors=("logps", "mask"), options={"bound": "ascent_bound"}),
    "weighted_ascent": mean_loss(compute=weighted_ascent, tensors=("logps", "mask"), options={"beta": "wga_beta"}),
    "satimp": mean_loss(
        compute=satimp, tensors=("logps", "mask"), options={"beta1": "satimp_beta1", "beta2": "satimp_beta2"}
    ),
    "logit_margin": mean_loss(compute=logit_margin, tensors=("logits", "mask")),
}
METHODS = {
    "grad_ascent": Method(
        forget="gradient_ascent",
        formula="-w_f CE_f",
        source="TOFU (Maini et al. 2024, arXiv 2401.06121), gradient ascent; the bound is this project's",
    ),
    "grad_diff": Method(
        forget="gradient_ascent",
        retain=("cross_entropy",),
        formula="-w_f CE_f + w_r CE_r",
        source="Liu et al. 2022 (Continual Learning and Private Unlearning); TOFU, gradient difference",
    ),
    "grad_diff_adaptive": Method(
        forget="gradient_ascent",
        retain=("cross_entropy",),
        weighting="adaptive",
        formula="-w_f CE_f + a CE_r; a = w_r, later clip(round(0.3 6^(CE_r - baseline) + 0.8, 1), w_r, max)",
        source="SHA256 at SemEval-2025 Task 4 (arXiv 2504.12996)",
    ),
    "kl_ascent": Method(
        forget="gradient_ascent",
        retain=("kl_divergence",),
        formula="-w_f CE_f + w_kl KL_r",
        source="TOFU, KL minimisation",
    ),
    "ascent_kl_ce": Method(
        forget="gradient_ascent",
        retain=("kl_divergence", "cross_entropy"),
        formula="-w_f CE_f + w_kl KL_r + w_r CE_r",
        source="sum of TOFU's gradient difference and KL minimisation",
    ),
    "wga": Method(
        forget="weighted_ascent",
        retain=("cross_entropy",),
        formula="w_f mean p^beta log p + w_r CE_r",
        source="Wang et al. 2025 (arXiv 2502.19301), weighted gradient ascent",
    ),
    "satimp": Method(
        forget="satimp",
        retain=("cross_entropy",),
        formula="w_f mean p^b1 (1-p)^b2 log p + w_r CE_r",
        source="Yang et al. 2025 (arXiv 2505.11953)",
    ),
    "pdu": Method(
        forget="logit_margin",
        retain=("cross_entropy",),
        weighting="dual",
        formula="w_f mean (max z - mean z)^2 + l CE_r; l = w_r, then max(0, l + rate (CE_r - epsilon))",
        source="Entesari et al. 2025 (arXiv 2506.05314), primal-dual unlearning",
    ),
    "task_vector": Method(
        forget="cross_entropy",
        negates=True,
        formula="w_f CE_f gives d; the model is reference - negation d",
        source="Ilharco et al. 2023 (arXiv 2212.04089), task arithmetic: negation",
    ),
}
