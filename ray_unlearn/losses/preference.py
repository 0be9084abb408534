"""Preference-style losses against a reference model. B rows, T predicted positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def npo(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float = 0.1, ratio: str = "sum") -> Tensor:
    """(logps [B,T], ref_logps [B,T], mask [B,T]) -> []: negative preference optimisation.

    -(2/beta) mean_b log sigmoid(-beta log(p/p_ref)); log(p/p_ref) is the sum over a row's masked
    tokens (Zhang et al. 2024, arXiv 2404.05868, eq. 3), or their mean with ratio="mean".
    As beta goes to 0 its gradient becomes that of gradient ascent.
    """
    difference = torch.where(mask, logps - ref_logps, 0.0).sum(1)
    if ratio == "mean":
        difference = difference / mask.sum(1).clamp(min=1)
    return -(2 / beta) * F.logsigmoid(-beta * difference).mean()
