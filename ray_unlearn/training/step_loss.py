"""The loss of a step: which losses of the table, on which rows and tokens, with what weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.tokens import Batch, collate
from ray_unlearn.losses import LOSSES, METHODS, OPTIONS, losses_of, make_weighting, pools
from ray_unlearn.losses.representation import adaptive_coefficient, control_vector
from ray_unlearn.losses.rows import scatter_tokens
from ray_unlearn.models.forward import at_least_float32, head_at
from ray_unlearn.models.loading import find_layer
from ray_unlearn.protocols import CausalLM
from ray_unlearn.training.dataloader import TrainingRow
from ray_unlearn.training.engine import Engine
from ray_unlearn.training.parameters import TrainableModel

SPLITS = ("forget", "alternative", "retain")


@dataclass(frozen=True)
class Term:
    """One summand of a step's loss: a loss of the table, on a split's rows, under the name it has in the course."""

    part: str
    loss: str
    split: str
    weight: float
    on: str


@dataclass(frozen=True)
class StepLoss:
    """What a forward pass came to."""

    total: Tensor
    shown: dict[str, float]
    """Each part before its weight, and `loss`, their weighted sum."""
    by_split: dict[str, Tensor]
    """The weighted sum of the terms of each split that has any."""


class TrialLoss:
    """A trial's loss, with what of it moves during the trial: the retain weight, the control vectors of RMU."""

    def __init__(self, config: TrialConfig, trainable: TrainableModel, pad_id: int, tasks: Sequence[str] = ()) -> None:
        self.config, self.trainable, self.pad_id = config, trainable, pad_id
        self.weighting = make_weighting(config.method, config.retain_weight, config.options)
        self.pools = pools(config.method, config.options)
        self.steering = None
        if any("hidden" in loss.tensors for loss in losses_of(config.method)):
            self.steering = _Steering(config, trainable.model, sorted(set(tasks)))

    def terms(self, forget: bool, retain: bool, repair: bool = False) -> list[Term]:
        """The summands of a step with forget rows, with retain rows; those of weight 0 are left out.

        `repair` marks a step of retain rows alone: it descends on them under any method, by
        cross-entropy where the method has no retain terms of its own.
        """
        config, method, found = self.config, METHODS[self.config.method], []
        if forget:
            found.append(Term("forget", method.forget, "forget", config.forget_weight, config.forget_on))
        if retain:
            for name in method.retain:
                part = LOSSES[name].part
                weight = self.weighting.weight if part == "retain" else config.kl_weight
                found.append(Term(part, name, "retain", weight, getattr(config, f"{part}_on")))
            if repair and not method.retain:
                found.append(Term("retain", "cross_entropy", "retain", 1.0, config.retain_on))
        return [term for term in found if term.weight > 0]

    def loss(
        self,
        engine: Engine,
        rows: Sequence[TrainingRow],
        weights: dict[str, float],
        terms: Sequence[Term],
        *,
        length: int = 0,
        collective: bool = False,
    ) -> StepLoss:
        """The weighted loss of some of a step's rows; `weights` are their shares of the step, by split.

        Rows of a split that a term counts padding of are padded to `length` tokens at least.

        Rows that no term asks for are left out of the forward pass. Where it is `collective` (ZeRO
        stage 3) every rank takes the passes of all `terms`, on a row that weighs nothing if it has
        no other.
        """
        here = {row.split for row in rows}
        mine = [term for term in terms if term.split in here]
        wanted = {term.split for term in mine}
        if any("alt_mask" in LOSSES[term.loss].tensors for term in mine):
            wanted.add("alternative")
        used = [row for split in SPLITS for row in rows if row.split == split and split in wanted]
        least = max((length for term in mine if term.on == "all"), default=0)
        forward = _Forward(self, engine, used or list(rows[:1]), mine, least)
        total = forward.nothing
        shown, by_split = {}, {term.split: forward.nothing for term in terms}
        for term in terms:
            if term in mine:
                value = weights[term.split] * forward.value(term)
                total = total + term.weight * value
                by_split[term.split] = by_split[term.split] + term.weight * value
                shown[term.part] = float(value.detach())
            elif collective and LOSSES[term.loss].needs_reference:
                forward.idle_reference()
        return StepLoss(total, {"loss": float(total.detach()), **shown}, by_split)

    def begin_epoch(self, engine: Engine, forget: Sequence[TrainingRow]) -> None:
        """Takes anew what depends on the model at an epoch's start; `forget` are the epoch's forget rows in order."""
        if self.steering is not None:
            self.steering.refresh(engine, forget, self.pad_id)

    def update(self, epoch: int, shown: dict[str, float]) -> None:
        """Moves the retain weight by a step's loss parts, which must be means over all ranks."""
        if "retain" in shown:
            self.weighting.update(epoch, shown["retain"])


class _Forward:
    """One forward pass of a batch, and the tensors that losses are called with, taken from it."""

    def __init__(
        self, trial_loss: TrialLoss, engine: Engine, rows: Sequence[TrainingRow], terms: Sequence[Term], length: int
    ) -> None:
        self.trial_loss, self.engine, self.rows = trial_loss, engine, rows
        self.batch = collate([row.tokens for row in rows], trial_loss.pad_id, engine.device, length)
        counts = {split: sum(row.split == split for row in rows) for split in SPLITS}
        starts = {"forget": 0, "alternative": counts["forget"], "retain": counts["forget"] + counts["alternative"]}
        self.spans = {split: slice(starts[split], starts[split] + counts[split]) for split in SPLITS}
        self.shown = self._positions(terms)
        self.logits, self.hidden = _forward(engine, self.batch, self.shown, self._layer)
        self.nothing = self.logits.sum() * 0.0  # reaches every parameter, so that none lacks a gradient
        self.targets = self.batch.ids[:, 1:][self.shown]
        losses = torch.nn.functional.cross_entropy(self.logits, self.targets, reduction="none")
        self.logps = scatter_tokens(-losses, self.shown)

    @property
    def _layer(self) -> str | None:
        return None if self.trial_loss.steering is None else self.trial_loss.steering.layer

    def _positions(self, terms: Sequence[Term]) -> Tensor:
        """[B,T-1] where logits are formed: the tokens that some term asks for."""
        shown = torch.zeros_like(self.batch.document)
        for term in terms:
            tensors = LOSSES[term.loss].tensors
            if "logits" in tensors or "logps" in tensors:
                span = self.spans[term.split]
                shown[span] |= self.batch.mask(term.on)[span]
            if "alt_logps" in tensors:
                span = self.spans["alternative"]
                shown[span] |= self.batch.mask(term.on)[span]
        return shown

    def value(self, term: Term) -> Tensor:
        """A term's loss, called with the tensors and options that its row of the table names."""
        loss, options = LOSSES[term.loss], self.trial_loss.config.options
        given: dict[str, Tensor] = {}
        if loss.needs_reference:
            given |= self._reference(term)
        tensors = [given[name] if name in given else self._tensor(name, term) for name in loss.tensors]
        # A repair step's cross-entropy may have options that are none of the method's.
        chosen = {name: options.get(key, OPTIONS[key].default) for name, key in loss.options.items()}
        value: Tensor = loss.compute(*tensors, **chosen)
        return value

    def _tensor(self, name: str, term: Term) -> Tensor:
        if name.startswith("alt_"):
            return self._of_rows(name.removeprefix("alt_"), "alternative", term.on)
        if name in ("logits", "targets"):
            return self._packed(getattr(self, name), term)
        if name == "noise":
            return torch.randn_like(self._packed(self.logits, term))
        if name == "hidden":
            return self.hidden[:, :-1][self.spans[term.split]][self._mask(term)]
        if name == "control":
            assert self.trial_loss.steering is not None
            tasks = [row.task for row in self.rows[self.spans[term.split]]]
            return self.trial_loss.steering.control(tasks).to(self.hidden)
        return self._of_rows(name, term.split, term.on)

    def _of_rows(self, name: str, split: str, on: str) -> Tensor:
        """[b, T-1] of a split's rows."""
        span = self.spans[split]
        if name == "mask":
            return self.batch.mask(on)[span]
        if name == "logps":
            return self.logps[span]
        found = torch.zeros(self.batch.document.shape, dtype=self.logps.dtype)
        for index, row in enumerate(self.rows):
            if row.reference is not None:
                found[index, : len(row.reference)] = row.reference
        return found[span].to(self.logps.device)

    def _mask(self, term: Term) -> Tensor:
        return self.batch.mask(term.on)[self.spans[term.split]]

    def _packed(self, values: Tensor, term: Term) -> Tensor:
        """The entries of `values`, which holds those of all shown tokens, that are of the term's."""
        span, before = self.spans[term.split], self.shown[: self.spans[term.split].start].sum()
        mine = self.shown[span]
        part = values[int(before) : int(before + mine.sum())]
        mask = self._mask(term)
        return part if torch.equal(mask, mine) else part[mask[mine]]

    def _reference(self, term: Term) -> dict[str, Tensor]:
        """The untrained model's logits and hidden states at the term's tokens."""
        span, mask = self.spans[term.split], self._mask(term)
        some = Batch(*(getattr(self.batch, name)[span] for name in ("ids", "attention", "answer", "document")))
        wants_logits = "ref_logits" in LOSSES[term.loss].tensors
        with self.trial_loss.trainable.reference(self.engine.module) as model:
            logits, hidden = _forward(model, some, mask if wants_logits else torch.zeros_like(mask), self._layer)
        return {"ref_logits": logits} if wants_logits else {"ref_hidden": hidden[:, :-1][mask]}

    def idle_reference(self) -> None:
        """A pass of the untrained model that only keeps the ranks' collectives matched."""
        with self.trial_loss.trainable.reference(self.engine.module) as model:
            _forward(model, self.batch, torch.zeros_like(self.batch.document), None)


def _forward(model: CausalLM | Engine, batch: Batch, shown: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Logits [N,V], float32 or finer, of the tokens after the shown positions [B,T-1]; a layer's output [B,T,H].

    The head sees the shown positions alone: for a row of which only the answer counts, most of its
    time and of the memory of its logits is saved.
    """
    inner = cast(CausalLM, getattr(model, "module", model))
    with head_at(inner, *shown.nonzero(as_tuple=True)), _output_of(inner, layer) as seen:
        logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits[0]
    return at_least_float32(logits), seen[0] if seen else logits.new_zeros(0)


@contextmanager
def _output_of(model: CausalLM, layer: str | None) -> Iterator[list[Tensor]]:
    """A list that the output of the module whose name ends in `layer` is put into."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    module = next(module for name, module in model.named_modules() if name == layer or name.endswith(f".{layer}"))

    def keep(module: object, inputs: object, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class _Steering:
    """RMU's control vectors: one random unit vector for each task, times a coefficient."""

    def __init__(self, config: TrialConfig, model: CausalLM, tasks: Sequence[str]) -> None:
        options = config.options
        self.layer = find_layer(model, options["rmu_layer"])
        self.scale, self.adaptive = options["rmu_coefficient"], options["rmu_adaptive"]
        self.batch_size = config.batch_size
        generator = torch.Generator().manual_seed(config.seed)
        size = model.config.hidden_size
        self.vectors = {task: control_vector(size, generator) for task in tasks}
        self.coefficients = dict.fromkeys(tasks, 0.0 if self.adaptive else self.scale)

    def control(self, tasks: Sequence[str]) -> Tensor:
        """[B,H] of the rows' tasks."""
        return torch.stack([self.coefficients[task] * self.vectors[task] for task in tasks])

    def refresh(self, engine: Engine, forget: Sequence[TrainingRow], pad_id: int) -> None:
        """Adaptive coefficients from the first batch of each task; every rank takes the same rows, so all agree."""
        for task in self.vectors if self.adaptive else ():
            rows = [row.tokens for row in forget if row.task == task][: self.batch_size]
            if rows:
                batch = collate(rows, pad_id, engine.device)
                with torch.no_grad():
                    _, hidden = _forward(engine, batch, torch.zeros_like(batch.document), self.layer)
                self.coefficients[task] = adaptive_coefficient(hidden[:, :-1][batch.document], self.scale)
