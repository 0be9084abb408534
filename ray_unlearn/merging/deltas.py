"""Merge methods on weight deltas W - W_base of one tensor. Pure functions; weights and densities one per member."""

from __future__ import annotations

import torch
from torch import Tensor


def trim(delta: Tensor, density: float) -> Tensor:
    """Keeps the `int(density * n)` entries of largest magnitude within the tensor, at least one; zeros the rest.

    The threshold is found by selection. Where more entries equal it than there is room for, torch's
    full sort says which stay: mergekit asks it too, and rounding makes such ties common enough
    (about one in a million entries) that the two would else differ.
    """
    count = delta.numel()
    keep = max(1, int(density * count))
    if keep >= count:
        return delta
    size = delta.abs().flatten()
    mask = size >= size.kthvalue(count - keep + 1).values
    if int(mask.sum()) > keep:
        mask = torch.zeros_like(mask)
        mask[size.argsort(descending=True)[:keep]] = True
    return torch.where(mask.view_as(delta), delta, 0.0)


def ties(deltas: list[Tensor], weights: list[float], densities: list[float], lambda_: float = 1.0) -> Tensor:
    """TIES: trim each delta, elect a sign per entry by the weighted sum, average the entries that agree.

    An elected sum of exactly zero counts as positive; a trimmed entry never takes part; where nobody
    agrees the result is zero. Yadav et al. 2023 (arXiv 2306.01708), weighted as in mergekit: because
    the mean divides by the weights that took part, only their ratios matter; lambda sets the length.
    """
    weighted = [weight * trim(d, density) for d, weight, density in zip(deltas, weights, densities, strict=True)]
    sign = torch.where(torch.stack(weighted).sum(0) >= 0, 1.0, -1.0)
    total = torch.zeros_like(deltas[0])
    share = torch.zeros_like(deltas[0])
    for term, weight in zip(weighted, weights, strict=True):
        agrees = term.sign() == sign
        total += torch.where(agrees, term, 0.0)
        share += agrees * weight
    share = torch.where(share == 0, 1.0, share)
    return lambda_ * (total / share)


def linear(deltas: list[Tensor], weights: list[float], densities: list[float], lambda_: float = 1.0) -> Tensor:
    """Weighted mean of the deltas, times lambda; densities are not used."""
    return task_arithmetic(deltas, weights, densities, lambda_) / sum(weights)


def task_arithmetic(deltas: list[Tensor], weights: list[float], densities: list[float], lambda_: float = 1.0) -> Tensor:
    """Weighted sum of the deltas, times lambda; densities are not used. Ilharco et al. 2023 (arXiv 2212.04089)."""
    return lambda_ * sum((weight * d for d, weight in zip(deltas, weights, strict=True)), torch.zeros_like(deltas[0]))
