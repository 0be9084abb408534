"""Bounded ascent on the forget rows, KL and cross-entropy on the retain rows.

The bound decides the membership attack: ascent stops pushing a row once it is as surprising as
that, so a bound near the loss of unseen text leaves members where unseen text is.
"""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(trial, "ascent_kl_ce", forget_weight=Range(0.2, 4.0, log=True), epochs=Range(3, 10))
