"""The shared task's own settings, and what its scores demand of the data."""

from __future__ import annotations

from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.spec import EvalSet

OFFICIAL_TERMS = 12
OFFICIAL = {"max_new_tokens": 256, "mmlu_mode": "letters", "mmlu_shots": 5}


def check_terms(cells: set[str]) -> None:
    """Refuses data whose tasks and kinds are not those of the twelve terms."""
    expected = {f"Task{task}/{kind}" for task in (1, 2, 3) for kind in ("sc", "qa")}
    if cells != expected:
        raise InputError(
            f"--official demands the shared task's {OFFICIAL_TERMS} terms; "
            f"missing {sorted(expected - cells)}, unexpected {sorted(cells - expected)}."
        )


def check_shots(data: EvalSet, shots: int) -> None:
    """Refuses MMLU subjects with fewer solved examples than are asked for."""
    short = [f"{subject} has {len(dev)}" for subject, dev in data.dev.items() if len(dev) < shots]
    if short:
        raise InputError(f"--official asks MMLU with {shots} examples of each subject; {'; '.join(short[:5])}.")
