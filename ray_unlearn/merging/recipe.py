"""The recipe that names a merge: all that decides it, checked, and resolved for each tensor."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast, get_type_hints

import torch
from torch import Tensor

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.merging.methods import MERGES, Settings, merge_options
from ray_unlearn.schema import checked, checked_value

Graded: TypeAlias = float | list[float]
"""A number, or anchors that are spread evenly over the layers, first to last, with straight lines between."""

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """All that decides a merge: applied to the same members it gives the same weights."""

    method: str = "ties"
    members: list[str] = field(default_factory=list)
    """Snapshot ids, adapter or model directories, or names of `merges`."""
    weights: list[Graded] = field(default_factory=list)
    densities: list[Graded] = field(default_factory=list)
    """Share of each member's delta entries that is kept within each tensor; by which rule, the method says."""
    lambda_: Graded = 1.0
    """Multiple of the merged delta that is added to the base."""
    normalize: bool | None = None
    """Divide by the weights that took part; None for the method's default."""
    rescale: bool | None = None
    """Restore each thinned-out delta's sum of magnitudes; None for the method's default."""
    options: dict[str, float] = field(default_factory=dict)
    """The method's own numbers; in files they stand beside the other keys. Defaults are filled in."""
    merges: dict[str, MergeRecipe] = field(default_factory=dict)
    """The recipes of those members that are merges themselves."""

    def __post_init__(self) -> None:
        if self.method not in MERGES:
            raise unknown_name("merge method", self.method, MERGES)
        method, count = MERGES[self.method], len(self.members)
        if count == 0:
            raise InputError("a merge needs at least one member, got none.")
        if count < method.fewest or (method.most is not None and count > method.most):
            bound = f"exactly {method.most}" if method.most == method.fewest else f"at least {method.fewest}"
            raise InputError(f"{self.method} takes {bound} members, got {count}: {self.members}.")
        for name, values in (("weights", self.weights), ("densities", self.densities)):
            if len(values) != count:
                raise InputError(f"a merge of {count} members needs {count} {name}, got {len(values)}: {values}.")
        for value in (*_anchors(self.weights), *_anchors([self.lambda_])):
            if not math.isfinite(value):
                raise InputError(f"weights and lambda must be finite, got {self.weights} and {self.lambda_}.")
        for density in _anchors(self.densities):
            if not 0 < density <= 1:
                raise InputError(f"a density must be above 0 and at most 1, got {density}.")
        self._check_weights()
        object.__setattr__(self, "options", self._checked_options())

    def _check_weights(self) -> None:
        """What a normalised merge divides by must be above 0 at every depth; lines between anchors keep it so."""
        method = MERGES[self.method]
        if not method.uses_weights:
            if len({json.dumps(weight) for weight in self.weights}) > 1:
                raise InputError(f"{self.method} uses no weights; give equal ones, got {self.weights}.")
            return
        normalized = method.normalize if self.normalize is None else self.normalize
        if not (method.weighted_mean or normalized):
            return
        for depth in self._depths():
            weights = [at_depth(weight, depth) for weight in self.weights]
            if sum(weights) <= 0:
                raise InputError(f"the weights of a {self.method} merge must sum to more than 0, got {self.weights}.")
            if method.weighted_mean and min(weights) < 0:
                raise InputError(f"the weights of a {self.method} merge must be at least 0, got {self.weights}.")

    def _checked_options(self) -> dict[str, float]:
        """The method's own numbers, checked, in its order, defaults filled in."""
        method = MERGES[self.method]
        for name in self.options:
            if name not in method.options:
                raise unknown_name(f"parameter of the merge method {self.method}", name, method.options)
        given = {name: self.options.get(name, row.default) for name, row in method.options.items()}
        options = {name: cast(float, checked(row, given[name], name)) for name, row in method.options.items()}
        if method.check is not None:
            for density in _anchors(self.densities):
                method.check(density, options)
        return options

    def _depths(self) -> list[float]:
        """The depths of all anchors."""
        lengths = {len(weight) for weight in self.weights if isinstance(weight, list)}
        return sorted({0.0, 1.0, *(i / (n - 1) for n in lengths if n > 1 for i in range(n))})

    def to_json(self) -> dict[str, object]:
        """As records and cards write it: lambda_ is `lambda` there, and options at their default are absent."""
        data: dict[str, object] = {
            "method": self.method,
            "members": list(self.members),
            "weights": [_copy(weight) for weight in self.weights],  # YAML would mark a list that stands twice
            "densities": [_copy(density) for density in self.densities],
            "lambda": self.lambda_,
        }
        switches = {"normalize": self.normalize, "rescale": self.rescale}
        data |= {name: value for name, value in switches.items() if value is not None}
        rows = MERGES[self.method].options
        data |= {name: value for name, value in self.options.items() if value != rows[name].default}
        if self.merges:
            data["merges"] = {name: recipe.to_json() for name, recipe in self.merges.items()}
        return data

    @classmethod
    def from_json(cls, data: object, where: str = "recipe") -> MergeRecipe:
        """The inverse of to_json; `where` is the path used in messages.

        Raises InputError for an unknown key, a wrong type, and a recipe within itself.
        """
        return _from_json(data, where, ())

    def leaves(self) -> list[str]:
        """The members that are no merges, of this recipe and of those within it, in order, each once."""
        found: list[str] = []
        for member in self.members:
            found += self.merges[member].leaves() if member in self.merges else [member]
        return list(dict.fromkeys(found))

    def at(self, depth: float) -> Settings:
        """The numbers for a tensor at a depth from 0 (first layer, and what is in no layer) to 1 (last layer)."""
        method = MERGES[self.method]
        return Settings(
            weights=[at_depth(weight, depth) for weight in self.weights],
            densities=[at_depth(density, depth) for density in self.densities],
            lambda_=at_depth(self.lambda_, depth),
            normalize=method.normalize if self.normalize is None else self.normalize,
            rescale=method.rescale if self.rescale is None else self.rescale,
            options=self.options,
        )

    def generator(self, digest: str, tensor: str) -> torch.Generator:
        """The generator of a member's random mask for one tensor, whatever the order of members and tensors."""
        text = f"{self.options.get('seed', 0)}\0{digest}\0{tensor}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def combine(
        self, deltas: Sequence[Tensor], base: Tensor | None = None, tensor: str = "", layers: int = 1
    ) -> Tensor:
        """The merged delta of one tensor; `deltas` in the order of the members. Merger does the same, with caches.

        Methods on the sphere need the base; random ones draw member i's mask from the digest `str(i)`.
        """
        method, settings = MERGES[self.method], self.at(depth_of(tensor, layers))
        kept = list(deltas)
        if method.sparsify is not None:
            kept = [
                method.sparsify(delta, density, settings, self.generator(str(place), tensor))
                for place, (delta, density) in enumerate(zip(deltas, settings.densities, strict=True))
            ]
        return method.consensus(torch.zeros_like(kept[0]) if base is None else base, kept, settings)


KEYS = {"lambda" if name == "lambda_" else name: hint for name, hint in get_type_hints(MergeRecipe).items()}
"""Keys of a recipe in a file, with their types; the methods' own numbers stand beside them."""
del KEYS["options"]


def _from_json(data: object, where: str, around: tuple[int, ...]) -> MergeRecipe:
    if not isinstance(data, dict):
        raise InputError(f"{where} must be a mapping of keys to values, got {data!r:.60}.")
    if id(data) in around:  # YAML's aliases can do that
        raise InputError(f"{where} contains itself.")
    rows = merge_options()
    method = data.get("method", MergeRecipe.method)
    own = MERGES[method].options if isinstance(method, str) and method in MERGES else {}
    values: dict[str, Any] = {}
    options: dict[str, float] = {}
    for key, value in data.items():
        if key in rows:
            number = checked(own.get(key, rows[key]), value, f"{where}: {key}")
            if key in own:  # one that the method does not read decides nothing
                options[key] = cast(float, number)
        elif key not in KEYS:
            raise unknown_name(f"key in {where}", key, [*KEYS, *rows])
        elif key != "merges":
            values["lambda_" if key == "lambda" else key] = checked_value(KEYS[key], value, f"{where}: {key}")
    nested = data.get("merges", {})
    if not isinstance(nested, dict):
        raise InputError(f"{where}: merges must map names to recipes, got {nested!r:.60}.")
    inner = (*around, id(data))
    merges = {str(name): _from_json(recipe, f"{where}: merges.{name}", inner) for name, recipe in nested.items()}
    return MergeRecipe(**values, options=options, merges=merges)


def at_depth(value: Graded, depth: float) -> float:
    """A graded number at a depth between 0 and 1, as mergekit interpolates lists."""
    if not isinstance(value, list):
        return float(value)
    place = depth * (len(value) - 1)
    lower = int(place)
    upper = min(len(value) - 1, lower + 1)
    return (1 - (place - lower)) * value[lower] + (place - lower) * value[upper]


def depth_of(tensor: str, layers: int) -> float:
    """Where a tensor lies: 0 in the first layer and outside of all layers, 1 in the last, as mergekit has it."""
    found = LAYER.search(tensor)
    if found is None:
        return 0.0
    return int(found[1]) / (layers - 1) if layers > 1 else 1.0


def _copy(value: Graded) -> Graded:
    return list(value) if isinstance(value, list) else value


def _anchors(values: Sequence[Graded]) -> list[float]:
    found: list[float] = []
    for value in values:
        if isinstance(value, list) and not value:
            raise InputError("a gradient over depth needs at least one anchor, got [].")
        found += value if isinstance(value, list) else [value]
    return found
