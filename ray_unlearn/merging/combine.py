"""Tensor by tensor from members and a recipe to merged weights: what the resident merge and the written one share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging.factors import SHARED_START, Factors, shared_start, ties_factors
from ray_unlearn.merging.members import Member, Source
from ray_unlearn.merging.methods import MERGES, Settings
from ray_unlearn.merging.recipe import LAYER, MergeRecipe, depth_of
from ray_unlearn.merging.sparsify import (
    BINS,
    Cut,
    Magnitudes,
    apply_cut,
    count_magnitudes,
    find_cut,
    keep_count,
    rescaled,
)
from ray_unlearn.protocols import CausalLM

HISTOGRAMS_IN_BLOCK = 128


@dataclass(frozen=True)
class Change:
    """What makes a delivered model of a base: which parameters, and their weights from the untouched ones."""

    touched: Collection[str]
    weights: Callable[[str, Tensor], Tensor]


def merge_change(base: CausalLM, recipe: MergeRecipe, members: Mapping[str, Source]) -> Change:
    """The change that a merge of members, by name, is; weights are bit for bit those that Merger sets."""
    combiner = Combiner(base)
    for name in recipe.leaves():
        combiner.add(name, members[name])
    return Change(combiner.touched(recipe), lambda name, tensor: combiner.weights(recipe, name, tensor))


def member_change(base: CausalLM, name: str, source: Source) -> Change:
    """The change that a member alone is: its own tensors as they are, or an adapter's delta added."""
    member = Member.of(source, base, name)
    return Change(list(member.tensors), member.weights)


class Combiner:
    """Merges members tensor by tensor.

    Where a density cuts a tensor does not depend on the other members: each tensor's magnitudes are counted once, and
    a cut is found once for each density.
    """

    def __init__(self, base: CausalLM) -> None:
        self.base = base
        self.members: dict[str, Member] = {}
        layers = [int(found[1]) for name, _ in base.named_parameters() if (found := LAYER.search(name))]
        self.layers = max(layers, default=0) + 1
        self._blocks: list[Tensor] = []
        self._used = 0
        self._magnitudes: dict[tuple[str, str], Magnitudes] = {}
        self._cuts: dict[tuple[str, str, int], Cut] = {}
        self._checked: set[str] = set()
        self._finite: set[tuple[str, str]] = set()

    def add(self, name: str, source: Source) -> Member:
        """Takes a member; raises InputError for one of another base."""
        if name in self.members:  # another member under an old name
            self._magnitudes.clear()
            self._blocks.clear()
            self._cuts.clear()
            self._finite.clear()
        self.members[name] = Member.of(source, self.base, name)
        return self.members[name]

    def touched(self, recipe: MergeRecipe) -> list[str]:
        """The parameters that some member changes, in order of their names."""
        return sorted({key for member in recipe.leaves() for key in self.members[member].tensors})

    def weights(self, recipe: MergeRecipe, name: str, base: Tensor) -> Tensor:
        """The merged weights of one parameter, in the type of its untouched ones; what lies between is float32."""
        exact = base.float()
        return self.merged(recipe, name, exact).add_(exact).to(base.dtype)

    def merged(self, recipe: MergeRecipe, name: str, base: Tensor) -> Tensor:
        """The merged delta of one parameter; `base` are its untouched weights in float32.

        Raises InputError where a member or the result holds NaN or infinity.
        """
        method, settings = MERGES[recipe.method], recipe.at(depth_of(name, self.layers))
        if method.on_factors:
            result = self.merged_factors(recipe, name, settings).dense().to(base.device)
        else:
            parts = [self._thinned(recipe, place, settings, name, base) for place in range(len(recipe.members))]
            result = method.consensus(base, parts, settings)
        if not finite(result):
            raise InputError(
                f"the {recipe.method} merge of {recipe.members} gives NaN or infinity in {name}: its numbers are too "
                f"large (weights {recipe.weights}, lambda {recipe.lambda_})."
            )
        return result

    def merged_factors(self, recipe: MergeRecipe, name: str, settings: Settings | None = None) -> Factors:
        """The LoRA that TIES on factors makes of those members that touch a parameter."""
        settings = settings or recipe.at(depth_of(name, self.layers))
        self.check_factors(recipe)
        having = [place for place, member in enumerate(recipe.members) if name in self.members[member].tensors]
        factors = [cast(Factors, self.members[recipe.members[place]].tensors[name]) for place in having]
        weights, densities = ([values[p] for p in having] for values in (settings.weights, settings.densities))
        return ties_factors(factors, weights, densities, settings.lambda_)

    def check_factors(self, recipe: MergeRecipe) -> None:
        """Refuses members that are no adapters; warns, once for each recipe, where their A have no common start."""
        key = json.dumps(recipe.members)
        if key in self._checked:
            return
        sides: list[dict[str, Tensor]] = []
        for name in recipe.members:
            entries = self.members[name].tensors if name in self.members else {}
            sides.append({key: entry.a for key, entry in entries.items() if isinstance(entry, Factors)})
            if not entries or len(sides[-1]) < len(entries):
                raise InputError(f"{recipe.method} merges LoRA's factors, and {name} is no adapter; use ties.")
        first = sides[0]
        for name, side in zip(recipe.members[1:], sides[1:], strict=True):
            common = [key for key in first if key in side]
            likeness = shared_start([first[key] for key in common], [side[key] for key in common])
            if likeness < SHARED_START:
                warnings.warn(
                    f"the A matrices of {recipe.members[0]} and {name} do not share an initialisation (mean cosine "
                    f"{likeness:.2f}): the signs that {recipe.method} elects on them mean nothing. Use ties on deltas.",
                    stacklevel=2,
                )
        self._checked.add(key)

    def delta(self, member: str, name: str, base: Tensor) -> Tensor:
        """A member's delta of one parameter; raises InputError, naming both, where it holds NaN or infinity."""
        delta = self.members[member].delta(name, base)
        if (member, name) not in self._finite:
            if not finite(delta):
                whose = member if finite(base) else "the base"
                raise InputError(f"{whose} holds NaN or infinity in {name}; it cannot be merged.")
            self._finite.add((member, name))
        return delta

    def _delta(self, recipe: MergeRecipe, member: str, name: str, base: Tensor) -> Tensor:
        """A member's delta; of a merge, what its written weights would differ by."""
        nested = recipe.merges.get(member)
        if nested is None:
            return self.delta(member, name, base)
        if not any(name in self.members[leaf].tensors for leaf in nested.leaves()):
            return base.new_zeros(base.shape)
        return self.merged(nested, name, base).add_(base).sub_(base)

    def _thinned(self, recipe: MergeRecipe, place: int, settings: Settings, name: str, base: Tensor) -> Tensor:
        member, density = recipe.members[place], settings.densities[place]
        delta, method = self._delta(recipe, member, name, base), MERGES[recipe.method]
        if method.sparsify is None:
            return delta
        if method.trims:
            whole = delta.clone() if settings.rescale else delta
            kept = self._trim(self._key(recipe, member), name, delta, density)
            return rescaled(kept, whole) if settings.rescale else kept
        generator = recipe.generator(self.digest(recipe, member), name)
        on_host = delta.cpu() if method.random else delta  # one seed, one mask, whatever the device
        return method.sparsify(on_host, density, settings, generator).to(delta.device)

    def _trim(self, key: str, name: str, delta: Tensor, density: float) -> Tensor:
        """`sparsify.trim` in place, with what depends on this member, tensor and density alone found once."""
        count = delta.numel()
        keep = keep_count(count, density)
        if keep >= count:
            return delta
        if (key, name, keep) not in self._cuts:
            if (key, name) not in self._magnitudes:
                self.count(key, name, delta)
            self._cuts[key, name, keep] = find_cut(delta, keep, self._magnitudes[key, name])
        return apply_cut(delta, self._cuts[key, name, keep], out=delta)

    def count(self, key: str, name: str, delta: Tensor) -> None:
        """Counts the magnitudes of a member's delta of one tensor, for all cuts to come."""
        self._magnitudes[key, name] = self._kept(count_magnitudes(delta))

    def _kept(self, found: Magnitudes) -> Magnitudes:
        """A histogram among others in one large block: many small ones between a merge's large tensors would leave
        the allocator with holes that nothing fits into."""
        size = len(found.above)
        if not self._blocks or self._used + size > len(self._blocks[-1]):
            self._blocks.append(torch.empty(HISTOGRAMS_IN_BLOCK * BINS, dtype=torch.int64))
            self._used = 0
        place = self._blocks[-1][self._used : self._used + size].copy_(found.above)
        self._used += size
        return Magnitudes(found.first, place)

    @staticmethod
    def _key(recipe: MergeRecipe, member: str) -> str:
        nested = recipe.merges.get(member)
        return member if nested is None else json.dumps(nested.to_json())

    def digest(self, recipe: MergeRecipe, member: str) -> str:
        """What decides a member: its files' content, or a merge's numbers and its members' content."""
        nested = recipe.merges.get(member)
        if nested is None:
            return self.members[member].digest
        inner = [self.digest(nested, name) for name in nested.members]
        numbers = dataclasses.replace(nested, members=inner, merges={}).to_json()
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def finite(tensor: Tensor) -> bool:
    """Whether all entries are numbers; a finite sum says so at once."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
