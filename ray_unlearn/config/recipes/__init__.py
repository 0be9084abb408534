"""Published configurations by name: a file each, every value with its source or marked unverified."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import unknown_name
from ray_unlearn.schema import from_dict, require

UNVERIFIED = "unverified"
SMALLEST_BATCH = 4
"""Rows below which a scaled batch does not go: steps on fewer take no less time."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The model and data that a configuration was made for, or is to be used on."""

    layers: int
    hidden: int
    rows: int
    """Forget rows."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete configuration of a published system: of one trial, or of a merge of other recipes' models."""

    name: str
    system: str
    model: Geometry
    config: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    """For a merge: members (recipe names), method, density, weights."""
    origin: dict[str, str] = field(default_factory=dict)
    """Key -> where its value stands, or `unverified`."""
    notes: str = ""
    """What could not be verified, and where this project's form differs."""

    @property
    def unverified(self) -> list[str]:
        """Keys whose values no source states."""
        return [key for key, origin in self.origin.items() if origin == UNVERIFIED]

    @property
    def source(self) -> str:
        """Where the values stand."""
        return "; ".join(dict.fromkeys(origin for origin in self.origin.values() if origin != UNVERIFIED))

    def trial(self) -> TrialConfig:
        """The recipe as a validated TrialConfig; raises InputError for a merge."""
        members = " and ".join(self.merge.get("members", ()))
        require(bool(self.config), f"the recipe {self.name} is a merge of {members}, no trial: train those.")
        return from_dict(TrialConfig, self.config, self.name)


def read_recipe(path: Path) -> Recipe:
    """A recipe's file: `sources` names where values stand, and each value comes with one of those names."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    sources = data["sources"] | {UNVERIFIED: UNVERIFIED}
    parts = {part: data.get(part, {}) for part in ("config", "merge")}
    stated = {key: pair for part in parts.values() for key, pair in part.items()}
    return Recipe(
        name=path.stem,
        system=data["system"],
        notes=data.get("notes", ""),
        model=Geometry(**data["model"]),
        origin={key: sources[origin] for key, (_, origin) in stated.items()},
        **{part: {key: value for key, (value, _) in values.items()} for part, values in parts.items()},
    )


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All shipped recipes by name."""
    return {path.stem: read_recipe(path) for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises InputError naming the known ones."""
    if name not in recipes():
        raise unknown_name("recipe", name, recipes())
    return recipes()[name]


def scaled(config: dict[str, Any], source: Geometry, target: Geometry) -> tuple[dict[str, object], list[str]]:
    """A recipe's configuration for a smaller or larger model and data set, and what was changed, a line each.

    Layer indices keep their relative depth. The learning rate goes with the inverse of the width (muP's rule for
    Adam: Yang et al. 2022, arXiv 2203.03466); that of adapters with the inverse of its root, since the products of
    A's and B's updates then keep their size (A random, B zero: Hayou et al. 2024, arXiv 2406.08447). The batch goes
    with the number of forget rows, so that an epoch keeps about its number of steps, but is not below
    SMALLEST_BATCH; micro-batches keep their number of rows, and chunks their number of steps.
    """
    new: dict[str, Any] = dict(config)

    def layer(index: int) -> int:
        return round(index * (target.layers - 1) / (source.layers - 1))

    if config.get("train_layers"):
        new["train_layers"] = sorted({layer(index) for index in config["train_layers"]})
    if isinstance(config.get("rmu_layer"), int):
        new["rmu_layer"] = layer(config["rmu_layer"])
    if config.get("last_layers"):
        new["last_layers"] = max(1, round(config["last_layers"] * target.layers / source.layers))
    power = 1.0 if config.get("tuning") == "full" else 0.5
    rate = config["learning_rate"] * (source.hidden / target.hidden) ** power
    new["learning_rate"] = float(f"{rate:.3g}") if target.hidden != source.hidden else config["learning_rate"]
    size = config["batch_size"]
    new["batch_size"] = max(min(SMALLEST_BATCH, size), round(size * target.rows / source.rows))
    for key in ("micro_batches", "chunk_size"):
        if key in config:
            new[key] = max(1, round(config[key] * new["batch_size"] / size))
    changed = [f"{key}: {config[key]} -> {new[key]}" for key in new if new[key] != config[key]]
    return new, changed
