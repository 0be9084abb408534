"""Self-distillation from the reference with the answers' logits lowered, cross-entropy on the retain rows."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "undial")
