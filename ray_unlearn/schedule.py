"""What is fed when: a trial's whole course as a list of steps, made before any training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ray_unlearn.config import TrialConfig


@dataclass(frozen=True)
class Step:
    """One optimiser step: row indices, learning rate, and whether the optimiser starts afresh."""

    phase: str
    forget: tuple[int, ...]
    retain: tuple[int, ...]
    learning_rate: float
    fresh_optimizer: bool


def plan(config: TrialConfig, num_forget: int, num_retain: int) -> list[Step]:
    """The steps of a trial over `num_forget` and `num_retain` rows; the same for the same seed."""
    phases = {"paired": _paired, "two_phase": _two_phase, "sugd": _sugd}[config.schedule]
    steps = []
    for name, peak, batches in phases(config, num_forget, num_retain):
        for index, (forget, retain) in enumerate(batches):
            rate = peak * _scale(config, index, len(batches))
            steps.append(Step(name, tuple(forget), tuple(retain), rate, index == 0))
    return steps


def snapshot_steps(steps: list[Step], count: int) -> list[int]:
    """Indices of the steps after which the trial scores itself: `count` of them, evenly spread, the last included.

    Where there is a repair phase, the end of forgetting is one of them: the point that forgot most.
    """
    total = len(steps)
    marks = {math.ceil(total * (k + 1) / count) - 1 for k in range(count)}
    boundary = next((i - 1 for i, step in enumerate(steps) if step.phase == "repair" and i > 0), None)
    if boundary is not None and boundary not in marks and count > 1:
        marks.discard(min(marks - {total - 1}, key=lambda mark: abs(mark - boundary)))
        marks.add(boundary)
    return sorted(marks)


Batches = list[tuple[list[int], list[int]]]


def _cycle(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


def _shuffled_cycle(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def _groups(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _forget_batches(config: TrialConfig, num_forget: int, num_retain: int) -> Batches:
    """Shuffled passes over the forget rows, each with its share of an endless shuffled retain stream."""
    rng = random.Random(config.seed)
    retain = _shuffled_cycle(num_retain, rng)
    batches: Batches = []
    for _ in range(config.epochs):
        for group in _groups(rng.sample(range(num_forget), num_forget), config.batch_size):
            batches.append((group, list(islice(retain, len(group) * config.retain_per_forget))))
    return batches


def _paired(config: TrialConfig, num_forget: int, num_retain: int) -> list[tuple[str, float, Batches]]:
    return [("forget", config.learning_rate, _forget_batches(config, num_forget, num_retain))]


def _two_phase(config: TrialConfig, num_forget: int, num_retain: int) -> list[tuple[str, float, Batches]]:
    rng = random.Random(config.seed + 1)
    size = config.batch_size * max(1, config.retain_per_forget)
    repair: Batches = []
    for _ in range(config.repair_epochs):
        repair += [([], group) for group in _groups(rng.sample(range(num_retain), num_retain), size)]
    forget = _paired(config, num_forget, num_retain)
    return forget + [("repair", config.learning_rate * config.repair_scale, repair)] * bool(repair)


def _sugd(config: TrialConfig, num_forget: int, num_retain: int) -> list[tuple[str, float, Batches]]:
    """AILS-NTUA's sequential unlearning: consecutive chunks in file order, n retain rows after each forget
    row, taken by a pointer that runs cyclically through the retain set and is never reset."""
    retain = _cycle(num_retain)
    phases = []
    for chunk in _groups(list(range(num_forget)), config.chunk_size):
        beside = list(islice(retain, len(chunk) * config.retain_per_forget))
        batches: Batches = []
        for _ in range(config.epochs):
            for start in range(0, len(chunk), config.batch_size):
                stop = start + config.batch_size
                n = config.retain_per_forget
                batches.append((chunk[start:stop], beside[start * n : stop * n]))
        phases.append(("forget", config.learning_rate, batches))
    return phases


def _scale(config: TrialConfig, index: int, total: int) -> float:
    """Multiple of the peak learning rate at step `index` of a phase of `total` steps."""
    warmup = math.ceil(config.warmup * total)
    if index < warmup:
        return (index + 1) / warmup
    progress = (index - warmup) / max(1, total - warmup)
    if config.lr_schedule == "linear":
        return 1 - progress
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
