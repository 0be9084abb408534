"""The searches over trials and merges. ray.tune is owned by tune.py, optuna by study.py."""
