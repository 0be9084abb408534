"""A random teacher on the forget rows, the reference on the retain rows: MALTO's."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "dual_teacher")
