"""How members' deltas become one: sums, elections, means on the sphere. Pure functions of one tensor's deltas.

`deltas` and `weights` come in the order of the members; every function returns a new tensor of
the deltas' shape, to be added to the base. Those on the sphere need the base, since what they turn
are whole weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**16
"""Entries that an election takes at a time on a CPU: its dozen passes then stay in the cache."""

NEARLY_PARALLEL = 0.9995
"""Cosine above which SLERP interpolates in a straight line (mergekit's `dot_threshold`)."""


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float], lambda_: float, normalize: bool) -> Tensor:
    """lambda * sum_i w_i d_i, divided by sum_i w_i where normalised (which the caller makes sure is not 0).

    Task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); normalised: weight averaging, Wortsman et
    al. 2022 (arXiv 2203.05482), on deltas.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta
    total *= lambda_
    return total / sum(weights) if normalize else total


def elect(deltas: Sequence[Tensor], weights: Sequence[float], lambda_: float, normalize: bool) -> Tensor:
    """TIES: the sign of sum_i w_i d_i is elected entry by entry, then the terms w_i d_i that have it are summed.

    Normalised, the sum is divided by the sum of |w_i| that took part: only ratios of weights matter,
    and lambda sets the length. A vote of exactly zero is positive; zeros (trimmed entries) never take
    part; where nobody agrees the result is zero. Yadav et al. 2023 (arXiv 2306.01708), weighted as in
    mergekit, except that mergekit divides by w_i, so that a negative weight there undoes itself.
    """
    size = CHUNK if deltas[0].device.type == "cpu" else max(1, deltas[0].numel())
    chunks = zip(*(delta.flatten().split(size) for delta in deltas), strict=True)
    return torch.cat([_elect(chunk, weights, lambda_, normalize) for chunk in chunks]).view_as(deltas[0])


def _elect(deltas: Sequence[Tensor], weights: Sequence[float], lambda_: float, normalize: bool) -> Tensor:
    terms = [weight * delta for delta, weight in zip(deltas, weights, strict=True)]
    vote = terms[0] + terms[1] if len(terms) > 1 else terms[0].clone()
    for term in terms[2:]:
        vote += term
    sign = vote.sign_().add_(0.5).sign_()  # zero becomes one
    for term in terms:
        term.mul_(sign).clamp_(min=0)  # what agrees, without its sign
    total = terms[0].clone() if normalize else terms[0]
    for term in terms[1:]:
        total += term
    if normalize:
        share = terms[0].sign_().mul_(abs(weights[0]))
        for term, weight in zip(terms[1:], weights[1:], strict=True):
            share.add_(term.sign_(), alpha=abs(weight))
        total /= share.clamp_(min=torch.finfo(share.dtype).tiny)
    return total.mul_(sign).mul_(lambda_)


# -- on whole weights ------------------------------------------------------------------------------


def slerp(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Spherical interpolation between two members' whole weights, at t = w_2 / (w_1 + w_2); as a delta.

    Shoemake 1985, as in mergekit: lengths are interpolated with the directions, and (anti)parallel
    tensors in a straight line. Two members in either order give the same.
    """
    first, second = ((base + delta) for delta in deltas)
    t = weights[1] / (weights[0] + weights[1])
    cosine = _dot(first, second) / ((_norm(first) or 1.0) * (_norm(second) or 1.0))
    if abs(cosine) > NEARLY_PARALLEL:
        a, b = 1 - t, t
    else:
        angle = math.acos(cosine)
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return first.mul_(a).add_(second, alpha=b).sub_(base)


def karcher(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """Karcher mean of the members' directions times the weighted mean of their lengths, on whole weights; as a delta.

    Karcher 1977, as in mergekit, which knows equal weights only. Members shorter than `tol` have no
    direction and count for the length alone.
    """
    whole = [base + delta for delta in deltas]
    shares = [weight / sum(weights) for weight in weights]
    norms = [_norm(tensor) for tensor in whole]
    length = sum(share * norm for share, norm in zip(shares, norms, strict=True))
    pointing = [(tensor / norm, share) for tensor, norm, share in zip(whole, norms, shares, strict=True) if norm > tol]
    if not pointing:
        return -base
    total = sum(share for _, share in pointing)
    mean = torch.zeros_like(base)
    for unit, share in pointing:
        mean += unit * (share / total)
    start = _norm(mean)
    mean = pointing[0][0].clone() if start < tol else mean / start
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit, share in pointing:
            cosine = max(-1.0, min(1.0, _dot(mean, unit)))
            angle = math.acos(cosine)
            if tol <= angle < math.pi:
                tangent += (unit - cosine * mean) * (share / total * angle / math.sin(angle))
        step = _norm(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + (math.sin(step) / step) * tangent
        mean /= _norm(mean)
    return mean.mul_(length).sub_(base)


def model_stock(deltas: Sequence[Tensor]) -> Tensor:
    """t * mean(d) with t = N c / (1 + (N - 1) c) and c the mean cosine between the deltas; without weights.

    Jang et al. 2024 (arXiv 2403.19522), over whole tensors as in mergekit. Where the denominator is 0
    the base stays.
    """
    count = len(deltas)
    norms = [_norm(delta) for delta in deltas]
    cosines = [
        max(-1.0, min(1.0, _dot(deltas[i], deltas[j]) / max(norms[i] * norms[j], 1e-6)))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    c = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * c
    t = 0.0 if abs(denominator) < 1e-6 else count * c / denominator
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total += delta
    return total * (t / count)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
