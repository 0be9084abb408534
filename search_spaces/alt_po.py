"""Alternative answers, which the data must bring, preferred to those of the forget rows."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(trial, "alt_po", forget_on="answer", retain_weight=Range(0.2, 5.0, log=True))
