"""Cross-entropy and its negation. B rows, T predicted positions."""

from __future__ import annotations

import torch
from torch import Tensor


def row_nll(logps: Tensor, mask: Tensor) -> Tensor:
    """(logps [B,T], mask [B,T]) -> [B]: mean negative log-likelihood of each row's masked tokens; 0 for none."""
    counts = mask.sum(1)
    return -torch.where(mask, logps, 0.0).sum(1) / counts.clamp(min=1)


def cross_entropy(logps: Tensor, mask: Tensor) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: mean over rows of each row's mean token cross-entropy, in nats.

    Each row counts once whatever its length (AILS-NTUA's normalisation), so a batch may be split
    between workers without changing the sum; transformers' own loss pools the tokens instead.
    """
    return row_nll(logps, mask).mean()


def gradient_ascent(logps: Tensor, mask: Tensor, bound: float | None = None) -> Tensor:
    """(logps [B,T], mask [B,T]) -> []: minus the cross-entropy; rows at or above `bound` nats per token stop pushing.

    Minimising -min(CE, bound) has no gradient on a row already as surprising as `bound`, which keeps
    ascent from running away. Unbounded: TOFU (arXiv 2401.06121), gradient ascent.
    """
    nll = row_nll(logps, mask)
    return -(nll if bound is None else torch.where(nll < bound, nll, bound)).mean()
