"""NPO without a reference on the forget rows, cross-entropy on the retain rows."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "simnpo")
