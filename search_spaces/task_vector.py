"""Fine-tuning on the forget rows, subtracted from the model."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "task_vector")
