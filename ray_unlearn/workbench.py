"""From the driver's files to what a worker keeps in memory, on any node: models travel by path or by bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import Evaluation, Scorer
from ray_unlearn.job import Job, ResourcesPart
from ray_unlearn.records import Example, Scores
from ray_unlearn.scoring import EvalSet, EvalSettings, evaluate_model


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a worker finds the base model: a path or hub id it can read itself, or the files' bytes."""

    path: str
    files: dict[str, bytes] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def of(cls, path: str, shared: bool) -> ModelSource:
        """The source of a model; its files are read here unless the workers can read `path` (shared, or a hub id)."""
        place = Path(path)
        if shared or not place.exists():
            return cls(path=str(place.resolve()) if place.exists() else path)
        names = sorted(place.iterdir()) if place.is_dir() else [place]
        files = {name.name: name.read_bytes() for name in names if name.is_file()}
        content = hashlib.sha256()
        for name in sorted(files):
            content.update(name.encode() + b"\0" + files[name])
        suffix = "" if place.is_dir() else place.suffix
        return cls(path=f"model{suffix}", files=files, digest=content.hexdigest()[:16])

    def local(self) -> str:
        """A path on this node; bytes are unpacked once per node, whole or not at all."""
        if not self.files:
            return self.path
        root = Path(tempfile.gettempdir()) / f"ray_unlearn-{os.getuid()}-models"
        place = root / self.digest
        if not place.exists():
            root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=root))
            for name, data in self.files.items():
                (temporary / name).write_bytes(data)
            try:
                os.replace(temporary, place)
            except OSError:  # another worker of this node was faster
                shutil.rmtree(temporary, ignore_errors=True)
        single = next(iter(self.files)) if len(self.files) == 1 and self.path.endswith(".gguf") else None
        return str(place / single) if single else str(place)


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """All that a worker needs to build its Bench, as one object that travels through Ray's object store."""

    model: ModelSource
    forget: Sequence[Example]
    retain: Sequence[Example]
    eval_set: EvalSet
    eval_settings: EvalSettings
    dtype: str
    utility_floor: float


def open_bench(spec: BenchSpec | Any, device: str = "cpu") -> Any:
    """Loads what the spec names; a Bench in this process."""
    import ray

    from ray_unlearn.models.loading import load_model, load_tokenizer
    from ray_unlearn.trial import Bench

    if isinstance(spec, ray.ObjectRef):
        spec = ray.get(spec)
    path = spec.model.local()
    model = load_model(path, spec.dtype).to(device).requires_grad_(False)
    return Bench(
        model=model,
        tokenizer=load_tokenizer(path),
        forget=spec.forget,
        retain=spec.retain,
        eval_set=spec.eval_set,
        eval_settings=spec.eval_settings,
        dtype=spec.dtype,
        utility_floor=spec.utility_floor,
    )


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
    from ray_unlearn.models.loading import load_model, load_tokenizer

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
                range(len(calls)),
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
