"""Gradient difference whose retain weight follows the retain loss: SHA256's."""


def space(trial):
    tuning = trial.suggest_categorical("tuning", ["full", "lora"])
    schedule = trial.suggest_categorical("schedule", ["paired", "two_phase", "sugd"])
    config = {
        "method": "grad_diff_adaptive",
        "tuning": tuning,
        "schedule": schedule,
        "forget_on": trial.suggest_categorical("forget_on", ["document", "answer"]),
        "ascent_bound": trial.suggest_float("ascent_bound", 2.0, 8.0),
        "forget_weight": trial.suggest_float("forget_weight", 0.05, 2.0, log=True),
        "retain_weight": trial.suggest_float("retain_weight", 0.5, 4.0, log=True),
        "adaptive_max": trial.suggest_float("adaptive_max", 1.5, 4.0),
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True),
        "epochs": trial.suggest_int("epochs", 2, 10),
        "batch_size": 8,
        "retain_per_forget": 2,
    }
    if tuning == "lora":
        config["lora_rank"] = trial.suggest_categorical("lora_rank", [8, 16, 32])
    if schedule == "two_phase":
        config["repair_epochs"] = trial.suggest_int("repair_epochs", 1, 3)
        config["repair_scale"] = trial.suggest_float("repair_scale", 0.1, 1.0, log=True)
    if schedule == "sugd":
        config["chunk_size"] = trial.suggest_categorical("chunk_size", [32, 64])
    return config
