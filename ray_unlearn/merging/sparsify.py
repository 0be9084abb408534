"""Which entries of a weight delta stay. Pure functions of one tensor; a random one takes its own generator.

Each returns a new tensor of the delta's shape. At a density of 1 the delta comes back as it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SUM = 1e-7
"""Sum of magnitudes under which nothing is rescaled (mergekit's `eps`)."""


def keep_count(count: int, density: float) -> int:
    """`int(density * count)`, but at least one entry, with a warning where that is why one stays."""
    kept = int(density * count)
    if kept == 0 and count > 0:
        warnings.warn(
            f"a density of {density:g} keeps nothing of a tensor of {count} entries; the largest one is kept.",
            stacklevel=2,
        )
    return max(1, kept)


# -- by magnitude ----------------------------------------------------------------------------------


BINS = 2048
"""Of a histogram of magnitudes: 16 octaves under the largest one, 128 bins each."""


@dataclass(frozen=True)
class Histogram:
    """How many magnitudes a tensor has by the upper 15 bits of their float32 pattern, which sorts as they do.

    The first bin holds all that are smaller than 2^-16 of the largest, too.
    """

    lowest: int
    counts: Tensor
    """[BINS] int32."""

    @classmethod
    def of(cls, delta: Tensor, out: Tensor | None = None) -> Histogram:
        """The histogram of a float32 tensor, of at least one entry; its counts in `out` where given."""
        bins = _pattern(delta) >> 16
        lowest = max(0, int(bins.max()) - BINS + 1)
        found = torch.bincount(bins.sub_(lowest).clamp_(min=0), minlength=BINS)
        counts = torch.empty(BINS, dtype=torch.int32) if out is None else out
        return cls(lowest, counts.copy_(found))


@dataclass(frozen=True)
class Cut:
    """What a density means for one tensor: entries under the threshold go, and `dropped` of those that equal it."""

    threshold: float
    dropped: Tensor | None = None
    """Flat indices. Of equal magnitudes the first stay."""


def _pattern(delta: Tensor) -> Tensor:
    return delta.detach().abs().flatten().view(torch.int32)


def find_cut(delta: Tensor, keep: int, histogram: Histogram | None = None) -> Cut:
    """The cut that keeps the `keep` largest magnitudes of a float32 tensor; its histogram may be given.

    Selection, no sort: the histogram names the bin that holds the threshold, and only that bin is searched.
    """
    histogram = histogram or Histogram.of(delta)
    above = histogram.counts.flip(0).cumsum(0)  # entries in this bin and those over it
    place = int((above < keep).sum())
    over = int(above[place - 1]) if place else 0
    pattern = _pattern(delta)
    bins = pattern >> 16
    number = BINS - 1 - place
    inside = pattern[bins <= histogram.lowest if number == 0 else bins == number + histogram.lowest]
    wanted = keep - over
    threshold = inside.kthvalue(len(inside) - wanted + 1).values
    room = wanted - int((inside > threshold).sum())
    dropped = None
    if int((inside == threshold).sum()) > room:
        dropped = (pattern == threshold).nonzero().flatten()[room:]
    return Cut(float(threshold.view(torch.float32)), dropped)


def apply_cut(delta: Tensor, cut: Cut) -> Tensor:
    """The delta with what the cut removes set to zero."""
    below = torch.nextafter(torch.tensor(cut.threshold), torch.tensor(-1.0)).item()
    kept = F.hardshrink(delta, below)  # zeros what is at most `below`
    if cut.dropped is not None:
        kept.view(-1)[cut.dropped.to(kept.device)] = 0.0
    return kept


def trim(delta: Tensor, density: float) -> Tensor:
    """Keeps the `int(density * n)` entries of largest magnitude within the tensor, at least one; zeros the rest.

    Of equal magnitudes at the threshold the first by index stay. mergekit and TIES leave these to a
    sort that is not stable, so which of them stay depends on the processor there.
    """
    keep = keep_count(delta.numel(), density)
    return delta if keep >= delta.numel() else apply_cut(delta, find_cut(delta, keep))


def breadcrumbs(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Drops the `int(gamma * n)` largest entries, then the smallest until `int(density * n)` stay, at least one.

    Where density and gamma together leave too little, fewer of the largest are dropped; with a gamma
    that drops none this is `trim`. Davari and Belilovsky 2023 (arXiv 2312.06795), as in mergekit.
    """
    count = delta.numel()
    keep = keep_count(count, density)
    if keep >= count:
        return delta
    outliers = min(int(gamma * count), count - keep)
    kept = apply_cut(delta, find_cut(delta, keep + outliers)) if keep + outliers < count else delta
    return kept - apply_cut(delta, find_cut(delta, outliers)) if outliers else kept


# -- at random -------------------------------------------------------------------------------------


def drop_and_rescale(delta: Tensor, density: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """DARE: keeps each entry with probability `density`; at least the largest stays.

    Yu et al. 2023 (arXiv 2311.03099). `rescale` restores the sum of magnitudes, as in mergekit, where
    the paper divides by the density: the same in expectation.
    """
    if density >= 1:
        return delta
    return masked(delta, torch.bernoulli(torch.full_like(delta, density), generator=generator), rescale)


def magprune(delta: Tensor, density: float, epsilon: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """DELLA's MagPrune: keeps an entry with a probability that rises with its magnitude's rank within its row,
    linearly from density - epsilon to density + epsilon; at least the largest entry stays.

    Deep et al. 2024 (arXiv 2406.11617), as in mergekit. Raises ValueError where a probability leaves
    (0, 1). A vector is one row; a row of one entry has the mean probability.
    """
    if density >= 1:
        return delta
    return masked(delta, torch.bernoulli(magprune_probabilities(delta, density, epsilon), generator=generator), rescale)


def magprune_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """MagPrune's chance of each entry to stay. Ranks need a sort of every row; equal magnitudes rank by index."""
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(f"density {density:g} and epsilon {epsilon:g} give probabilities outside (0, 1).")
    rows = delta.abs().reshape(1 if delta.dim() < 2 else delta.shape[0], -1 if delta.numel() else 0)
    width = rows.shape[1]
    if width < 2:
        return torch.full_like(delta, density)
    order = rows.argsort(dim=1, stable=True)
    ranks = torch.empty_like(rows).scatter_(1, order, torch.arange(width, dtype=rows.dtype).expand_as(rows))
    return (density - epsilon + ranks / (width - 1) * (2 * epsilon)).view_as(delta)


def masked(delta: Tensor, mask: Tensor, rescale: bool) -> Tensor:
    """delta * mask, with at least the largest entry kept; `rescale` restores the sum of magnitudes."""
    if not mask.any():
        warnings.warn("a random mask kept nothing of a tensor; its largest entry is kept.", stacklevel=2)
        mask = mask.clone()
        mask.view(-1)[delta.abs().argmax()] = 1
    kept = delta * mask
    return rescaled(kept, delta) if rescale else kept


def rescaled(kept: Tensor, delta: Tensor) -> Tensor:
    """`kept`, scaled to the delta's sum of magnitudes; sums under 1e-7 are left alone (mergekit's L1 `rescale`)."""
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if before < SMALLEST_SUM or after < SMALLEST_SUM else kept * (before / after)
