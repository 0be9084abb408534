"""Fine-tuning on the forget rows, subtracted from the model."""


def space(trial):
    tuning = trial.suggest_categorical("tuning", ["full", "lora"])
    schedule = trial.suggest_categorical("schedule", ["paired", "two_phase", "sugd"])
    config = {
        "method": "task_vector",
        "tuning": tuning,
        "schedule": schedule,
        "forget_on": trial.suggest_categorical("forget_on", ["document", "answer"]),
        "negation": trial.suggest_float("negation", 0.1, 4.0, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True),
        "epochs": trial.suggest_int("epochs", 2, 10),
        "batch_size": 8,
        "retain_per_forget": 0,
    }
    if tuning == "lora":
        config["lora_rank"] = trial.suggest_categorical("lora_rank", [8, 16, 32])
    if schedule == "two_phase":
        config["repair_epochs"] = trial.suggest_int("repair_epochs", 1, 3)
        config["repair_scale"] = trial.suggest_float("repair_scale", 0.1, 1.0, log=True)
    if schedule == "sugd":
        config["chunk_size"] = trial.suggest_categorical("chunk_size", [32, 64])
    return config
