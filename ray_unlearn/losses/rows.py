"""From tokens to rows: the sums and means that losses are made of. B rows, T predicted tokens, N of them masked."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """(values [B,T], mask [B,T]) -> [B]: sum over each row's masked tokens; 0 for none."""
    return torch.where(mask, values, 0.0).sum(1)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(values [B,T], mask [B,T]) -> [B]: mean over each row's masked tokens; 0 for none."""
    return row_sum(values, mask) / mask.sum(1).clamp(min=1)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(values [B,T], mask [B,T]) -> []: mean over all masked tokens of the batch, pooled; 0 for none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def mean(values: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(values [B,T], mask [B,T]) -> []: mean over rows of each row's mean; with `pool`, over all masked tokens alike.

    Rows that count once whatever their length (AILS-NTUA's normalisation) may be split between workers without
    changing the sum. Pooled, as by transformers' own loss and in most published code, long rows weigh more.
    """
    return token_mean(values, mask) if pool else row_mean(values, mask).mean()


def scatter_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(values [N], mask [B,T]) -> [B,T]: values of the masked tokens, in row-major order, back in their places."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
