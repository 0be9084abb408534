"""Which entries of a weight delta stay. Pure functions of one tensor; a random one takes its own generator.

Each returns a new tensor of the delta's shape. At a density of 1 the delta comes back as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
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


BIN_BITS = 16
"""Lower bits of a float32 pattern that a bin leaves out: 128 bins to an octave, each under 1 % wide."""
BINS = 2048
"""Bins that are kept, 16 octaves under the largest magnitude; what is smaller shares one."""


CHUNK = 2**17
"""Entries looked at in one go on a CPU: what they need then stays in the cache, and in memory that is already there."""


@dataclass(frozen=True)
class Cut:
    """What a density means for one tensor: entries under the threshold go, and those that equal it after `last`."""

    threshold: float
    last: int | None = None
    """Flat index: of equal magnitudes the first stay. None where all that equal the threshold do."""


@dataclass(frozen=True)
class Magnitudes:
    """A histogram of a tensor's magnitudes: `above[i]` entries lie in bin `first + i` or in a higher one."""

    first: int
    above: Tensor


def _patterns(delta: Tensor) -> Iterator[Tensor]:
    """The float32 patterns of the magnitudes, which sort as they do, a chunk at a time."""
    for chunk in delta.detach().flatten().split(CHUNK if delta.device.type == "cpu" else max(1, delta.numel())):
        yield chunk.abs().view(torch.int32)


def count_magnitudes(delta: Tensor) -> Magnitudes:
    """The histogram of a float32 tensor: three passes, and cuts at any density then cost a few more."""
    counts = torch.zeros(2 ** (31 - BIN_BITS), dtype=torch.int64, device=delta.device)
    for pattern in _patterns(delta):
        some = torch.bincount(pattern >> BIN_BITS)
        counts[: len(some)] += some
    size = 1 + int(counts.nonzero()[-1])
    first = max(0, size - BINS)
    return Magnitudes(first, counts[:size].flip(0).cumsum(0).flip(0)[first:])


def find_cut(delta: Tensor, keep: int, known: Magnitudes) -> Cut:
    """The cut that keeps the `keep` largest magnitudes, between 1 and the tensor's size.

    By selection: the histogram names the bin that holds the threshold, and only that bin's entries are sorted.
    """
    place = int((known.above >= keep).sum()) - 1  # counts fall from bin to bin
    number, inside = known.first + place, []
    for pattern in _patterns(delta):
        bins = pattern >> BIN_BITS
        inside.append(pattern[bins == number if place >= 0 else bins < known.first])
    more = int(known.above[place + 1]) if place + 1 < len(known.above) else 0
    ordered = torch.cat(inside).sort().values
    at = len(ordered) - (keep - more)
    threshold = ordered[at]
    value = float(threshold.view(torch.float32))
    if value == 0 or at == 0 or ordered[at - 1] != threshold:
        return Cut(value)
    room = int(torch.searchsorted(ordered, threshold, right=True)) - at
    return Cut(value, _nth(delta, threshold, room))


def _nth(delta: Tensor, threshold: Tensor, count: int) -> int:
    """Flat index of the `count`-th entry of that magnitude."""
    start = 0
    for pattern in _patterns(delta):
        equal = (pattern == threshold).nonzero()
        if len(equal) >= count:
            return start + int(equal[count - 1])
        start, count = start + len(pattern), count - len(equal)
    raise AssertionError("the histogram belongs to another tensor")


def apply_cut(delta: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
    """The delta with what the cut removes set to zero; `out` may be the delta itself."""
    below = torch.nextafter(torch.tensor(cut.threshold), torch.tensor(-1.0)).item()
    kept: Tensor = torch.hardshrink(delta, below, out=out)  # zeros what is at most `below`
    if cut.last is not None:
        rest = kept.view(-1)[cut.last + 1 :]
        torch.hardshrink(rest, cut.threshold, out=rest)
    return kept


def trim(delta: Tensor, density: float) -> Tensor:
    """Keeps the `int(density * n)` entries of largest magnitude within the tensor, at least one; zeros the rest.

    Of equal magnitudes at the threshold the first by index stay. mergekit and TIES leave these to a
    sort that is not stable, so which of them stay depends on the processor there.
    """
    keep = keep_count(delta.numel(), density)
    return delta if keep >= delta.numel() else apply_cut(delta, find_cut(delta, keep, count_magnitudes(delta)))


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
    known = count_magnitudes(delta)
    both, largest = (find_cut(delta, count, known) for count in (keep + outliers, outliers))
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
