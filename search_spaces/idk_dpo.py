"""Refusals preferred to the answers of the forget rows, cross-entropy on the retain rows."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "idk_dpo", forget_on="answer")
