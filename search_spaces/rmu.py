"""Hidden states steered to a random vector on the forget rows, kept on the retain rows; MLP outputs are trained."""


def space(trial):
    schedule = trial.suggest_categorical("schedule", ["paired", "two_phase", "sugd"])
    config = {
        "method": "rmu",
        "tuning": "full",
        "train_modules": "down_proj",
        "schedule": schedule,
        "forget_on": "document",
        "retain_on": "document",
        "rmu_layer": trial.suggest_int("rmu_layer", 1, 3),  # a deeper model wants the range of its own layers
        "rmu_coefficient": trial.suggest_float("rmu_coefficient", 1.0, 50.0, log=True),
        "rmu_adaptive": trial.suggest_categorical("rmu_adaptive", [False, True]),
        "forget_weight": 1.0,
        "retain_weight": trial.suggest_float("retain_weight", 0.5, 1000.0, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True),
        "epochs": trial.suggest_int("epochs", 2, 10),
        "batch_size": 8,
        "retain_per_forget": 1,
    }
    if schedule == "two_phase":
        config["repair_epochs"] = trial.suggest_int("repair_epochs", 1, 3)
        config["repair_scale"] = trial.suggest_float("repair_scale", 0.1, 1.0, log=True)
    if schedule == "sugd":
        config["chunk_size"] = trial.suggest_categorical("chunk_size", [32, 64])
    return config
