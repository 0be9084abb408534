"""Flat logits on the forget rows under a constraint on the retain loss, whose multiplier moves."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(trial, "pdu", forget_weight=Range(0.001, 1.0, log=True), retain_weight=Range(0.5, 100.0, log=True))
