"""One unlearning trial: config in, events out. The loop that every worker of a trial runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_unlearn.config import TrialConfig
from ray_unlearn.data import Encoded
from ray_unlearn.engine import Engine
from ray_unlearn.feed import Feed, Unit, alike, make_feed
from ray_unlearn.forward import context_of
from ray_unlearn.masks import memflex_mask, sure_mask
from ray_unlearn.objective import Objective, Row, StepLoss
from ray_unlearn.records import Example, Scores
from ray_unlearn.schedule import Step, plan, snapshot_steps
from ray_unlearn.scoring import EvalSet, EvalSettings, Shard, score_model
from ray_unlearn.tuning import Tuned

UNSTATED_CONTEXT = 2048
"""Tokens that a model is taken to read where its configuration names no limit."""
HOPELESS_UTILITY = 0.5
"""Share of the utility floor below which, at two snapshots in a row, a trial cannot come back."""


class Worker(Protocol):
    """What a trial needs of the process group it runs in."""

    rank: int
    world: int

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' lists, joined in rank order, on every rank."""

    def agree(self, value: float) -> float:
        """The smallest value over ranks."""

    def report(self, metrics: dict[str, Any]) -> None:
        """Metrics to Ray Train; called by every rank alike."""

    def post(self, event: str, **content: Any) -> None:
        """An event to the record's keeper; only rank 0's count."""

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What the search shares under that name; made here when nobody has made it."""


@dataclass(kw_only=True)
class Bench:
    """What stays in a worker between trials: base model, tokenizer, data, and what to score on."""

    model: Any
    tokenizer: Any
    forget: Sequence[Example]
    retain: Sequence[Example]
    eval_set: EvalSet
    eval_settings: EvalSettings
    dtype: str = "float32"
    utility_floor: float = 0.0
    """The utility under which a candidate is not feasible (absolute, not a share)."""
    _encoded: dict[Any, list[Encoded]] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Tokens that the model can take."""
        return context_of(self.model) or UNSTATED_CONTEXT

    def encoded(self, key: Any, make: Callable[[], list[Encoded]]) -> list[Encoded]:
        """Tokenised rows, made once for each way of tokenising."""
        if key not in self._encoded:
            self._encoded[key] = make()
        return self._encoded[key]


def run_trial(config: TrialConfig, bench: Bench, worker: Worker) -> None:
    """Trains, scores itself at the snapshot points, and posts `started`, `snapshot`s and one `ended`."""
    began = time.monotonic()
    random.seed(config.seed)
    torch.manual_seed(config.seed + worker.rank)
    feed = make_feed(config, bench.forget, bench.retain, bench, worker.shared)
    steps = plan(config, len(feed.forget), len(feed.retain))
    marks = set(snapshot_steps(steps, config.snapshots))
    tuned = Tuned(bench.model, config)
    engine = None
    try:
        objective = Objective(config, tuned, bench.tokenizer.pad_token_id, [row.task for (row, *_) in feed.forget])
        engine = Engine(tuned.model, config, bench.dtype)
        course = _Course(config, worker, began)
        for index, step in enumerate(steps):
            if step.fresh_optimizer and index > 0:
                engine.reset_optimizer()
            if index == 0 or step.epoch != steps[index - 1].epoch:
                objective.begin_epoch(engine, _epoch_rows(steps[index:], feed))
            parts, tokens = _train_step(engine, objective, step, feed, worker)
            problem = next((f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)), None)
            if worker.agree(0.0 if problem else 1.0) < 1.0:
                worker.post("ended", status="failed", reason=f"step {index + 1}: {problem or 'a rank diverged'}")
                return
            objective.update(step.epoch, parts)
            course.add(index, parts, tokens)
            if index in marks:
                scores = _snapshot(engine, tuned, bench, worker, index, step, course)
                course.guard(scores, bench.utility_floor)
            reason = course.stop_reason()
            if reason and index + 1 < len(steps):
                worker.post("ended", status="stopped", reason=f"step {index + 1}: {reason}")
                return
        worker.post("ended", status="finished", reason="")
    finally:
        if engine is not None:
            engine.close()
        tuned.release()


def _epoch_rows(steps: Sequence[Step], feed: Feed) -> list[Row]:
    """The forget rows of the epoch that begins with the first of these steps, in order."""
    mine = itertools.takewhile(lambda step: step.epoch == steps[0].epoch, steps)
    return [feed.forget[i][0] for step in mine for i in step.forget]


def _train_step(
    engine: Engine, objective: Objective, step: Step, feed: Feed, worker: Worker
) -> tuple[dict[str, float], int]:
    """One optimiser step over this rank's share of the step's rows; returns loss parts and tokens seen.

    The share's losses are weighted so that the average over ranks and micro-batches, which
    DeepSpeed takes, is the mean over all the step's rows, however they fall on the ranks.
    """
    engine.module.train()
    config = objective.config
    shares = worker.world * config.micro_batches
    saliency = _Saliency(engine, config)
    totals: dict[str, float] = {}
    tokens, norm = 0, None
    for micro in range(config.micro_batches):
        units = feed.units(step, worker.rank * config.micro_batches + micro, shares)
        loss = _share_loss(engine, objective, step, feed, units, shares)
        totals = {**totals, **{name: totals.get(name, 0.0) + loss.shown[name] / shares for name in loss.shown}}
        tokens += sum(len(row.tokens.ids) for unit in units for row in unit)
        if worker.agree(1.0 if math.isfinite(sum(loss.shown.values())) else 0.0) < 1.0:
            return {**totals, "loss": loss.shown["loss"]}, tokens  # the weights must not see a non-finite gradient
        saliency.add(loss.by_split)
        engine.backward(loss.total)
        if micro + 1 == config.micro_batches:
            saliency.apply()
        norm = engine.step(step.learning_rate)
    gathered = worker.gather([(totals, tokens)])
    names = sorted({name for part, _ in gathered for name in part})
    summed = {name: sum(part.get(name, 0.0) for part, _ in gathered) for name in names}
    return {**summed, "grad_norm": norm or 0.0}, sum(count for _, count in gathered)


def _share_loss(
    engine: Engine, objective: Objective, step: Step, feed: Feed, units: Sequence[Unit], shares: int
) -> StepLoss:
    """The loss of a share of a step's rows, in groups of like length; without rows, of one that weighs nothing."""
    collective = engine.stage == 3
    terms = objective.terms(bool(step.forget), bool(step.retain), repair=step.phase == "repair")
    sizes = {"forget": len(step.forget), "retain": len(step.retain)}
    parts = []
    for rows in alike(units, together=collective or objective.pools):
        counts = {split: sum(row.split == split for row in rows) for split in sizes}
        weights = {split: counts[split] * shares / max(1, size) for split, size in sizes.items()}
        parts.append(objective.loss(engine, rows or feed.retain[0], weights, terms, collective=collective))
    names = sorted({name for part in parts for name in part.shown})
    return StepLoss(
        total=torch.stack([part.total for part in parts]).sum(),
        shown={name: sum(part.shown.get(name, 0.0) for part in parts) for name in names},
        by_split={split: torch.stack([part.by_split[split] for part in parts]).sum() for split in sizes},
    )


class _Saliency:
    """Gradients of the forget and the retain loss apart, over a step's micro-batches, and the mask they make.

    They are taken beside `.grad`, never in it: an accumulated gradient would hold both.
    """

    def __init__(self, engine: Engine, config: TrialConfig) -> None:
        self.engine, self.config = engine, config
        self.splits = {"none": (), "sure": ("forget",), "memflex": ("forget", "retain")}[config.gradient_mask]
        self.gradients: dict[str, list[Tensor]] = {}

    def add(self, by_split: dict[str, Tensor]) -> None:
        """Adds one micro-batch's gradients; the graph stays for the backward pass."""
        for split in self.splits:
            new = torch.autograd.grad(
                by_split[split], self.engine.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            known = self.gradients.get(split)
            self.gradients[split] = list(new) if known is None else [a + b for a, b in zip(known, new, strict=True)]

    def apply(self) -> None:
        """Keeps of the step's gradients what the mask lets through; a repair step is not masked."""
        if not self.splits:
            return
        averaged = {split: self.engine.average(gradients) for split, gradients in self.gradients.items()}
        if not any(bool(gradient.any()) for gradient in averaged["forget"]):  # of all ranks: all of them return here
            return
        if self.config.gradient_mask == "sure":
            masks = sure_mask(averaged["forget"], self.config.mask_percentile)
        else:
            masks = memflex_mask(
                averaged["forget"], averaged["retain"], self.config.mask_cosine, self.config.mask_percentile
            )
        self.engine.mask(masks)


def _snapshot(
    engine: Engine, tuned: Tuned, bench: Bench, worker: Worker, index: int, step: Step, course: _Course
) -> Scores:
    """Scores the model as it is, keeps its weights, and reports both."""
    # In stage 3 every forward pass is a collective, so all ranks walk through all rows together.
    shard = Shard(worker.rank, worker.world, worker.gather) if engine.stage < 3 else Shard()
    with tuned.delivered(engine.module):
        scores = score_model(engine.module, bench.tokenizer, bench.eval_set, bench.eval_settings, shard)
        weights = engine.weights(tuned.trainable)
    files = tuned.files(weights) if worker.rank == 0 else {}
    metrics = {
        **course.latest(),
        **{name: getattr(scores, name) for name in ("task_aggregate", "mia_auc", "mia_score", "utility", "final")},
    }
    worker.report({name: value for name, value in metrics.items() if value is not None})
    worker.post(
        "snapshot",
        step=index + 1,
        phase=step.phase,
        scores=dataclasses.asdict(scores),
        files=files,
        seconds=course.elapsed(),
        course=course.drain(),
    )
    return scores


class _Course:
    """Keeps what a trial has seen of itself, and decides whether it can still come back."""

    def __init__(self, config: TrialConfig, worker: Worker, began: float) -> None:
        self.config, self.worker, self.began = config, worker, began
        self.points: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
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

    def latest(self) -> dict[str, Any]:
        return self.last

    def drain(self) -> list[dict[str, Any]]:
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
