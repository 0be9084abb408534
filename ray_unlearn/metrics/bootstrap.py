"""Bootstrap intervals: documents are drawn with replacement, all resamples at once (Efron & Tibshirani 1993)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_unlearn.errors import InputError

RESAMPLES = 1000
LEVEL = 0.95

Floats = NDArray[np.float64]


def resample(units: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples, units]: how often each unit is drawn when as many as there are are drawn with replacement."""
    drawn = rng.integers(0, units, size=(resamples, units)) + units * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(np.float64)


def limits(values: ArrayLike, estimate: float, level: float = LEVEL) -> list[float]:
    """The bias-corrected percentile interval of resampled values (Efron 1981), widened to hold the estimate.

    Resamples of a harmonic mean of small terms lie well below its estimate; plain percentiles then miss the truth
    far more often than they should. The correction moves both quantiles by twice the estimate's own distance from
    the resamples' median, in normal units; ties count half.
    """
    drawn, normal = np.asarray(values, dtype=np.float64), NormalDist()
    least, rounding = 1 / len(drawn), 1e-12 * max(1.0, abs(estimate))
    share = float(np.mean(drawn < estimate - rounding) + np.mean(drawn <= estimate + rounding)) / 2
    shift = 2 * normal.inv_cdf(min(max(share, least), 1 - least))
    reach = normal.inv_cdf((1 + level) / 2)
    low, high = np.quantile(drawn, [normal.cdf(shift - reach), normal.cdf(shift + reach)])
    return [min(float(low), estimate), max(float(high), estimate)]


def ratio_interval(
    totals: Sequence[float],
    sizes: Sequence[float],
    documents: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[float]:
    """Interval of sum(totals) / sum(sizes) over rows, with documents as the units drawn.

    Sizes of 1 make it a mean; token losses over token counts a mean token loss. Raises InputError for no rows.
    """
    if not len(totals):
        raise InputError("an interval needs at least one row, got none.")
    index = {document: place for place, document in enumerate(dict.fromkeys(documents))}
    places = [index[document] for document in documents]
    sums = np.stack([np.bincount(places, weights=np.asarray(part, float)) for part in (totals, sizes)], axis=1)
    drawn = resample(len(index), resamples, np.random.default_rng(seed)) @ sums
    return limits(drawn[:, 0] / drawn[:, 1], math.fsum(totals) / math.fsum(sizes))
