"""One model's evaluation from its files: what was finished before is read, the rest computed here or on Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, TypeVar

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.evaluation.cache import FinishedUnits, evaluation_digest
from ray_unlearn.evaluation.checks import check_prompts
from ray_unlearn.evaluation.scoring import ModelOutputs, describe
from ray_unlearn.evaluation.signals import RowWork
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import WorkUnit, compute, split_work
from ray_unlearn.files import weights_digest
from ray_unlearn.models.forward import context_of
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.protocols import Log
from ray_unlearn.records import Scores

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model by its path, and what it is scored on."""

    model: str
    adapter: str | None
    dtype: str
    data: EvalSet
    settings: EvalSettings

    @property
    def key(self) -> tuple[str, str | None]:
        """Which model it is."""
        return self.model, self.adapter


class Scorer:
    """An evaluation's model, loaded."""

    def __init__(self, evaluation: Evaluation, device: str, log: Log = lambda line: None) -> None:
        e = self.evaluation = evaluation
        self.model = load_model(e.model, e.dtype, e.adapter).to(device)
        self.tokenizer = load_tokenizer(e.model)
        rows = [*e.data.forget, *e.data.retain]
        for line in check_prompts(context_of(self.model), self.tokenizer, rows, e.settings.max_new_tokens):
            log(line)

    def compute(self, unit: WorkUnit) -> list[object]:
        """The unit's results."""
        return compute(unit, self.model, self.tokenizer, self.evaluation.data, self.evaluation.settings)


class Workers(Protocol):
    """Who computes: this process or Ray actors. They load a model when it is first asked for, and keep it."""

    def compute(
        self, evaluation: Evaluation, work: Callable[[Scorer, S], list[R]], shares: Sequence[S]
    ) -> Iterator[tuple[int, list[R]]]:
        """(place, what the work makes of that share) of each share, as they are done. The work can be pickled."""


class ThisProcess:
    """Workers of one process: this one."""

    def __init__(self, log: Log = lambda line: None) -> None:
        self.log, self.scorers = log, dict[tuple[str, str | None], Scorer]()

    def compute(
        self, evaluation: Evaluation, work: Callable[[Scorer, S], list[R]], shares: Sequence[S]
    ) -> Iterator[tuple[int, list[R]]]:
        """One share after another."""
        for place, share in enumerate(shares):
            if evaluation.key not in self.scorers:
                self.scorers[evaluation.key] = Scorer(evaluation, device(), self.log)
            yield place, work(self.scorers[evaluation.key], share)


def device() -> str:
    """Where a model is put in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Evaluated:
    """An evaluation that workers compute, each part when it is first asked for: a Subject of metrics.

    Finished parts of the outputs are kept under `cache`, and not computed again.
    """

    def __init__(
        self, evaluation: Evaluation, workers: Workers, cache: str | Path | None = None, log: Log = lambda line: None
    ) -> None:
        self.evaluation, self.workers, self.cache, self.log = evaluation, workers, cache, log

    @cached_property
    def outputs(self) -> ModelOutputs:
        """What the model says, loses and chooses."""
        data, settings = self.evaluation.data, self.evaluation.settings
        units = split_work(data, settings)
        finished = FinishedUnits(self._folder())
        results = finished.load(units)
        missing = [index for index in range(len(units)) if index not in results]
        self.log(f"evaluating {describe(data)}: {len(missing)} of {len(units)} parts to compute")
        shares = [units[index] for index in missing]
        for done, (place, found) in enumerate(self.workers.compute(self.evaluation, Scorer.compute, shares), start=1):
            index = missing[place]
            results[index] = found
            finished.save(index, units[index], found)
            self.log(f"{units[index].part}: part {done} of {len(missing)} done")
        return ModelOutputs.of(units, [results[index] for index in range(len(units))])

    @property
    def texts(self) -> list[str]:
        """The generations for the forget rows, then the retain rows."""
        return self.outputs.texts

    @cached_property
    def scores(self) -> Scores:
        """What was measured, as Scores."""
        return self.outputs.scores(self.evaluation.data, self.evaluation.settings, self.evaluation.dtype)

    def compute(self, work: RowWork[R], shares: Sequence[Sequence[Encoded]]) -> list[list[R]]:
        """What the work makes of each share of rows with this model."""
        found = dict(self.workers.compute(self.evaluation, partial(_with_model, work), shares))
        return [found[place] for place in range(len(shares))]

    def of(self, model: str) -> Evaluated:
        """The same evaluation of another whole model, by the same workers."""
        return Evaluated(replace(self.evaluation, model=model, adapter=None), self.workers, self.cache, self.log)

    def _folder(self) -> Path | None:
        e = self.evaluation
        if self.cache is None:
            return None
        paths = [e.model] + ([e.adapter] if e.adapter else [])
        weights = [weights_digest(path) for path in paths]
        if None in weights:
            self.log(f"{paths[weights.index(None)]} is no local model: its scores are not cached")
            return None
        return Path(self.cache).expanduser() / evaluation_digest(weights, e.dtype, e.data, e.settings)


def _with_model(work: RowWork[R], scorer: Scorer, rows: Sequence[Encoded]) -> list[R]:
    return work(scorer.model, rows)
