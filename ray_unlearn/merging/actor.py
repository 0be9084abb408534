"""Merging members into a resident model and scoring the result, without writing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_unlearn.merging import MergeRecipe
from ray_unlearn.records import Scores
from ray_unlearn.scoring import evaluate_model
from ray_unlearn.tuning import Delta, deltas, dense
from ray_unlearn.workbench import open_bench, ray_device


class Merger:
    """A base model with its members' deltas; merges a recipe into the model's own parameters."""

    def __init__(self, bench: Any, members: Mapping[str, dict[str, bytes]] | None = None) -> None:
        self.bench = bench
        self.members: dict[str, dict[str, Delta]] = {}
        self._parameters = dict(bench.model.named_parameters())
        self._base: dict[str, Tensor] = {}
        for name, files in (members or {}).items():
            self.add(name, files)

    def add(self, name: str, files: dict[str, bytes]) -> None:
        """Takes a member: a snapshot's files. Only the tensors that some member touches are kept twice."""
        self.restore()
        self.members[name] = deltas(files, self.bench.model, name)
        for touched in self.members[name]:
            if touched not in self._base:
                self._base[touched] = self._parameters[touched].detach().clone()

    def merge(self, recipe: MergeRecipe) -> None:
        """Sets the model to base + merged delta. A tensor that a member does not touch is a delta of zeros."""
        self.restore()
        touched = sorted({name for member in recipe.members for name in self.members[member]})
        with torch.no_grad():
            for name in touched:
                base = self._base[name].float()
                parts = [self._delta(member, name, base) for member in recipe.members]
                self._parameters[name].copy_(base + recipe.combine(parts))

    def _delta(self, member: str, name: str, base: Tensor) -> Tensor:
        """What a merge of full checkpoints would see: (base + delta) - base, rounding included, so that both agree."""
        delta = self.members[member].get(name)
        if delta is None:
            return torch.zeros_like(base)
        return (base + dense(delta).to(base.device)) - base

    def restore(self) -> None:
        """Sets the model back to the base."""
        with torch.no_grad():
            for name, tensor in self._base.items():
                self._parameters[name].copy_(tensor)

    def score(self, recipe: MergeRecipe) -> Scores:
        """Merges and scores as a trial scores a snapshot, then restores the base."""
        try:
            self.merge(recipe)
            return self.score_model()
        finally:
            self.restore()

    def score_model(self) -> Scores:
        """Scores of the model as it stands, on the bench's data."""
        bench = self.bench
        return evaluate_model(bench.model, bench.tokenizer, bench.eval_set, bench.eval_settings)[0]


class MergeActor:
    """A Merger in a Ray actor: base and members are loaded once, then one recipe after another."""

    def __init__(self) -> None:
        self.merger: Merger | None = None

    def score(self, recipe: MergeRecipe, inputs: list[Any], threads: int) -> Scores:
        """The scores of a recipe's merge. `inputs` are Ray references to a BenchSpec and to the members' files by name.

        They come with every call, so that an actor that was started again loads them anew.
        """
        if self.merger is None:
            import ray

            spec, members = ray.get(inputs)
            self.merger = Merger(open_bench(spec, ray_device(threads)), members)
        return self.merger.score(recipe)
