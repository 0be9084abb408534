"""Hidden states steered to a random vector on the forget rows, kept on the retain rows; MLP outputs are trained."""

from ray_unlearn.search.plain import Range, plain


def space(trial):
    return plain(
        trial,
        "rmu",
        first=("rmu_layer", "rmu_coefficient"),
        tuning="full",
        train_modules="down_proj",
        forget_on="document",
        retain_on="document",
        forget_weight=1.0,
        retain_weight=Range(0.5, 1000.0, log=True),
        retain_per_forget=1,
    )
