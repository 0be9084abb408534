"""Bounded ascent on the forget rows, KL on the retain rows: TOFU's KL minimisation."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "kl_ascent")
