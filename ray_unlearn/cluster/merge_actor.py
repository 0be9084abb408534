"""Merge candidates on Ray actors: base and members are loaded once, then merged and scored one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import ray

from ray_unlearn.cluster.evaluators import ray_device
from ray_unlearn.cluster.model_transfer import WorkerSpec, open_worker_state
from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.evaluation.scoring import score_model
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.resident import Merger
from ray_unlearn.models.snapshot_files import read_snapshot
from ray_unlearn.records import Scores

if TYPE_CHECKING:
    from ray import ObjectRef

    from ray_unlearn.models.snapshot_files import Files
    from ray_unlearn.training.worker import WorkerState


class MergeActor:
    """A Merger in a Ray actor: the base is loaded once, a member when a recipe first has it."""

    def __init__(self) -> None:
        self.state: WorkerState | None = None
        self.merger: Merger | None = None

    def score(
        self, recipe: MergeRecipe, base: list[ObjectRef[WorkerSpec]], members: dict[str, ObjectRef[Files]], threads: int
    ) -> Scores:
        """The scores of a recipe's merge. `base`: a Ray reference to a WorkerSpec; `members`: one to the files of each
        of the recipe's snapshots.

        They come with every call, so that an actor that was started again loads them anew. Files that
        come as arrays stay where they are, in the node's shared memory.
        """
        if self.merger is None or self.state is None:
            (spec,) = ray.get(base)
            self.state = open_worker_state(spec, ray_device(threads))
            self.merger = Merger(self.state.model, path=spec.model.local())
        for name, files in members.items():
            if name not in self.merger.combiner.members:
                self.merger.add(name, ray.get(files))
        with self.merger.merged(recipe) as model:
            return score_model(model, self.state.tokenizer, self.state.eval_set, self.state.eval_settings)


@dataclass(frozen=True)
class _Running:
    name: str
    actor: Any
    since: float


class MergePool:
    """Merge actors that share a base and its snapshots; each works on one recipe at a time."""

    def __init__(
        self, spec: WorkerSpec, snapshots: Mapping[str, Path], resources: ResourcesPart, size: int,
        timeout: float | None,
    ) -> None:  # fmt: skip
        """`snapshots`: folders by name; one is read when a recipe first has it. `timeout`: seconds after which an actor
        without result is ended and its recipe has failed, None for never."""
        self._base = [ray.put(spec)]
        self._snapshots, self.timeout = snapshots, timeout
        self._members: dict[str, ObjectRef[Files]] = {}
        self._threads = max(1, int(resources.cpus_per_worker))
        self._remote = ray.remote(MergeActor).options(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=1,  # a recipe that kills its actor twice is a failed merge, not the end of the others
        )
        self._free: list[Any] = [self._remote.remote() for _ in range(size)]
        self._running: dict[ObjectRef[Scores], _Running] = {}

    @property
    def free(self) -> bool:
        """Whether an actor waits for a recipe."""
        return bool(self._free)

    def start(self, name: str, recipe: MergeRecipe) -> None:
        """Gives a free actor a recipe, under a name by which its outcome is known.

        Raises InputError where a snapshot is not what was written.
        """
        members = {member: self._member(member) for member in recipe.leaves()}
        actor = self._free.pop(0)
        task = actor.score.remote(recipe, self._base, members, self._threads)
        self._running[task] = _Running(name, actor, time.monotonic())

    def _member(self, name: str) -> ObjectRef[Files]:
        """A reference to a snapshot's files: as arrays, which Ray keeps once for all actors of a node."""
        if name not in self._members:
            files = read_snapshot(self._snapshots[name])
            arrays = {file: np.frombuffer(memoryview(data), np.uint8) for file, data in files.items()}
            self._members[name] = ray.put(cast("Files", arrays))
        return self._members[name]

    def wait(self) -> tuple[str, Scores | None, str]:
        """Waits for one of those that were started: its name, its scores or None, and the reason where it failed."""
        oldest = min(self._running, key=lambda task: self._running[task].since)
        left = None
        if self.timeout is not None:
            left = max(0.0, self._running[oldest].since + self.timeout - time.monotonic())
        done, _ = ray.wait(list(self._running), num_returns=1, timeout=left)
        if not done:
            hung = self._running.pop(oldest)
            ray.kill(hung.actor)
            self._free.append(self._remote.remote())
            return hung.name, None, f"no result after {self.timeout:g} s (merge.timeout); its actor was replaced"
        ended = self._running.pop(done[0])
        self._free.append(ended.actor)
        try:
            return ended.name, ray.get(done[0]), ""
        except ray.exceptions.RayError as error:
            return ended.name, None, str(error).strip().splitlines()[-1]

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*self._free, *(running.actor for running in self._running.values())]:
            ray.kill(actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
