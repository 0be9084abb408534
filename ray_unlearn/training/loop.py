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
from ray_unlearn.training.dataloader import (
    RowGroup,
    TrainingRow,
    TrialData,
    length_groups,
    make_trial_data,
    split_units,
)
from ray_unlearn.training.engine import Engine
from ray_unlearn.training.gradient_masks import MaskedGradient
from ray_unlearn.training.monitor import Monitor
from ray_unlearn.training.parameters import TrainableModel
from ray_unlearn.training.schedule import Step, snapshot_steps, training_steps
from ray_unlearn.training.step_loss import StepLoss, TrialLoss
from ray_unlearn.training.worker import Worker, WorkerState


def run_trial(config: TrialConfig, state: WorkerState, worker: Worker) -> None:
    """Trains, scores itself at the snapshot points, and posts `started`, `snapshot`s and one `ended`."""
    began = time.monotonic()
    random.seed(config.seed)
    torch.manual_seed(config.seed + worker.rank)
    data = make_trial_data(config, state.forget, state.retain, state, worker.once)
    steps = training_steps(config, len(data.forget), len(data.retain))
    marks = set(snapshot_steps(steps, config.snapshots))
    trainable = TrainableModel(state.model, config)
    engine = None
    try:
        trial_loss = TrialLoss(config, trainable, state.tokenizer.pad_token_id, [row.task for (row, *_) in data.forget])
        engine = Engine(trainable.model, config, state.dtype)
        monitor = Monitor(config, worker, began)
        for index, step in enumerate(steps):
            if step.fresh_optimizer and index > 0:
                engine.reset_optimizer()
            if index == 0 or step.epoch != steps[index - 1].epoch:
                trial_loss.begin_epoch(engine, _epoch_rows(steps[index:], data))
            parts, tokens = _train_step(engine, trial_loss, step, data, worker)
            problem = next((f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)), None)
            if worker.agree(0.0 if problem else 1.0) < 1.0:
                worker.post("ended", status="failed", reason=f"step {index + 1}: {problem or 'a rank diverged'}")
                return
            trial_loss.update(step.epoch, parts)
            monitor.add(index, parts, tokens)
            if index in marks:
                scores = _snapshot(engine, trainable, state, worker, index, step, monitor)
                monitor.guard(scores, state.utility_floor)
            reason = monitor.stop_reason()
            if reason and index + 1 < len(steps):
                worker.post("ended", status="stopped", reason=f"step {index + 1}: {reason}")
                return
        worker.post("ended", status="finished", reason="")
    finally:
        if engine is not None:
            engine.close()
        trainable.release()


def _epoch_rows(steps: Sequence[Step], data: TrialData) -> list[TrainingRow]:
    """The forget rows of the epoch that begins with the first of these steps, in order."""
    mine = itertools.takewhile(lambda step: step.epoch == steps[0].epoch, steps)
    return [data.forget[i][0] for step in mine for i in step.forget]


def _train_step(
    engine: Engine, trial_loss: TrialLoss, step: Step, data: TrialData, worker: Worker
) -> tuple[dict[str, float], int]:
    """One optimiser step over this rank's share of the step's rows; returns loss parts and tokens seen.

    The share's losses are weighted so that the average over ranks and micro-batches, which
    DeepSpeed takes, is the mean over all the step's rows, however they fall on the ranks.
    """
    engine.module.train()
    config = trial_loss.config
    shares = worker.world * config.micro_batches
    masked = None if config.gradient_mask == "none" else MaskedGradient(engine, config)
    totals: dict[str, float] = {}
    tokens, norm = 0, None
    for micro in range(config.micro_batches):
        units = data.units(step, worker.rank * config.micro_batches + micro, shares)
        loss = _share_loss(engine, trial_loss, step, data, units, shares)
        totals = {**totals, **{name: totals.get(name, 0.0) + loss.shown[name] / shares for name in loss.shown}}
        tokens += sum(len(row.tokens.ids) for unit in units for row in unit)
        if worker.agree(1.0 if math.isfinite(sum(loss.shown.values())) else 0.0) < 1.0:
            return {**totals, "loss": loss.shown["loss"]}, tokens  # the weights must not see a non-finite gradient
        if masked is None:
            engine.backward(loss.total)
            norm = engine.step(step.learning_rate)
        else:
            masked.add(loss.by_split)
    if masked is not None:
        engine.backward(masked.loss())
        norm = engine.step(step.learning_rate)
    gathered = worker.gather([(totals, tokens)])
    names = sorted({name for part, _ in gathered for name in part})
    summed = {name: sum(part.get(name, 0.0) for part, _ in gathered) for name in names}
    return {**summed, "grad_norm": norm or 0.0}, sum(count for _, count in gathered)


def _share_loss(
    engine: Engine, trial_loss: TrialLoss, step: Step, data: TrialData, units: Sequence[RowGroup], shares: int
) -> StepLoss:
    """The loss of a share of a step's rows, in groups of like length; without rows, of one that weighs nothing."""
    collective = engine.stage == 3
    terms = trial_loss.terms(bool(step.forget), bool(step.retain), repair=step.phase == "repair")
    sizes = {"forget": len(step.forget), "retain": len(step.retain)}
    length, parts = data.padded_length(step), []
    padded = {term.split: length for term in terms if term.on == "all"}
    for rows in length_groups(split_units(units) if trial_loss.pools else units, collective, padded):
        counts = {split: sum(row.split == split for row in rows) for split in sizes}
        weights = {split: counts[split] * shares / max(1, size) for split, size in sizes.items()}
        parts.append(
            trial_loss.loss(engine, rows or data.retain[0], weights, terms, length=length, collective=collective)
        )
    names = sorted({name for part in parts for name in part.shown})
    return StepLoss(
        total=torch.stack([part.total for part in parts]).sum(),
        shown={name: sum(part.shown.get(name, 0.0) for part in parts) for name in names},
        by_split={split: torch.stack([part.by_split[split] for part in parts]).sum() for split in parts[0].by_split},
    )


def _snapshot(
    engine: Engine,
    trainable: TrainableModel,
    state: WorkerState,
    worker: Worker,
    index: int,
    step: Step,
    monitor: Monitor,
) -> Scores:
    """Scores the model as it is, keeps its weights, and reports both."""
    # In stage 3 every forward pass is a collective, so all ranks walk through all rows together.
    shard = Shard(worker.rank, worker.world, worker.gather) if engine.stage < 3 else Shard()
    with trainable.delivered(engine.module):
        scores = score_model(engine.module, state.tokenizer, state.eval_set, state.eval_settings, shard)
        weights = engine.weights(trainable.names)
    files = trainable.files(weights) if worker.rank == 0 else {}
    worker.report({**monitor.latest(), **scores.headlines()})
    worker.post(
        "snapshot",
        step=index + 1,
        phase=step.phase,
        scores=dataclasses.asdict(scores),
        files=files,
        seconds=monitor.elapsed(),
        course=monitor.drain(),
    )
    return scores
