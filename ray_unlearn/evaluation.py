"""One model's evaluation from its files: what was finished before is read, the rest computed here or on Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_unlearn.generation import check_prompts
from ray_unlearn.models import load_model, load_tokenizer
from ray_unlearn.score_cache import FinishedUnits, evaluation_digest, weights_digest
from ray_unlearn.scoring import EvalSet, EvalSettings, Measured, Unit, compute, describe, plan

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model by its path, and what it is scored on."""

    model: str
    adapter: str | None
    dtype: str
    data: EvalSet
    settings: EvalSettings

    def measure(
        self, workers: int, gpus_per_worker: float, address: str | None, cache: str | Path | None, log: Log
    ) -> Measured:
        """What the model says, loses and chooses, computed by so many workers; units found in `cache` are not."""
        units = plan(self.data, self.settings)
        finished = FinishedUnits(self._folder(cache, log))
        results = finished.load(units)
        missing = [index for index in range(len(units)) if index not in results]
        log(f"evaluating {describe(self.data)}: {len(missing)} of {len(units)} parts to compute")
        if missing:
            computed = (
                self._here(units, missing, log)
                if workers == 1
                else self._on_actors(units, missing, workers, gpus_per_worker, address, log)
            )
            for done, (index, found) in enumerate(computed, start=1):
                results[index] = found
                finished.save(index, units[index], found)
                log(f"{units[index].part}: part {done} of {len(missing)} done")
        return Measured.of(units, [results[index] for index in range(len(units))])

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

    def _here(self, units: Sequence[Unit], missing: Sequence[int], log: Log) -> Iterator[tuple[int, list[Any]]]:
        scorer = Scorer(self.model, self.adapter, self.dtype, self.data, self.settings, device(), log)
        for index in missing:
            yield index, scorer.compute(units[index])

    def _on_actors(
        self,
        units: Sequence[Unit],
        missing: Sequence[int],
        workers: int,
        gpus_per_worker: float,
        address: str | None,
        log: Log,
    ) -> Iterator[tuple[int, list[Any]]]:
        from ray_unlearn.cluster import cluster
        from ray_unlearn.job import ResourcesPart

        workers = min(workers, len(missing))
        resources = ResourcesPart(workers=workers, gpus_per_worker=gpus_per_worker, dashboard=False)
        with cluster(address, resources) as started_here:
            from ray_unlearn.workbench import computed_by_actors

            log(f"{workers} workers")
            yield from computed_by_actors(self, units, missing, resources, started_here, log)


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

    def compute(self, unit: Unit) -> list[Any]:
        """The unit's results."""
        return compute(unit, self.model, self.tokenizer, self.data, self.settings)


def device() -> str:
    """Where a model is put in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
