"""Evaluations on Ray tasks and actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ray_unlearn.cluster.model_transfer import ModelSource
from ray_unlearn.cluster.session import cluster
from ray_unlearn.config.job import Job, ResourcesPart
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.evaluator import Evaluation, Scorer, ThisProcess, Workers
from ray_unlearn.evaluation.scoring import evaluate_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.plugins import load_in_worker
from ray_unlearn.protocols import Log
from ray_unlearn.records import Scores
from ray_unlearn.schema import require

if TYPE_CHECKING:
    from ray import ObjectRef

S = TypeVar("S")
R = TypeVar("R")


def score_models(job: Job, paths: Sequence[str], eval_set: EvalSet, shared: bool) -> list[tuple[Scores, list[str]]]:
    """Scores and generations of whole models, each in its own Ray task, side by side where there is room."""
    import ray

    resources = job.resources
    task = ray.remote(_score).options(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)
    threads = max(1, int(resources.cpus_per_worker))
    sources = [ModelSource.of(path, shared) for path in paths]
    return ray.get([task.remote(source, eval_set, job.eval_settings, job.model.dtype, threads) for source in sources])


def _score(
    source: ModelSource, eval_set: EvalSet, settings: EvalSettings, dtype: str, threads: int
) -> tuple[Scores, list[str]]:
    load_in_worker()
    path = source.local()
    model = load_model(path, dtype).to(ray_device(threads))
    return evaluate_model(model, load_tokenizer(path), eval_set, settings)


class ScoringActor:
    """Scorers in a Ray actor, each loaded with the first share for it: what is wrong with it is then that share's
    error."""

    def __init__(self) -> None:
        self.scorers: dict[tuple[str, str | None], Scorer] = {}
        self.notes: list[str] = []

    def compute(
        self,
        place: int,
        work: Callable[[Scorer, S], list[R]],
        share: S,
        key: tuple[str, str | None],
        inputs: list[ObjectRef[Any]],
        threads: int,
    ) -> tuple[int, list[R], list[str]]:
        """The share's place and result, and what there was to say. `inputs` are references to the Evaluation of this
        `key` and to its model's and adapter's ModelSource; they come with every share, for an actor that starts
        again, and are fetched by the first alone."""
        if key not in self.scorers:
            import ray

            load_in_worker()
            evaluation, model, adapter = ray.get(inputs)
            here = replace(evaluation, model=model.local(), adapter=None if adapter is None else adapter.local())
            self.scorers[key] = Scorer(here, ray_device(threads), self.notes.append)
        return place, work(self.scorers[key], share), self.notes


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """Ray actors that share an evaluation."""

    count: int = 1
    """How many; one alone is no actor but this process."""
    gpus_each: float = 0
    address: str | None = None
    """The Ray cluster to join; None for that of RAY_ADDRESS, or else one that is started on this machine."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"--workers must be at least 1, got {self.count}.")


class ScoringActors:
    """Workers that are Ray actors, started when there is first something to do; one that is free takes the next
    share. The cluster is left with `stack`."""

    def __init__(self, pool: WorkerPool, stack: ExitStack, log: Log) -> None:
        self.resources = ResourcesPart(workers=pool.count, gpus_per_worker=pool.gpus_each, dashboard=False)
        self.address, self.stack, self.log = pool.address, stack, log
        self.shared: bool | None = None
        """Whether the actors can read the driver's paths; None before there is a cluster."""
        self.actors: list[object] = []
        self.inputs: dict[tuple[str, str | None], list[ObjectRef[object]]] = {}
        self.said: set[str] = set()

    def compute(
        self, evaluation: Evaluation, work: Callable[[Scorer, S], list[R]], shares: Sequence[S]
    ) -> Iterator[tuple[int, list[R]]]:
        """(place, result) of each share as they are done. Raises the InputError that an actor raised."""
        if not shares:
            return
        if self.shared is None:
            self.shared = self.stack.enter_context(cluster(self.address, self.resources))
        import ray
        from ray.util import ActorPool

        self._start(min(self.resources.workers, len(shares)))
        inputs, sent = self._inputs(evaluation), ray.put(work)
        threads = max(1, int(self.resources.cpus_per_worker))
        try:
            for place, found, notes in ActorPool(self.actors).map_unordered(
                lambda actor, at: actor.compute.remote(at, sent, shares[at], evaluation.key, inputs, threads),
                list(range(len(shares))),
            ):
                for note in notes:
                    if note not in self.said:
                        self.log(note)
                self.said.update(notes)
                yield place, found
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, InputError) else error) from None

    def _start(self, wanted: int) -> None:
        """As many actors as are wanted; those that there are stay."""
        import ray

        if len(self.actors) < wanted:
            each = {"num_cpus": self.resources.cpus_per_worker, "num_gpus": self.resources.gpus_per_worker}
            actor = ray.remote(ScoringActor).options(**each, max_restarts=2, max_task_retries=2)
            self.actors += [actor.remote() for _ in range(wanted - len(self.actors))]
            self.log(f"{wanted} workers")

    def _inputs(self, evaluation: Evaluation) -> list[ObjectRef[object]]:
        import ray

        if evaluation.key not in self.inputs:
            assert self.shared is not None
            sources = [ModelSource.of(path, self.shared) if path else None for path in evaluation.key]
            self.inputs[evaluation.key] = [ray.put(value) for value in (evaluation, *sources)]
        return self.inputs[evaluation.key]


def ray_device(threads: int) -> str:
    """The device that Ray gave this task or actor; on the CPU, with so many threads."""
    import ray
    import torch

    if ray.get_gpu_ids():
        return "cuda"
    torch.set_num_threads(threads)
    return "cpu"


@contextmanager
def workers(pool: WorkerPool, log: Log) -> Iterator[Workers]:
    """Who computes: this process, or so many Ray actors. Models stay loaded until the end."""
    if pool.count == 1:
        yield ThisProcess(log)
        return
    with ExitStack() as stack:
        yield ScoringActors(pool, stack, log)
