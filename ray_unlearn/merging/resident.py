"""Merging members into a resident model, without writing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.combine import Combiner
from ray_unlearn.merging.members import Source
from ray_unlearn.models.stored_tensors import StoredTensors
from ray_unlearn.protocols import CausalLM


class Merger:
    """A base model with its members; merges a recipe into the model's own parameters.

    The base's tensors that members touch are read again from the model's files, which the page cache
    holds once for all actors of a node; where the files do not hold them as they are (GGUF, no
    `path`), copies are kept in memory.
    """

    def __init__(self, model: CausalLM, members: Mapping[str, Source] | None = None, path: str | None = None) -> None:
        self.model = model
        self.combiner = Combiner(model)
        self._parameters = dict(model.named_parameters())
        self._stored = StoredTensors(Path(path)) if path is not None else None
        self._copies: dict[str, Tensor] = {}
        self._known: set[str] = set()
        self._changed: set[str] = set()
        for name, source in (members or {}).items():
            self.add(name, source)

    def add(self, name: str, source: Source) -> None:
        """Takes a member, a snapshot's files or a directory, and counts its magnitudes: what is the same for all
        candidates is done here."""
        self.restore()
        member = self.combiner.add(name, source)
        try:
            for touched in member.tensors:
                if touched not in self._known:
                    self._known.add(touched)
                    self._keep(touched)
                self.combiner.count(name, touched, self.combiner.delta(name, touched, self._base(touched).float()))
        except InputError:
            del self.combiner.members[name]
            raise

    def _keep(self, name: str) -> None:
        parameter = self._parameters[name].detach()
        stored = None if self._stored is None else self._stored.get(name)
        if stored is None or stored.shape != parameter.shape or not stored.to(parameter).equal(parameter):
            self._copies[name] = parameter.clone()
        # Loaded weights may be a private mapping of the file, whose pages are copied one fault at a time when written.
        self._parameters[name].data = parameter.clone()

    def _base(self, name: str) -> Tensor:
        if name in self._copies:
            return self._copies[name]
        assert self._stored is not None
        return self._stored[name].to(self._parameters[name])

    def merge(self, recipe: MergeRecipe) -> None:
        """Sets the model to base + merged delta. A tensor that a member does not touch is a delta of zeros."""
        touched = self.combiner.touched(recipe)
        self._restore(self._changed.difference(touched))
        with torch.no_grad():
            for name in touched:
                self._changed.add(name)
                self._parameters[name].copy_(self.combiner.weights(recipe, name, self._base(name)))

    def restore(self) -> None:
        """Sets the model back to the base."""
        self._restore(set(self._changed))

    def _restore(self, names: set[str]) -> None:
        with torch.no_grad():
            for name in sorted(names):
                self._parameters[name].copy_(self._base(name))
        self._changed -= names

    @contextmanager
    def merged(self, recipe: MergeRecipe) -> Iterator[Any]:
        """The merged model; the base is restored afterwards."""
        try:
            self.merge(recipe)
            yield self.model
        finally:
            self.restore()
