"""Losses between two distributions over the vocabulary. N masked tokens in row-major order, V vocabulary entries."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ray_unlearn.losses.rows import mean, scatter_tokens, token_mean
from ray_unlearn.losses.table import Loss, Method, mean_loss
from ray_unlearn.schema import Option, Range


def kl_divergence(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, direction: str = "reference", pool: bool = False
) -> Tensor:
    """(logits [N,V], ref_logits [N,V], mask [B,T]) -> []: KL between two models, mean as by `rows.mean`.

    `reference`: KL(ref || model), the direction of TOFU's and ZJUKLAB's code; `model`: KL(model || ref).
    Padding counts only where the mask says `all` (published code averages over it, which dilutes the
    term by the amount of padding).
    """
    ours, theirs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    weigh, against = (theirs, ours) if direction == "reference" else (ours, theirs)
    return mean(scatter_tokens((weigh.exp() * (weigh - against)).sum(-1), mask), mask, pool)


def target_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """(logps [B,T], ref_logps [B,T], mask [B,T]) -> []: p_ref (log p_ref - log p) of the target tokens, pooled mean.

    One summand of the KL divergence for each token; can be negative. Atyaephyra (arXiv 2503.13690), code.
    """
    return token_mean(ref_logps.exp() * (ref_logps - logps), mask)


def renyi_divergence(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, alpha: float = 0.5, pool: bool = False
) -> Tensor:
    """(logits [N,V], ref_logits [N,V], mask [B,T]) -> []: Renyi divergence of order alpha of ref from model.

    log(sum p_ref^alpha p^(1-alpha)) / (alpha - 1), mean as by `rows.mean`; KL(ref || model) as alpha goes to 1.
    Renyi 1961.
    """
    mixed = alpha * ref_logits.log_softmax(-1) + (1 - alpha) * logits.log_softmax(-1)
    return mean(scatter_tokens(mixed.logsumexp(-1) / (alpha - 1), mask), mask, pool)


def undial(
    logits: Tensor, ref_logits: Tensor, targets: Tensor, mask: Tensor, beta: float = 10.0, pool: bool = False
) -> Tensor:
    """(logits [N,V], ref_logits [N,V], targets [N], mask [B,T]) -> []: cross-entropy against an adjusted reference.

    The teacher is softmax(ref_logits - beta onehot(target)): Dong et al. 2024 (arXiv 2402.10052).
    Masked tokens only; open-unlearning's code also counts prompt and padding.
    """
    lowered = ref_logits - beta * F.one_hot(targets, ref_logits.shape[-1])
    pointwise = -(lowered.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return mean(scatter_tokens(pointwise, mask), mask, pool)


def ce_u(logits: Tensor, targets: Tensor, mask: Tensor, skip: int = 1, pool: bool = False) -> Tensor:
    """(logits [N,V], targets [N], mask [B,T]) -> []: cross-entropy against the model's own rest of the distribution.

    The teacher is softmax of the model's logits, without gradient, with the target's at minus infinity:
    Yang 2025 (arXiv 2503.01224), CE-U. A row's first `skip` masked tokens do not count.
    """
    teacher = logits.detach().scatter(-1, targets[:, None], -math.inf).softmax(-1)
    later = mask & (mask.cumsum(1) > skip)
    return mean(scatter_tokens(-(teacher * logits.log_softmax(-1)).sum(-1), mask), later, pool)


def noise_kl(logits: Tensor, noise: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(logits [N,V], noise [N,V], mask [B,T]) -> []: KL(teacher || model) for a teacher of random logits.

    MALTO's second teacher (SemEval-2025 Task 4): standard normal logits, drawn anew for each batch.
    """
    return kl_divergence(logits, noise, mask, pool=pool)


OPTIONS = {
    "kl_direction": Option(
        hint=str,
        default="reference",
        choices=("reference", "model"),
        meaning="which distribution weighs: KL(reference || model) or KL(model || reference)",
    ),
    "renyi_alpha": Option(
        hint=float,
        default=0.5,
        above=0,
        meaning="order of the Renyi divergence, not 1",
        search=Range(0.1, 0.9),
        never={1: "where the divergence is KL: use npo_kl_ce"},
    ),
    "undial_beta": Option(
        hint=float,
        default=10.0,
        above=0,
        meaning="how far UNDIAL lowers the target's logit",
        search=Range(1.0, 30.0, log=True),
    ),
    "ce_u_skip": Option(
        hint=int, default=1, at_least=0, meaning="first tokens of an answer that CE-U leaves alone", search=(0, 1, 2)
    ),
}


def _always(options: Mapping[str, object]) -> bool:
    return True


LOSSES = {
    "kl_divergence": mean_loss(
        compute=kl_divergence,
        tensors=("logits", "ref_logits", "mask"),
        options={"direction": "kl_direction"},
        part="kl",
    ),
    "target_kl": Loss(compute=target_kl, tensors=("logps", "ref_logps", "mask"), part="kl", pools=_always),
    "renyi_divergence": mean_loss(
        compute=renyi_divergence,
        tensors=("logits", "ref_logits", "mask"),
        options={"alpha": "renyi_alpha"},
        part="kl",
    ),
    "undial": mean_loss(
        compute=undial, tensors=("logits", "ref_logits", "targets", "mask"), options={"beta": "undial_beta"}
    ),
    "ce_u": mean_loss(compute=ce_u, tensors=("logits", "targets", "mask"), options={"skip": "ce_u_skip"}),
    "noise_kl": mean_loss(compute=noise_kl, tensors=("logits", "noise", "mask")),
}
METHODS = {
    "undial": Method(
        forget="undial",
        retain=("cross_entropy",),
        formula="w_f CE(softmax(z_ref - beta onehot), model)_f + w_r CE_r",
        source="Dong et al. 2024 (arXiv 2402.10052)",
    ),
    "ce_u": Method(
        forget="ce_u",
        formula="w_f CE(softmax(z without the target), model)_f",
        source="Yang 2025 (arXiv 2503.01224), CE-U",
    ),
    "dual_teacher": Method(
        forget="noise_kl",
        retain=("kl_divergence",),
        formula="w_f KL(noise || model)_f + w_kl KL_r",
        source="MALTO at SemEval-2025 Task 4; attribution of the code unverified",
    ),
}
