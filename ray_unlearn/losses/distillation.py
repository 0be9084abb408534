"""Losses between two distributions over the vocabulary. B rows, T positions, V vocabulary entries."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """(logits [B,T,V], ref_logits [B,T,V], mask [B,T]) -> []: KL(ref || model), mean over rows of each row's mean.

    Padding never counts (published code averages over it, which dilutes the term by the amount of
    padding). Direction as in TOFU's and ZJUKLAB's code: the reference's distribution weighs.
    """
    ref = ref_logits.log_softmax(-1)
    pointwise = (ref.exp() * (ref - logits.log_softmax(-1))).sum(-1)
    return (torch.where(mask, pointwise, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()
