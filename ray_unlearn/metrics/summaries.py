"""How a metric's values become numbers with intervals, documents being what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ray_unlearn.metrics.bootstrap import ratio_interval

Part = dict[str, float | list[float] | str]
"""One number of a metric: its `value`, its `interval` where there is one, and what else there is to say of it."""


@dataclass(frozen=True)
class Sample:
    """A metric's signals of all rows of a split, of all members, or of all others."""

    signals: Sequence[tuple[Any, ...]]
    """What `compute` is called with for each of them."""
    documents: Sequence[Hashable]
    """The document of each; those of one document are drawn together in resamples."""


class Summary(Protocol):
    """How a metric's values become its parts."""

    def __call__(self, compute: Callable[..., Any], samples: Mapping[str, Sample], /) -> dict[str, Part]:
        """(compute, group -> sample) -> part (forget, retain, auc, ...) -> value and interval."""


def mean_over_rows(compute: Callable[..., float], samples: Mapping[str, Sample]) -> dict[str, Part]:
    """Of each group, the mean of `compute` over its rows."""
    parts: dict[str, Part] = {}
    for group, sample in samples.items():
        values = [compute(*signals) for signals in sample.signals]
        interval = ratio_interval(values, [1.0] * len(values), sample.documents)
        parts[group] = {"value": float(np.mean(values)), "interval": interval}
    return parts


def pooled_tokens(compute: Callable[..., float], samples: Mapping[str, Sample]) -> dict[str, Part]:
    """Of each group, `compute` of all its rows' tokens together. It must be a monotone function of their mean."""
    parts: dict[str, Part] = {}
    for group, sample in samples.items():
        rows = [np.asarray(tokens, dtype=np.float64) for (tokens,) in sample.signals]
        totals, sizes = [float(row.sum()) for row in rows], [float(len(row)) for row in rows]
        ends = [compute([end]) for end in ratio_interval(totals, sizes, sample.documents)]
        parts[group] = {"value": compute(np.concatenate(rows)), "interval": sorted(ends)}
    return parts


def one_value(compute: Callable[..., float], samples: Mapping[str, Sample]) -> dict[str, Part]:
    """`compute` of each signal of all rows together."""
    (sample,) = samples.values()
    return {"value": {"value": compute(*zip(*sample.signals, strict=True))}}
