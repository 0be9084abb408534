"""LoRA's factors: TIES on A and B as PEFT does it, and merges of deltas written as factors again. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging.sparsify import trim

SHARED_START = 0.5
"""Cosine of two adapters' A under which their signs have nothing to do with each other."""


@dataclass(frozen=True)
class Factors:
    """LoRA's delta of one tensor, scaling * B A: B [out, r], A [r, in], both float32."""

    b: Tensor
    a: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """The delta as one matrix [out, in]."""
        return (self.b @ self.a).mul_(self.scaling)


def ties_factors(
    factors: Sequence[Factors], weights: Sequence[float], densities: Sequence[float], lambda_: float = 1.0
) -> Factors:
    """TIES on A and on B apart, each side with the square root of |weight * scaling|, as PEFT's `ties` does.

    With one exception: of rsLoRA adapters PEFT 0.21 makes an rsLoRA adapter, whose scaling then is sqrt(r),
    where members' scalings are in the factors already; here it is 1. Signs are elected without weights and the
    mean divides by the number that agree, not by their weights. The product has cross terms B_t A_u that belong
    to no member, and changes when a member's factors are turned without changing its delta: it means something
    only for adapters that share A's initialisation. Exists to reproduce ZJUKLAB (Xu et al. 2025, arXiv
    2503.21088); peft
    `add_weighted_adapter(combination_type="ties")`. Raises InputError for unlike ranks.
    """
    ranks = [len(factor.a) for factor in factors]
    if len(set(ranks)) > 1:
        raise InputError(f"ties_factors needs adapters of one rank, got ranks {ranks}; merge deltas (ties) instead.")
    strengths = [weight * factor.scaling for factor, weight in zip(factors, weights, strict=True)]
    b = _ties_side([factor.b for factor in factors], [math.sqrt(abs(s)) for s in strengths], densities)
    a = _ties_side(
        [factor.a for factor in factors], [math.copysign(math.sqrt(abs(s)), s) for s in strengths], densities
    )
    return Factors(b, a, lambda_)


def _ties_side(sides: Sequence[Tensor], strengths: Sequence[float], densities: Sequence[float]) -> Tensor:
    kept = [trim(side, density) for side, density in zip(sides, densities, strict=True)]
    vote = torch.stack(kept).sum(0)
    positive = vote >= 0
    total, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for side, strength in zip(kept, strengths, strict=True):
        agrees = torch.where(positive, side > 0, side < 0)
        total += torch.where(agrees, strength * side, 0.0)
        count += agrees
    return total / count.clamp_(min=1)


def shared_start(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean cosine between two adapters' A matrices, pair by pair: near 1 after one initialisation, near 0 after two.

    Pairs of unlike shape count as 0.
    """
    cosines = [
        float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) if a.shape == b.shape else 0.0
        for a, b in zip(first, second, strict=True)
    ]
    return sum(cosines) / len(cosines) if cosines else 1.0


# -- deltas as factors -----------------------------------------------------------------------------


def concatenated(factors: Sequence[Factors], weights: Sequence[float], lambda_: float, normalize: bool) -> Factors:
    """The weighted sum of LoRA deltas as one LoRA of the summed rank: exact."""
    scale = lambda_ / (sum(weights) if normalize else 1.0)
    b = torch.cat([factor.b * (weight * factor.scaling) for factor, weight in zip(factors, weights, strict=True)], 1)
    return Factors(b, torch.cat([factor.a for factor in factors]), scale)


def truncated(delta: Tensor, rank: int) -> tuple[Factors, float]:
    """The best LoRA of that rank for a matrix, by its largest singular values, and the squared Frobenius error.

    The singular values are shared evenly between B and A.
    """
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    left = float(s[rank:].double().square().sum())
    return Factors((u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous(), 1.0), left
