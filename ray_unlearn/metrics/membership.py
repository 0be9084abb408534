"""Membership inference: do members of the forget set still stand out from unseen documents?

A signal is a number for each document that is low where the model seems to know it, as the loss is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from ray_unlearn.errors import InputError
from ray_unlearn.metrics.bootstrap import RESAMPLES, Floats, limits, resample
from ray_unlearn.metrics.summaries import Part, Sample
from ray_unlearn.metrics.table import DOCUMENTS, Metric

LEAST_SHARE = 0.4
"""Share of a document's tokens that min-k and min-k++ average, as in MUSE and open-unlearning."""
LEAST_DEVIATION = 1e-3
"""Of log p over the vocabulary, in min-k++: below it a next-token distribution has all its mass on one token, and any
division by it would decide the mean. open-unlearning's (a variance of 1e-6), so that its numbers compare."""


# -- how well a signal tells members ---------------------------------------------------------------


def auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """Area under the ROC curve with members positive and score = -signal.

    1 memorised, 0.5 unknowable, 0 over-unlearned. Raises InputError for an empty list or a signal that is not finite.
    """
    check_signals(members, nonmembers)
    labels = [1] * len(members) + [0] * len(nonmembers)
    return float(roc_auc_score(labels, [-signal for signal in (*members, *nonmembers)]))


def tpr_at_fpr(members: Sequence[float], nonmembers: Sequence[float], rate: float = 0.01) -> float:
    """Largest share of members below a threshold that at most `rate` of the non-members are at or below.

    Carlini et al. 2022, Membership Inference Attacks From First Principles. With fewer than 1 / rate non-members
    none of them may be accepted. Raises InputError as `auc` does.
    """
    check_signals(members, nonmembers)
    accepted = np.searchsorted(np.sort(nonmembers), members, "right") <= rate * len(nonmembers) + 1e-9
    return float(np.mean(accepted))


def mia_score(area: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 when members cannot be told, 0 when they can, in either direction."""
    return 1 - 2 * abs(area - 0.5)


def check_signals(members: Sequence[float], nonmembers: Sequence[float]) -> None:
    """Refuses an empty side, and a signal that is no finite number, saying where."""
    for name, signals in (("member", members), ("nonmember", nonmembers)):
        if not len(signals):
            raise InputError(f"MIA needs at least one {name} loss, got none.")
        for index, signal in enumerate(signals):
            if not _finite(signal):
                raise InputError(f"MIA losses must be finite numbers; {name}[{index}] is {signal!r:.60}.")


def _finite(signal: object) -> bool:
    try:
        return isinstance(signal, (int, float)) and not isinstance(signal, bool) and math.isfinite(signal)
    except OverflowError:  # a whole number beyond any float
        return False


def membership_resamples(
    members: Sequence[float],
    nonmembers: Sequence[float],
    *,
    false_positives: float = 0.01,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """[resamples] AUCs and TPRs at a rate of false positives, of signals that are low for members.

    Members and non-members are drawn separately. A member beats the non-members above it, and half of those level
    with it; both counts are differences of the cumulated draws of the sorted non-members. The same documents in the
    same order and the same seed give the same draws, whatever the signals, so two models' resamples are paired.
    Raises InputError as `auc` does.
    """
    check_signals(members, nonmembers)
    mine, others = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    order = np.argsort(others)
    rng = np.random.default_rng(seed)
    drawn = resample(len(mine), resamples, rng)
    below = np.zeros((resamples, len(others) + 1))
    np.cumsum(resample(len(others), resamples, rng)[:, order], axis=1, out=below[:, 1:])
    under, upto = (below[:, np.searchsorted(others[order], mine, side)] for side in ("left", "right"))
    areas = 1 - np.einsum("bm,bm->b", drawn, under + upto) / (2 * len(mine) * len(others))
    accepted = upto <= false_positives * len(others) + 1e-9
    return areas, np.einsum("bm,bm->b", drawn, accepted) / len(mine)


# -- signals: of one document each -----------------------------------------------------------------


def loss_signal(log_probs: ArrayLike) -> float:
    """-mean log p_t over the document's tokens, in nats (Yeom et al. 2018)."""
    return -float(np.mean(_tokens(log_probs)))


def zlib_signal(log_probs: ArrayLike, text: str) -> float:
    """Mean token loss over the length in bytes of the compressed text (Carlini et al. 2021)."""
    return loss_signal(log_probs) / len(zlib.compress(text.encode("utf-8")))


def reference_signal(log_probs: ArrayLike, reference: ArrayLike) -> float:
    """Mean token loss less that of a model that never saw the document (Carlini et al. 2021)."""
    return loss_signal(log_probs) - loss_signal(reference)


def min_k(log_probs: ArrayLike, share: float = LEAST_SHARE) -> float:
    """-mean of the lowest `share` of log p_t, one token at least, rounded down (Shi et al. 2023)."""
    values = _tokens(log_probs)
    return -float(np.mean(np.sort(values)[: max(1, int(share * len(values)))]))


def min_k_plus_plus(log_probs: ArrayLike, means: ArrayLike, deviations: ArrayLike, share: float = LEAST_SHARE) -> float:
    """min_k of (log p_t - mu_t) / sigma_t, mu_t and sigma_t the mean and standard deviation of log p(. | x_<t)
    under that same distribution (Zhang et al. 2024)."""
    spread = np.maximum(np.asarray(deviations, dtype=np.float64), LEAST_DEVIATION)
    return min_k((_tokens(log_probs) - np.asarray(means, dtype=np.float64)) / spread, share)


def gradient_norm_signal(norms: ArrayLike) -> float:
    """Mean over the parameter tensors of the 2-norm of the mean token loss's gradient (open-unlearning's GradNorm,
    after Wang et al. 2024, Pandora's White-Box)."""
    return float(np.mean(_tokens(norms)))


def _tokens(log_probs: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(log_probs, dtype=np.float64)
    if not values.size:
        raise InputError("a membership signal needs a document of at least two tokens, got none to predict.")
    return values


# -- the table -------------------------------------------------------------------------------------


def document_signals(compute: Callable[..., float], samples: Mapping[str, Sample]) -> tuple[list[float], list[float]]:
    """The signals of members and of the others."""
    members, others = ([compute(*signals) for signals in samples[group].signals] for group in DOCUMENTS)
    return members, others


def _told_apart(compute: Callable[..., float], samples: Mapping[str, Sample]) -> dict[str, Part]:
    """How well a signal tells members: its AUC, and its TPR at 1 % FPR."""
    signals = document_signals(compute, samples)
    areas, rates = membership_resamples(*signals)
    area, rate = auc(*signals), tpr_at_fpr(*signals)
    return {
        "auc": {"value": area, "interval": limits(areas, area)},
        "tpr_at_1_percent_fpr": {"value": rate, "interval": limits(rates, rate)},
    }


def _attack(compute: Callable[..., float], signals: tuple[str, ...], formula: str, source: str) -> Metric:
    return Metric(
        compute=compute, signals=signals, groups=DOCUMENTS, summary=_told_apart,
        formula=f"AUC and TPR at 1 % FPR of {formula}, low for members", range=(0, 1),
        best={"auc": 0.5, "tpr_at_1_percent_fpr": 0.01},
        collapsed="AUC near 0.5 by ignorance, or near 0 where the forget text was driven out; see perplexity on retain",
        source=source,
    )  # fmt: skip


_LOG_PROBS = ("document_log_probs",)
METRICS = {
    "mia_loss": _attack(loss_signal, _LOG_PROBS, "-mean log p_t", "Yeom et al. 2018"),
    "mia_zlib": _attack(zlib_signal, (*_LOG_PROBS, "document_text"), "loss / compressed bytes", "Carlini et al. 2021"),
    "mia_reference": _attack(
        reference_signal,
        (*_LOG_PROBS, "reference_document_log_probs"),
        "loss - loss of the reference",
        "Carlini et al. 2021",
    ),
    "mia_gradient_norm": _attack(
        gradient_norm_signal,
        ("document_gradient_norms",),
        "mean over parameter tensors of the loss gradient's 2-norm",
        "Wang et al. 2024",
    ),
    "mia_min_k": _attack(min_k, _LOG_PROBS, "-mean of the lowest 40 % of log p_t", "Shi et al. 2023; 40 % as in MUSE"),
    "mia_min_k_plus_plus": _attack(
        min_k_plus_plus,
        (*_LOG_PROBS, "document_means", "document_deviations"),
        "min-k of (log p_t - mu_t) / max(sigma_t, 1e-3), mean and deviation over the vocabulary",
        "Zhang et al. 2024",
    ),
}
