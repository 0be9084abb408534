"""Membership inference by loss: do members of the forget set still stand out from unseen documents?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sklearn.metrics import roc_auc_score

from ray_unlearn.errors import InputError


def auc(member_losses: Sequence[float], nonmember_losses: Sequence[float]) -> float:
    """Area under the ROC curve with members positive and score = -loss: 1 memorised, 0.5 unknowable, 0 over-unlearned.

    Raises InputError for an empty list or a loss that is not finite.
    """
    for name, losses in (("member", member_losses), ("nonmember", nonmember_losses)):
        if not losses:
            raise InputError(f"MIA needs at least one {name} loss, got none.")
        for index, loss in enumerate(losses):
            if not _finite(loss):
                raise InputError(f"MIA losses must be finite numbers; {name}[{index}] is {loss!r:.60}.")
    labels = [1] * len(member_losses) + [0] * len(nonmember_losses)
    return float(roc_auc_score(labels, [-loss for loss in (*member_losses, *nonmember_losses)]))


def _finite(loss: object) -> bool:
    try:
        return isinstance(loss, (int, float)) and not isinstance(loss, bool) and math.isfinite(loss)
    except OverflowError:  # a whole number beyond any float
        return False


def mia_score(area: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 when members cannot be told, 0 when they can, in either direction."""
    return 1 - 2 * abs(area - 0.5)
