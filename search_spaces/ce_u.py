"""Cross-entropy against the model's own distribution without the answer."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "ce_u", first=("ce_u_skip",))
