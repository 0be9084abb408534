"""Preference-style losses. B rows, T predicted tokens; `ref` is the untrained model, `alt` the alternative answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ray_unlearn.losses.rows import row_mean, row_sum, token_mean
from ray_unlearn.losses.table import Loss, Method
from ray_unlearn.schema import Option, Range


def npo(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float = 0.1, ratio: str = "sum") -> Tensor:
    """(logps [B,T], ref_logps [B,T], mask [B,T]) -> []: negative preference optimisation.

    -(2/beta) mean log sigmoid(-beta log(p/p_ref)). log(p/p_ref) is, by `ratio`: `sum` over a row's
    masked tokens (Zhang et al. 2024, arXiv 2404.05868, eq. 3); their `mean`; the mean over the `batch`,
    all rows' tokens pooled to one ratio (ZJUKLAB, arXiv 2503.21088); or of each `token`, the outer mean
    over the pooled tokens (Atyaephyra, arXiv 2503.13690). As beta goes to 0 the gradient of `sum`
    becomes that of gradient ascent.
    """
    difference = logps - ref_logps
    if ratio == "token":
        return token_mean(-(2 / beta) * F.logsigmoid(-beta * difference), mask)
    pooled = {"sum": row_sum, "mean": row_mean, "batch": token_mean}[ratio](difference, mask)
    return -(2 / beta) * F.logsigmoid(-beta * pooled).mean()


def simnpo(logps: Tensor, mask: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: NPO without a reference, -(2/beta) mean log sigmoid(beta (NLL - delta)).

    NLL is a row's mean token loss. Fan et al. 2024 (arXiv 2410.07163), with
    delta for its margin as open-unlearning writes it (gamma = beta delta).
    """
    return -(2 / beta) * F.logsigmoid(beta * (row_mean(-logps, mask) - delta)).mean()


def dpo(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    alt_logps: Tensor,
    alt_ref_logps: Tensor,
    alt_mask: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """(three [B,T] of the answers, three [B,U] of the alternatives) -> []: the alternative is preferred.

    -(2/beta) mean log sigmoid(beta (log(p/p_ref)(alternative) - log(p/p_ref)(answer))), sums over
    tokens: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7, with NPO's factor 2/beta.
    """
    gain = row_sum(alt_logps - alt_ref_logps, alt_mask) - row_sum(logps - ref_logps, mask)
    return -(2 / beta) * F.logsigmoid(beta * gain).mean()


def _npo_pools(options: Mapping[str, object]) -> bool:
    return options["npo_ratio"] in ("batch", "token")


OPTIONS = {
    "npo_beta": Option(
        hint=float, default=0.1, above=0, meaning="inverse temperature of NPO", search=Range(0.01, 1.0, log=True)
    ),
    "npo_ratio": Option(
        hint=str,
        default="sum",
        choices=("sum", "mean", "batch", "token"),
        meaning="what NPO's log-ratio is of: a row's sum (the paper) or mean, the batch's mean, each token",
        search=("sum", "mean", "batch", "token"),
    ),
    "simnpo_beta": Option(
        hint=float, default=4.5, above=0, meaning="inverse temperature of SimNPO", search=Range(0.5, 6.0, log=True)
    ),
    "simnpo_delta": Option(
        hint=float, default=0.0, at_least=0, meaning="SimNPO's margin, nats per token", search=Range(0.0, 2.0)
    ),
    "dpo_beta": Option(
        hint=float, default=0.1, above=0, meaning="inverse temperature of DPO", search=Range(0.02, 1.0, log=True)
    ),
}
_DPO_TENSORS = ("logps", "ref_logps", "mask", "alt_logps", "alt_ref_logps", "alt_mask")
LOSSES = {
    "npo": Loss(
        compute=npo,
        tensors=("logps", "ref_logps", "mask"),
        options={"beta": "npo_beta", "ratio": "npo_ratio"},
        pools=_npo_pools,
    ),
    "simnpo": Loss(compute=simnpo, tensors=("logps", "mask"), options={"beta": "simnpo_beta", "delta": "simnpo_delta"}),
    "dpo": Loss(compute=dpo, tensors=_DPO_TENSORS, options={"beta": "dpo_beta"}),
}
_NPO = "Zhang et al. 2024 (arXiv 2404.05868), eq. 3"
METHODS = {
    "npo": Method(forget="npo", formula="w_f (2/beta) mean log(1 + (p/p_ref)^beta)", source=_NPO),
    "npo_ce": Method(
        forget="npo",
        retain=("cross_entropy",),
        formula="w_f NPO_f + w_r CE_r",
        source=f"{_NPO}; with cross-entropy on the retain set, as in open-unlearning",
    ),
    "npo_kl_ce": Method(
        forget="npo",
        retain=("kl_divergence", "cross_entropy"),
        formula="w_f NPO_f + w_kl KL_r + w_r CE_r",
        source="ZJUKLAB at SemEval-2025 Task 4 (arXiv 2503.21088)",
    ),
    "npo_target_kl_ce": Method(
        forget="npo",
        retain=("target_kl", "cross_entropy"),
        formula="w_f NPO_f + w_kl mean p_ref (log p_ref - log p)_r + w_r CE_r, on the target tokens alone",
        source="Atyaephyra at SemEval-2025 Task 4 (arXiv 2503.13690)",
    ),
    "npo_renyi_ce": Method(
        forget="npo",
        retain=("renyi_divergence", "cross_entropy"),
        formula="w_f NPO_f + w_kl Renyi_r + w_r CE_r",
        source="Clausen 2025 (University of Oslo, IN5550), NPO with a Renyi divergence",
    ),
    "simnpo": Method(
        forget="simnpo",
        retain=("cross_entropy",),
        formula="w_f (2/beta) mean log(1 + exp(-beta (NLL_f - delta))) + w_r CE_r",
        source="Fan et al. 2024 (arXiv 2410.07163)",
    ),
    "idk_dpo": Method(
        forget="dpo",
        retain=("cross_entropy",),
        alternative="refusal",
        formula="w_f DPO(refusal over answer)_f + w_r CE_r",
        source="TOFU (arXiv 2401.06121), preference optimisation; each row keeps the refusal that the seed drew for it",
    ),
    "alt_po": Method(
        forget="dpo",
        retain=("cross_entropy",),
        alternative="given",
        formula="w_f DPO(alternative over answer)_f + w_r CE_r",
        source="Mekala et al. 2024 (arXiv 2409.13474), AltPO; alternatives come with the data, column `alternate`",
    ),
}
