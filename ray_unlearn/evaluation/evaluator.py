"""One model's evaluation from its files: what was finished before is read, the rest computed here or on Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray_unlearn.evaluation.cache import FinishedUnits, evaluation_digest
from ray_unlearn.evaluation.generation import check_prompts
from ray_unlearn.evaluation.metric_suite import DIFFERENCES, Work, more_metrics
from ray_unlearn.evaluation.scoring import ModelOutputs, describe
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import WorkUnit, compute, split_work
from ray_unlearn.files import weights_digest
from ray_unlearn.metrics import METRICS
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.records import Scores

Log = Callable[[str], None]


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

    def measure(self, each: Each, cache: str | Path | None, log: Log) -> ModelOutputs:
        """What the model says, loses and chooses; units found in `cache` are not computed again."""
        units = split_work(self.data, self.settings)
        finished = FinishedUnits(self._folder(cache, log))
        results = finished.load(units)
        missing = [index for index in range(len(units)) if index not in results]
        log(f"evaluating {describe(self.data)}: {len(missing)} of {len(units)} parts to compute")
        calls = [partial(Scorer.compute, unit=units[index]) for index in missing]
        for done, (place, found) in enumerate(each(self, calls), start=1):
            index = missing[place]
            results[index] = found
            finished.save(index, units[index], found)
            log(f"{units[index].part}: part {done} of {len(missing)} done")
        return ModelOutputs.of(units, [results[index] for index in range(len(units))])

    def more(
        self,
        names: Sequence[str],
        texts: Sequence[str],
        scores: Scores,
        reference: str | None,
        each: Each,
        cache: str | Path | None,
        log: Log,
    ) -> dict[str, Any]:
        """Further metrics by name of a model with these generations and scores, the work shared out as `measure` does.

        `reference` is the path of a model trained without the forget set. Where texts or scores are compared it is
        evaluated like this one.
        """
        other = None if reference is None else replace(self, model=reference, adapter=None)
        theirs = None
        if other is not None and any(METRICS[name].family == "generation" or name == DIFFERENCES for name in names):
            theirs = other.measure(each, cache, log)

        def spread(work: Work, evaluation: Evaluation, shares: Sequence[Sequence[Any]]) -> list[list[Any]]:
            calls = [partial(Scorer.work, work=work, rows=share) for share in shares]
            found = dict(each(evaluation, calls))
            return [found[place] for place in range(len(calls))]

        return more_metrics(
            names,
            self,
            load_tokenizer(self.model),
            self.data,
            texts=texts,
            scores=scores,
            reference=other,
            reference_texts=None if theirs is None else theirs.texts,
            reference_scores=None if theirs is None else self.scores(theirs),
            batch_size=self.settings.batch_size,
            spread=spread,
            log=log,
        )

    def scores(self, measured: ModelOutputs) -> Scores:
        """What was measured, as Scores."""
        return measured.scores(self.data, self.settings, self.dtype)

    def _folder(self, cache: str | Path | None, log: Log) -> Path | None:
        if cache is None:
            return None
        paths = [self.model] + ([self.adapter] if self.adapter else [])
        weights = [weights_digest(path) for path in paths]
        if None in weights:
            log(f"{paths[weights.index(None)]} is no local model: its scores are not cached")
            return None
        name = evaluation_digest(weights, self.dtype, self.data, self.settings)
        return Path(cache).expanduser() / name


class Scorer:
    """A loaded model that computes one unit after another."""

    def __init__(
        self,
        model: str,
        adapter: str | None,
        dtype: str,
        data: EvalSet,
        settings: EvalSettings,
        device: str,
        log: Log = lambda line: None,
    ) -> None:
        self.model = load_model(model, dtype, adapter).to(device)
        self.tokenizer = load_tokenizer(model)
        self.data, self.settings = data, settings
        rows = [*data.forget, *data.retain]
        for line in check_prompts(self.model, self.tokenizer, rows, settings.max_new_tokens):
            log(line)

    def compute(self, unit: WorkUnit) -> list[Any]:
        """The unit's results."""
        return compute(unit, self.model, self.tokenizer, self.data, self.settings)

    def work(self, work: Work, rows: Sequence[Any]) -> list[Any]:
        """What `work` makes of rows with this model."""
        return work(self.model, rows)


Each = Callable[[Evaluation, Sequence[Callable[[Scorer], list[Any]]]], Iterator[tuple[int, list[Any]]]]
"""(evaluation, calls) -> (place, result) of each call of the evaluation's Scorer, as they are done. Calls can be
pickled."""


class _Here:
    """Scorers of this process, each loaded once."""

    def __init__(self, log: Log) -> None:
        self.log, self.scorers = log, dict[tuple[str, str | None], Scorer]()

    def __call__(self, evaluation: Evaluation, calls: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
        e = evaluation
        for place, call in enumerate(calls):
            if e.key not in self.scorers:
                self.scorers[e.key] = Scorer(e.model, e.adapter, e.dtype, e.data, e.settings, device(), self.log)
            yield place, call(self.scorers[e.key])


def device() -> str:
    """Where a model is put in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
