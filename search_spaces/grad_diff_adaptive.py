"""Gradient difference whose retain weight follows the retain loss: SHA256's."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(
        trial,
        "grad_diff_adaptive",
        first=("forget_on", "ascent_bound", "forget_weight", "retain_weight"),
        retain_weight=Range(0.5, 4.0, log=True),
    )
