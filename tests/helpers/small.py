"""A benchmark and a job small enough for tests that run the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_unlearn.data.benchmarks.embedded import EmbeddedSettings
from ray_unlearn.records import Example

SETTINGS = EmbeddedSettings(
    stories=3, biographies=1, entries=8, nonmembers=24, facts=8, vocabulary=420, hidden=64, layers=2, epochs=25,
    learning_rate=5e-3,
)  # fmt: skip


def small_job(cache: Path) -> dict[str, Any]:
    """Plain values of a job over SETTINGS: every stage, in the smallest number of steps that shows it."""
    return {
        "target": {"benchmark": "embedded", "settings": SETTINGS.__dict__, "cache": str(cache)},
        "evaluation": {"max_new_tokens": 24, "batch_size": 64},
        "mmlu": {"mode": "cloze"},
        "search": {
            "trials": 3,
            "spaces": ["ascent_kl_ce"],
            "fixed": {"snapshots": 2, "epochs": 2, "forget_on": "document", "kl_weight": 1.0},
            "ranges": {"learning_rate": [1e-4, 1e-3]},
        },
        "resources": {"dashboard": False},
        "merge": {"candidates": 2},
        "selection": {"utility_floor": 0.2},
    }


def examples(rows: list[dict[str, str]]) -> list[Example]:
    """The benchmark's rows as those that are read from its files."""
    names = ("id", "input", "output", "task")
    return [Example(**{name: row[name] for name in names}, kind=row["id"][-3:-1]) for row in rows]


def sampled(space, count=50, seed=0):
    """(parameters asked for, config returned) of `count` random trials of a study in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    made = []
    for _ in range(count):
        trial = study.ask()
        returned = space(trial)
        made.append((trial.params, returned))
    return made


class Walk:
    """A trial that answers with the lowest value, or the given choice, and writes down what it was asked."""

    def __init__(self, **chosen):
        self.chosen, self.asked = chosen, []

    def suggest_float(self, name, low, high, *, step=None, log=False):
        return self.note(name, f"float {low!r} to {high!r}" + " log" * log + (f" step {step}" if step else ""), low)

    def suggest_int(self, name, low, high, *, step=1, log=False):
        return self.note(name, f"int {low!r} to {high!r}" + " log" * log + (f" step {step}" if step > 1 else ""), low)

    def suggest_categorical(self, name, choices):
        return self.note(name, f"one of {list(choices)!r}", self.chosen.get(name, choices[0]))

    def note(self, name, distribution, value):
        self.asked.append(f"{name}: {distribution}")
        return value
