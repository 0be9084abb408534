"""What a trial sees of itself: its course, and whether it can still come back."""

from __future__ import annotations

import resource
import time

import torch

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.records import Scores
from ray_unlearn.training.worker import Worker

HOPELESS_UTILITY = 0.5
"""Share of the utility floor below which, at two snapshots in a row, a trial cannot come back."""


class Monitor:
    """Keeps what a trial has seen of itself, and decides whether it can still come back."""

    def __init__(self, config: TrialConfig, worker: Worker, began: float) -> None:
        self.config, self.worker, self.began = config, worker, began
        self.points: list[dict[str, object]] = []
        self.last: dict[str, object] = {}
        self.ticked = time.monotonic()
        self.low_utility = 0

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def add(self, index: int, parts: dict[str, float], tokens: int) -> None:
        """Takes one step's numbers; the first step is announced at once, since it ends the trial's start-up."""
        now = time.monotonic()
        memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _peak_rss_mb()
        self.last = {
            "step": index + 1,
            **{name: float(f"{value:.6g}") for name, value in parts.items()},
            "tokens_per_second": round(tokens / max(now - self.ticked, 1e-9), 1),
            "memory_mb": round(memory, 1),
        }
        self.ticked = now
        self.points.append(self.last)
        if index == 0:
            self.worker.post("started", seconds=self.elapsed())

    def latest(self) -> dict[str, object]:
        return self.last

    def drain(self) -> list[dict[str, object]]:
        """The points since the last call; time spent scoring does not count as training time."""
        points, self.points = self.points, []
        self.ticked = time.monotonic()
        return points

    def guard(self, scores: Scores, utility_floor: float) -> None:
        low = scores.utility is not None and scores.utility < HOPELESS_UTILITY * utility_floor
        self.low_utility = self.low_utility + 1 if low else 0

    def stop_reason(self) -> str | None:
        """Why the trial ends here, the same on all ranks; None to go on."""
        if self.low_utility >= 2:
            return "utility under half the floor at two snapshots in a row"
        limit = self.config.max_seconds
        if limit is not None and self.worker.agree(-self.elapsed()) < -limit:
            return f"out of time: {limit:g} s"
        return None


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
