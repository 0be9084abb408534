"""Finished units of evaluations on disk, under a digest of all that decides them; a killed evaluation resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import WorkUnit
from ray_unlearn.files import versions, write_json
from ray_unlearn.schema import digest

LIBRARIES = ("ray-unlearn", "torch", "transformers")


def evaluation_digest(weights: Sequence[str | None], dtype: str, data: EvalSet, settings: EvalSettings) -> str:
    """What an evaluation's results depend on: weights, precision, data, settings, and the libraries' versions."""
    asked = {key: value for key, value in dataclasses.asdict(settings).items() if key != "metrics"}  # not kept here
    libraries = {name: version for name, version in versions().items() if name in LIBRARIES}
    return digest([list(weights), dtype, dataclasses.asdict(data), asked, libraries])


class FinishedUnits:
    """One evaluation's folder: a file for each finished unit, written whole or not at all."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def load(self, units: Sequence[WorkUnit]) -> dict[int, list[object]]:
        """Results of the units that were finished before, by index. A file that is not whole is none."""
        found: dict[int, list[object]] = {}
        for index, unit in enumerate(units):
            place = self._place(index)
            if place is None or not place.exists():
                continue
            try:
                kept = json.loads(place.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if kept["part"] == unit.part and kept["rows"] == list(unit.rows):
                found[index] = kept["results"]
        return found

    def save(self, index: int, unit: WorkUnit, results: list[object]) -> None:
        """Keeps a unit's results."""
        place = self._place(index)
        if place is not None:
            write_json(place, {"part": unit.part, "rows": list(unit.rows), "results": results})

    def _place(self, index: int) -> Path | None:
        return None if self.directory is None else self.directory / f"unit-{index:04d}.json"
