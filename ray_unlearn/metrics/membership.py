"""Membership inference: do members of the forget set still stand out from unseen documents?

A signal is a number for each document that is low where the model seems to know it, as the loss is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from ray_unlearn.errors import InputError

LEAST_SHARE = 0.4
"""Share of a document's tokens that min-k and min-k++ average, as in MUSE and open-unlearning."""
LEAST_DEVIATION = 1e-4
"""Below this a next-token distribution has all its mass on one token, and its deviation is rounding."""


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
