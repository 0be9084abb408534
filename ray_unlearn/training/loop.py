"""One unlearning trial: config in, events out. The loop that every worker of a trial runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Sequence

import torch

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.evaluation.scoring import score_model
from ray_unlearn.evaluation.work_units import Shard
from ray_unlearn.records import Scores
from ray_unlearn.training.dataloader import Feed, Row, Unit, alike, make_feed
from ray_unlearn.training.engine import Engine
from ray_unlearn.training.gradient_masks import _Saliency
from ray_unlearn.training.monitor import _Course
from ray_unlearn.training.parameters import Tuned
from ray_unlearn.training.schedule import Step, plan, snapshot_steps
from ray_unlearn.training.step_loss import Objective, StepLoss
from ray_unlearn.training.worker import Bench, Worker


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
