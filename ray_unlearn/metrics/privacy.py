"""Metrics against a reference model that was trained without the forget set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_unlearn.errors import InputError


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
