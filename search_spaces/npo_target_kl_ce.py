"""NPO on the forget rows, KL of the target tokens and cross-entropy on the retain rows: Atyaephyra's."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(trial, "npo_target_kl_ce", kl_weight=Range(0.1, 5.0, log=True))
