"""NPO on the forget rows, Renyi divergence and cross-entropy on the retain rows."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "npo_renyi_ce")
