"""What is fed when: a trial's whole course as a list of steps, made before any training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from ray_unlearn.config.trial import TrialConfig

Batches = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Step:
    """One optimiser step: row indices, learning rate, and whether the optimiser starts afresh."""

    phase: str
    epoch: int
    forget: tuple[int, ...]
    retain: tuple[int, ...]
    learning_rate: float
    fresh_optimizer: bool


@dataclass(frozen=True)
class _Phase:
    """Consecutive steps under one course of the learning rate, with the optimiser started afresh."""

    name: str
    peak: float
    epochs: list[Batches]


def training_steps(config: TrialConfig, num_forget: int, num_retain: int) -> list[Step]:
    """The steps of a trial over `num_forget` and `num_retain` rows; the same for the same seed."""
    steps = []
    epoch = 0
    for phase in SCHEDULES[config.schedule](config, num_forget, num_retain):
        total, index = sum(len(batches) for batches in phase.epochs), 0
        for batches in phase.epochs:
            for forget, retain in batches:
                rate = phase.peak * _scale(config, index, total)
                steps.append(Step(phase.name, epoch, tuple(forget), tuple(retain), rate, index == 0))
                index += 1
            epoch += 1
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


def _cycle(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


def _shuffled_cycle(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def _groups(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _paired(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    """Shuffled passes over the forget rows, each row with its share of an endless shuffled retain stream."""
    rng = random.Random(config.seed)
    retain = _shuffled_cycle(num_retain, rng)
    epochs = [
        [
            (group, list(islice(retain, len(group) * config.retain_per_forget)))
            for group in _groups(rng.sample(range(num_forget), num_forget), config.batch_size)
        ]
        for _ in range(config.epochs)
    ]
    return [_Phase("forget", config.learning_rate, epochs)]


def _fixed_pairs(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    """Shuffled passes over the forget rows, row i always with the same retain rows, the i-th n of them taken
    cyclically (ZJUKLAB: i with i mod their number); with more retain rows than that some are never seen."""
    rng, n = random.Random(config.seed), config.retain_per_forget
    epochs = [
        [
            (group, [(i * n + k) % num_retain for i in group for k in range(n)])
            for group in _groups(rng.sample(range(num_forget), num_forget), config.batch_size)
        ]
        for _ in range(config.epochs)
    ]
    return [_Phase("forget", config.learning_rate, epochs)]


def _mixed(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    """Shuffled passes over all rows of both sets; what falls into a batch is left to chance (Atyaephyra)."""
    rng = random.Random(config.seed)
    epochs = []
    for _ in range(config.epochs):
        order = rng.sample(range(num_forget + num_retain), num_forget + num_retain)
        epochs.append(
            [
                ([i for i in group if i < num_forget], [i - num_forget for i in group if i >= num_forget])
                for group in _groups(order, config.batch_size)
            ]
        )
    return [_Phase("forget", config.learning_rate, epochs)]


def _two_phase(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    rng = random.Random(config.seed + 1)
    return _paired(config, num_forget, num_retain) + _repair(config, list(range(num_retain)), rng)


def _repair(config: TrialConfig, rows: list[int], rng: random.Random) -> list[_Phase]:
    """Shuffled passes over retain rows alone."""
    size = config.batch_size * max(1, config.retain_per_forget)
    epochs: list[Batches] = [
        [([], group) for group in _groups(rng.sample(rows, len(rows)), size)] for _ in range(config.repair_epochs)
    ]
    return [_Phase("repair", config.learning_rate * config.repair_scale, epochs)] * bool(epochs)


def _sugd(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    """AILS-NTUA's sequential unlearning: consecutive chunks in file order, n retain rows after each forget
    row, taken by a pointer that runs cyclically through the retain set and is never reset."""
    retain = _cycle(num_retain)
    n, size = config.retain_per_forget, config.batch_size
    phases = []
    for chunk in _groups(list(range(num_forget)), config.chunk_size):
        beside = list(islice(retain, len(chunk) * n))
        batches = [
            (chunk[start : start + size], beside[start * n : (start + size) * n])
            for start in range(0, len(chunk), size)
        ]
        phases.append(_Phase("forget", config.learning_rate, [batches] * config.epochs))
    return phases


def _agad(config: TrialConfig, num_forget: int, num_retain: int) -> list[_Phase]:
    """AILS-NTUA's alternation: consecutive chunks on the forget loss alone, after every few whole ones of them an
    annealing on a fresh share of the retain rows, in the end one on all of them."""
    rng = random.Random(config.seed)
    share = max(1, int(config.anneal_fraction * num_retain))
    phases: list[_Phase] = []
    for number, chunk in enumerate(_groups(list(range(num_forget)), config.chunk_size), start=1):
        epochs: list[Batches] = [
            [(group, []) for group in _groups(rng.sample(chunk, len(chunk)), config.batch_size)]
            for _ in range(config.epochs)
        ]
        phases.append(_Phase("forget", config.learning_rate, epochs))
        if number % config.anneal_every == 0 and len(chunk) == config.chunk_size:
            phases += _repair(config, rng.sample(range(num_retain), share), rng)
    return phases + (_repair(config, list(range(num_retain)), rng) if config.anneal_finally else [])


SCHEDULES: dict[str, Callable[[TrialConfig, int, int], list[_Phase]]] = {
    "paired": _paired,
    "fixed_pairs": _fixed_pairs,
    "mixed": _mixed,
    "sugd": _sugd,
    "agad": _agad,
    "two_phase": _two_phase,
}


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
