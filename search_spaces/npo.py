"""NPO on the forget rows alone."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "npo")
