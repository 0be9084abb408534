"""Metrics against a reference model that was trained without the forget set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

from ray_unlearn.errors import InputError
from ray_unlearn.metrics.bootstrap import limits
from ray_unlearn.metrics.membership import auc, document_signals, membership_resamples, min_k
from ray_unlearn.metrics.summaries import Part, Sample, one_value
from ray_unlearn.metrics.table import DOCUMENTS, WHOLE, Metric


def privleak(area: float, reference: float) -> float:
    """100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), in percent (MUSE, Shi et al. 2024, by min-k).

    Areas as `auc` gives them, members high. 0 is a retrained model's; below, members still stand out; above, they
    have been pushed beyond unseen text. Raises InputError where the reference itself tells all members.
    """
    if reference >= 1:
        raise InputError(
            f"PrivLeak divides by 1 - AUC of the reference, whose AUC is {reference}: it knows the members. "
            f"Give a reference that was trained without them."
        )
    return 100 * ((reference - area) / (1 - reference))


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the forget rows' truth ratios of the model and of
    the reference (TOFU, Maini et al. 2024); R and log R give the same. Raises InputError for an empty side."""
    from scipy.stats import ks_2samp

    if not len(ratios) or not len(reference):
        raise InputError(f"forget quality needs truth ratios of both models, got {len(ratios)} and {len(reference)}.")
    return float(ks_2samp(ratios, reference).pvalue)


def score_differences(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """score - reference of every measure that both have, in the order of `scores`: 0 is what retraining gives."""
    return {name: value - reference[name] for name, value in scores.items() if name in reference}


def _leak(compute: Callable[[float, float], float], samples: Mapping[str, Sample]) -> dict[str, Part]:
    """`compute` of both models' AUCs of min-k, with the same documents drawn for both, so that what is hard about a
    document cancels."""
    mine = document_signals(lambda own, _: min_k(own), samples)
    theirs = document_signals(lambda _, reference: min_k(reference), samples)
    value = compute(auc(*mine), auc(*theirs))
    areas, bases = membership_resamples(*mine)[0], membership_resamples(*theirs)[0]
    sound = bases < 1  # a resample whose reference tells all members has no PrivLeak
    leaks = [compute(area, base) for area, base in zip(areas[sound], bases[sound], strict=True)]
    return {"value": {"value": value, "interval": limits(leaks or [value], value)}}


def _each_difference(
    compute: Callable[[Mapping[str, float], Mapping[str, float]], dict[str, float]], samples: Mapping[str, Sample]
) -> dict[str, Part]:
    """Every number that both models have, and the difference."""
    ((mine, theirs),) = samples["model"].signals
    return {
        name: {"value": mine[name], "reference": theirs[name], "difference": difference}
        for name, difference in compute(mine, theirs).items()
    }


METRICS = {
    "privleak": Metric(
        compute=privleak,
        signals=("document_log_probs", "reference_document_log_probs"),
        groups=DOCUMENTS,
        summary=_leak,
        formula="100 (AUC_ref - AUC) / (1 - AUC_ref) of min-k, in percent",
        range=(-100, inf),
        best={"value": 0.0},
        collapsed="near 0 by ignorance, or far above 0 where the forget text was driven out",
        source="MUSE, Shi et al. 2024",
    ),
    "forget_quality": Metric(
        compute=forget_quality,
        signals=("log_truth_ratio", "reference_log_truth_ratio"),
        groups=("forget",),
        summary=one_value,
        formula="p-value of the two-sample KS test of the forget rows' truth ratios R (see truth_ratio), model against "
        "reference",
        range=(0, 1),
        best={"value": 1.0},
        collapsed="near 0: its ratios all lie at 1",
        source="TOFU, Maini et al. 2024, sec. 2.2",
    ),
    "score_differences": Metric(
        compute=score_differences,
        signals=("scores", "reference_scores"),
        groups=WHOLE,
        summary=_each_difference,
        formula="every term and objective, less the reference's",
        range=(-1, 1),
        best={"difference": 0.0},
        collapsed="task_aggregate near -1; its forget terms stay near 0 or above, its retain terms fall far below",
        source="this project; retraining as the standard: Maini et al. 2024",
    ),
}
