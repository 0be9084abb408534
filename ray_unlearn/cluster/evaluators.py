"""Evaluations on Ray tasks and actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ray_unlearn.cluster.model_transfer import ModelSource
from ray_unlearn.config.job import Job, ResourcesPart
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.evaluator import Each, Evaluation, Log, Scorer, _Here
from ray_unlearn.evaluation.scoring import evaluate_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.plugins import load_in_worker
from ray_unlearn.records import Scores


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
    """Scorers in a Ray actor, each loaded with the first call for it: what is wrong with it is then that call's
    error."""

    def __init__(self) -> None:
        self.scorers: dict[tuple[str, str | None], Scorer] = {}
        self.notes: list[str] = []

    def compute(
        self,
        place: int,
        call: Callable[[Scorer], list[Any]],
        key: tuple[str, str | None],
        inputs: list[Any],
        threads: int,
    ) -> tuple[int, list[Any], list[str]]:
        """The call's place and result, and what there was to say. `inputs` are Ray references to the model's and the
        adapter's ModelSource and to the Evaluation of this `key`; they come with every call, for an actor that starts
        again, and are fetched by the first alone."""
        if key not in self.scorers:
            import ray

            load_in_worker()
            model, adapter, work = ray.get(inputs)
            adapter_path = adapter.local() if adapter is not None else None
            device = ray_device(threads)
            self.scorers[key] = Scorer(
                model.local(), adapter_path, work.dtype, work.data, work.settings, device, self.notes.append
            )
        return place, call(self.scorers[key]), self.notes


class ScoringActors:
    """Ray actors that make calls of an Evaluation's Scorer; one that is free takes the next call."""

    def __init__(self, resources: ResourcesPart, shared: bool, log: Callable[[str], None]) -> None:
        import ray

        self.resources, self.shared, self.log = resources, shared, log
        self.remote = ray.remote(ScoringActor).options(
            num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_restarts=2, max_task_retries=2
        )
        self.actors: list[Any] = []
        self.inputs: dict[tuple[str, str | None], list[Any]] = {}
        self.said: set[str] = set()

    def __call__(self, evaluation: Evaluation, calls: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
        """(place, result) of each call as they are done. Raises the InputError that an actor raised."""
        import ray
        from ray.util import ActorPool

        wanted = min(self.resources.workers, len(calls))
        if len(self.actors) < wanted:
            self.actors += [self.remote.remote() for _ in range(wanted - len(self.actors))]
            self.log(f"{wanted} workers")
        inputs, threads = self._inputs(evaluation), max(1, int(self.resources.cpus_per_worker))
        try:
            for place, found, notes in ActorPool(self.actors).map_unordered(
                lambda actor, place: actor.compute.remote(place, calls[place], evaluation.key, inputs, threads),
                list(range(len(calls))),
            ):
                for note in notes:
                    if note not in self.said:
                        self.log(note)
                self.said.update(notes)
                yield place, found
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, InputError) else error) from None

    def _inputs(self, evaluation: Evaluation) -> list[Any]:
        import ray

        if evaluation.key not in self.inputs:
            sources = [ModelSource.of(path, self.shared) if path else None for path in evaluation.key]
            self.inputs[evaluation.key] = [ray.put(value) for value in (*sources, evaluation)]
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
def workers(count: int, gpus_each: float, address: str | None, log: Log) -> Iterator[Each]:
    """Who computes: this process, or so many Ray actors, started when there is first something to do. Models stay
    loaded until the end."""
    if count == 1:
        yield _Here(log)
        return
    with ExitStack() as stack:
        actors: list[Each] = []

        def each(evaluation: Evaluation, calls: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
            if not calls:
                return
            if not actors:
                from ray_unlearn.cluster.session import cluster
                from ray_unlearn.config.job import ResourcesPart

                resources = ResourcesPart(workers=count, gpus_per_worker=gpus_each, dashboard=False)
                started_here = stack.enter_context(cluster(address, resources))
                from ray_unlearn.cluster.evaluators import ScoringActors

                actors.append(ScoringActors(resources, started_here, log))
            yield from actors[0](evaluation, calls)

        yield each
