"""Merge candidates on Ray actors: base and members are loaded once, then merged and scored one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from ray_unlearn.cluster.evaluators import ray_device
from ray_unlearn.cluster.model_transfer import WorkerSpec, open_worker_state
from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.evaluation.scoring import score_model
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.resident import Merger
from ray_unlearn.models.snapshot_files import Files
from ray_unlearn.records import Scores


class MergeActor:
    """A Merger in a Ray actor: base and members are loaded once, then one recipe after another."""

    def __init__(self) -> None:
        self.state: Any = None
        self.merger: Merger | None = None

    def score(self, recipe: MergeRecipe, inputs: list[Any], threads: int) -> Scores:
        """The scores of a recipe's merge. `inputs`: Ray references to a WorkerSpec and the members' files by name.

        They come with every call, so that an actor that was started again loads them anew. Files that
        come as arrays stay where they are, in the node's shared memory.
        """
        if self.merger is None:
            spec, members = ray.get(inputs)
            self.state = open_worker_state(spec, ray_device(threads))
            self.merger = Merger(self.state.model, members, spec.model.local())
        with self.merger.merged(recipe) as model:
            return score_model(model, self.state.tokenizer, self.state.eval_set, self.state.eval_settings)


class MergePool:
    """Merge actors that share a base and its members; each works on one recipe at a time."""

    def __init__(self, spec: WorkerSpec, members: Mapping[str, Files], resources: ResourcesPart, size: int) -> None:
        # As arrays, which Ray keeps in shared memory, the files are there once for all actors of a node.
        shareable = {
            name: {file: np.frombuffer(memoryview(data), np.uint8) for file, data in files.items()}
            for name, files in members.items()
        }
        self._inputs = [ray.put(spec), ray.put(shareable)]
        self._threads = max(1, int(resources.cpus_per_worker))
        actor = ray.remote(MergeActor).options(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=1,  # a recipe that kills its actor twice is a failed merge, not the end of the others
        )
        self._actors: list[Any] = [actor.remote() for _ in range(size)]
        self._free = list(self._actors)
        self._running: dict[Any, tuple[str, Any]] = {}

    @property
    def free(self) -> bool:
        """Whether an actor waits for a recipe."""
        return bool(self._free)

    def start(self, name: str, recipe: MergeRecipe) -> None:
        """Gives a free actor a recipe, under a name by which its outcome is known."""
        actor = self._free.pop(0)
        self._running[actor.score.remote(recipe, self._inputs, self._threads)] = (name, actor)

    def wait(self) -> tuple[str, Scores | None, str]:
        """Waits for one of those that were started: its name, its scores or None, and the reason where it failed."""
        (done,), _ = ray.wait(list(self._running), num_returns=1)
        name, actor = self._running.pop(done)
        self._free.append(actor)
        try:
            return name, ray.get(done), ""
        except ray.exceptions.RayError as error:
            return name, None, str(error).strip().splitlines()[-1]

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)
