"""One unlearning trial: config in, events out. The loop that every worker of a trial runs."""

from __future__ import annotations

import dataclasses
import math
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_unlearn.config import TrialConfig
from ray_unlearn.data import Batch, Encoded, collate, cut, encode
from ray_unlearn.engine import Engine
from ray_unlearn.losses import LOSSES, METHODS, RETAIN_TERMS
from ray_unlearn.models import context_length
from ray_unlearn.records import Example, Scores
from ray_unlearn.schedule import Step, plan, snapshot_steps
from ray_unlearn.scoring import EvalSet, EvalSettings, Shard, evaluate_model
from ray_unlearn.tuning import Tuned

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

    def rows(self, split: str, eos: bool, max_length: int | None) -> list[Encoded]:
        """The tokenised rows of a split, made once for each way of tokenising."""
        limit = min(max_length or 10**9, context_length(self.model))
        key = (split, eos, limit)
        if key not in self._encoded:
            examples = self.forget if split == "forget" else self.retain
            self._encoded[key] = [cut(encode(self.tokenizer, e.input, e.output, eos), limit) for e in examples]
        return self._encoded[key]


def run_trial(config: TrialConfig, bench: Bench, worker: Worker) -> None:
    """Trains, scores itself at the snapshot points, and posts `started`, `snapshot`s and one `ended`."""
    began = time.monotonic()
    random.seed(config.seed)
    torch.manual_seed(config.seed + worker.rank)
    forget = bench.rows("forget", config.forget_eos, config.max_length)
    retain = bench.rows("retain", True, config.max_length)
    feed = _Feed(forget, retain, bench.tokenizer.pad_token_id)
    steps = plan(config, len(forget), len(retain))
    marks = set(snapshot_steps(steps, config.snapshots))
    tuned = Tuned(bench.model, config)
    engine = None
    try:
        engine = Engine(tuned.model, config, bench.dtype)
        course = _Course(config, worker, began)
        for index, step in enumerate(steps):
            if step.fresh_optimizer and index > 0:
                engine.reset_optimizer()
            parts, tokens = _train_step(engine, tuned, config, step, feed, worker)
            problem = next((f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)), None)
            if worker.agree(0.0 if problem else 1.0) < 1.0:
                worker.post("ended", status="failed", reason=f"step {index + 1}: {problem or 'a rank diverged'}")
                return
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


@dataclass(frozen=True)
class _Feed:
    """The tokenised rows that a trial's steps name by index."""

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    pad_id: int

    def rows(self, step: Step, slot: int, slots: int) -> list[tuple[str, Encoded]]:
        """One slot's share of a step's rows, forget rows first; every slots-th of each."""
        forget = [("forget", self.forget[i]) for i in step.forget[slot::slots]]
        return forget + [("retain", self.retain[i]) for i in step.retain[slot::slots]]


def _train_step(
    engine: Engine, tuned: Tuned, config: TrialConfig, step: Step, feed: _Feed, worker: Worker
) -> tuple[dict[str, float], int]:
    """One optimiser step over this rank's share of the step's rows; returns loss parts and tokens seen.

    The share's losses are weighted so that the average over ranks and micro-batches, which
    DeepSpeed takes, is the mean over all the step's rows, however they fall on the ranks.
    """
    engine.module.train()
    shares = worker.world * config.micro_batches
    totals: dict[str, float] = {}
    tokens, norm = 0, None
    for micro in range(config.micro_batches):
        rows = feed.rows(step, worker.rank * config.micro_batches + micro, shares)
        loss, parts = torch.zeros((), device=engine.device), {"loss": 0.0}
        for group in _alike(rows, engine.stage):
            part, shown = _group_loss(engine, tuned, config, step, group, shares, feed)
            loss, parts = loss + part, {**parts, **{name: parts.get(name, 0.0) + shown[name] for name in shown}}
        totals = {**totals, **{name: totals.get(name, 0.0) + parts[name] / shares for name in parts}}
        tokens += sum(len(row.ids) for _, row in rows)
        if worker.agree(1.0 if math.isfinite(sum(parts.values())) else 0.0) < 1.0:
            return {**totals, "loss": parts["loss"]}, tokens  # the weights must not see a non-finite gradient
        engine.backward(loss)
        norm = engine.step(step.learning_rate)
    gathered = worker.gather([(totals, tokens)])
    names = sorted({name for part, _ in gathered for name in part})
    summed = {name: sum(part.get(name, 0.0) for part, _ in gathered) for name in names}
    return {**summed, "grad_norm": norm or 0.0}, sum(count for _, count in gathered)


def _alike(rows: Sequence[tuple[str, Encoded]], stage: int) -> list[list[tuple[str, Encoded]]]:
    """Rows in groups whose longest is less than twice the shortest, so that padding is less than half.

    Each group is a forward pass of its own, and one backward pass follows them all. In stage 3,
    where the ranks' passes must match one to one, the rows stay together; no rows are one idle group.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][1].ids), i))
    groups: list[list[int]] = [order[:1]]
    for index in order[1:]:
        if stage < 3 and len(rows[index][1].ids) >= 2 * len(rows[groups[-1][0]][1].ids):
            groups.append([])
        groups[-1].append(index)
    return [[rows[index] for index in sorted(group)] for group in groups]  # sorted: forget rows stay first


def _group_loss(
    engine: Engine,
    tuned: Tuned,
    config: TrialConfig,
    step: Step,
    rows: Sequence[tuple[str, Encoded]],
    shares: int,
    feed: _Feed,
) -> tuple[Tensor, dict[str, float]]:
    """step_loss of some of a step's rows, weighted by their part in the step; without rows, an idle pass."""
    count = sum(split == "forget" for split, _ in rows)
    weights = (
        count * shares / max(1, len(step.forget)),
        (len(rows) - count) * shares / max(1, len(step.retain)),
    )
    batch = collate([row for _, row in rows] or [feed.retain[0]], feed.pad_id, engine.device)
    reference = None
    if engine.stage == 3:  # the reference pass is a collective there: all ranks take it or none
        reference = METHODS[config.method].needs_reference(bool(step.forget), bool(step.retain))
    return step_loss(
        engine,
        tuned,
        config,
        batch,
        count,
        weights,
        idle=not rows,
        repair=not step.forget,
        reference=reference,
    )


def step_loss(
    engine: Any,
    tuned: Tuned,
    config: TrialConfig,
    batch: Batch,
    num_forget: int,
    weights: tuple[float, ...],
    *,
    idle: bool = False,
    repair: bool = False,
    reference: bool | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted loss of a batch whose first `num_forget` rows are forget rows, and its parts.

    `weights` are the batch's shares of the step's forget and retain rows. `repair` marks a step of
    the second phase: it descends on retain rows under any method, by cross-entropy where the method
    has no retain terms of its own. `idle` marks a dummy batch that takes part in the collective
    passes and weighs nothing; `reference` says whether the reference pass is one of them.
    """
    method = METHODS[config.method]
    num_retain = len(batch.ids) - num_forget
    if reference is None:
        reference = method.needs_reference(num_forget > 0, num_retain > 0)
    tensors = {"logits": engine(**_inputs(batch)).logits[:, :-1].float()}
    if reference:
        with tuned.reference(engine.module) as model:
            tensors["ref_logits"] = model(**_inputs(batch)).logits[:, :-1].float()
    loss = tensors["logits"].sum() * 0.0
    if idle:
        return loss, {"loss": 0.0}
    terms = _terms(config, num_forget, num_retain, repair)
    for name in ("logps", "ref_logps"):
        if any(name in LOSSES[term.loss].tensors for term in terms):
            tensors[name] = token_logps(tensors[name.replace("logps", "logits")], batch.ids)
    shown: dict[str, float] = {}
    for term in terms:
        value = weights[term.part != "forget"] * _value(term, config, tensors, batch)
        loss = loss + term.weight * value
        shown[term.part] = float(value.detach())
    return loss, {"loss": float(loss.detach()), **shown}


@dataclass(frozen=True)
class _Term:
    """One summand of a step's loss: a loss of the table, on some rows, under the name it has in the course."""

    part: str
    loss: str
    weight: float
    rows: slice
    on: str


def _terms(config: TrialConfig, num_forget: int, num_retain: int, repair: bool) -> list[_Term]:
    """The summands for a batch whose first rows are forget rows and whose others are retain rows."""
    method, found = METHODS[config.method], []
    if num_forget:
        forget_rows = slice(0, num_forget)
        found.append(_Term("forget", method.forget, config.forget_weight, forget_rows, config.forget_on))
    if num_retain:
        retain_rows = slice(num_forget, None)
        for name in method.retain:
            part, weight = RETAIN_TERMS[name]
            found.append(_Term(part, name, getattr(config, weight), retain_rows, config.retain_on))
        if repair and not method.retain:
            found.append(_Term("retain", "cross_entropy", 1.0, retain_rows, config.retain_on))
    return found


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "use_cache": False}


def _value(term: _Term, config: TrialConfig, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
    """A summand's loss, called with the tensors and options that its row of the table names."""
    loss = LOSSES[term.loss]
    given = {**tensors, "mask": batch.mask("document" if loss.whole_document else term.on)}
    options = {argument: getattr(config, key) for argument, key in loss.options.items()}
    return loss.compute(*(given[name][term.rows] for name in loss.tensors), **options)


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """(logits [B,T-1,V], ids [B,T]) -> [B,T-1]: log-probability of each next token."""
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def _snapshot(
    engine: Engine, tuned: Tuned, bench: Bench, worker: Worker, index: int, step: Step, course: _Course
) -> Scores:
    """Scores the model as it is, keeps its weights, and reports both."""
    # In stage 3 every forward pass is a collective, so all ranks walk through all rows together.
    shard = Shard(worker.rank, worker.world, worker.gather) if engine.stage < 3 else Shard()
    scores, _ = evaluate_model(engine.module, bench.tokenizer, bench.eval_set, bench.eval_settings, shard)
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
