"""NPO on the forget rows, KL and cross-entropy on the retain rows: ZJUKLAB's weighted sum."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(trial, "npo_kl_ce", epochs=Range(3, 10))
