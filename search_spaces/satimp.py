"""Ascent weighted by saturation and importance, cross-entropy on the retain rows."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "satimp")
