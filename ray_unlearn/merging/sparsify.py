"""Which entries of a weight delta stay. Pure functions of one tensor; a random one takes its own generator.

Each returns a new tensor of the delta's shape. At a density of 1 the delta comes back as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
"""Of a histogram of magnitudes: 16 octaves under the largest one, 128 bins each, under 1 % wide."""


@dataclass(frozen=True)
class Cut:
    """What a density means for one tensor: entries under the threshold go, and `dropped` of those that equal it."""

    threshold: float
    dropped: Tensor | None = None
    """Flat indices. Of equal magnitudes the first stay."""


def _pattern(delta: Tensor) -> Tensor:
    return delta.detach().abs().flatten().view(torch.int32)


def find_cuts(delta: Tensor, keeps: Sequence[int]) -> list[Cut]:
    """The cuts that keep the so many largest magnitudes of a float32 tensor, each between 1 and its size.

    Selection: a histogram names the bins that hold the thresholds, and only those bins' entries are
    sorted. Bins are the upper 15 bits of the float32 pattern, which sorts as the magnitudes do; the
    first bin holds all that are under 2^-16 of the largest.
    """
    pattern = _pattern(delta)
    bins = pattern >> 16
    top = int(bins.max())
    if top == 0:
        return [Cut(0.0)] * len(keeps)
    bins.sub_(max(0, top - BINS + 1)).clamp_(min=0)
    counts = torch.bincount(bins, minlength=BINS)
    above = counts.flip(0).cumsum(0)  # entries in a bin and in those over it, from the highest bin down
    places = torch.searchsorted(above, torch.tensor(keeps, device=above.device))
    numbers = BINS - 1 - places
    wanted = torch.zeros(BINS, dtype=torch.uint8, device=bins.device)
    wanted[numbers] = 1
    inside = pattern[wanted.index_select(0, bins).bool()].sort().values
    ends = (counts * wanted).cumsum(0)[numbers].tolist()  # where each bin's entries end among them
    over = (above - counts.flip(0))[places].tolist()
    return [_cut_at(pattern, inside, end, keep - more) for keep, end, more in zip(keeps, ends, over, strict=True)]


def _cut_at(pattern: Tensor, inside: Tensor, end: int, keep: int) -> Cut:
    """The cut that keeps `keep` of the sorted entries `inside` before `end`, and whatever is in higher bins."""
    threshold = inside[end - keep]
    value = float(threshold.view(torch.float32))
    if value == 0 or end == keep or inside[end - keep - 1] != threshold:
        return Cut(value)
    room = keep - (end - int(torch.searchsorted(inside, threshold, right=True)))
    return Cut(value, (pattern == threshold).nonzero().flatten()[room:])


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
    return delta if keep >= delta.numel() else apply_cut(delta, find_cuts(delta, [keep])[0])


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
    if not outliers:
        return trim(delta, density)
    both, largest = find_cuts(delta, [keep + outliers, outliers])
    return apply_cut(delta, both) - apply_cut(delta, largest)


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
