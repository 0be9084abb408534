"""Trials on Ray Train workers: cold, a Train run each, or warm, long-lived runs that lease them.

The only owner of ray.train.
Both ways speak to one Coordinator, which queues trials, collects what they post, and writes it down.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_unlearn.cluster.coordinator import MAX_ATTEMPTS, MAX_STARTS, Coordinator
from ray_unlearn.cluster.model_transfer import WorkerSpec, open_worker_state
from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.schema import from_dict

BEAT_SECONDS = 10.0
LEAST_CALLS = 1000
"""Calls that Ray lets an asynchronous actor make at once, unless told otherwise."""
ZERO_3_TRIALS_PER_PROCESS = 8
"""DeepSpeed leaks memory when stage 3 engines are made again in one process (its issue 7204)."""


T = TypeVar("T")


class TrialTakenError(Exception):
    """The trial is no longer these workers' own."""


class TrainWorker:
    """A Ray Train worker as the trial loop sees it (trial.Worker)."""

    def __init__(self, coordinator: Any, slot: int) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.coordinator, self.slot, self.trial_id = coordinator, slot, ""
        self.known: dict[str, Any] = {}

    def gather(self, items: list[T]) -> list[T]:
        if self.world == 1:
            return items
        import torch.distributed as dist

        parts: list[list[T]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, items)
        return list(itertools.chain.from_iterable(parts))

    def agree(self, value: float) -> float:
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value], device=ray.train.torch.get_device())
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return float(tensor)

    def broadcast(self, value: object) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def report(self, metrics: Mapping[str, object]) -> None:
        ray.train.report({"trial": self.trial_id, **metrics})

    def post(self, event: str, **content: object) -> None:
        if self.rank == 0 and not self._post(event, content):
            raise TrialTakenError(f"{self.trial_id} has ended or was given to other workers")

    def post_error(self, error: Exception) -> None:
        """The reason of a failure, from whichever rank it befell: the others only see that one is gone."""
        rank = f"rank {self.rank}: " if self.world > 1 else ""
        self._post("error", {"reason": f"{rank}{type(error).__name__}: {error}"})

    def _post(self, event: str, content: Mapping[str, object]) -> bool:
        return bool(ray.get(self.coordinator.post.remote(self.slot, self.trial_id, event, content)))

    def once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self.known:
            found = ray.get(self.coordinator.made.remote(name))
            if found is None:
                found = make()
                # By value: an object that this worker owned would end with it, and a cold trial's workers end.
                ray.get(self.coordinator.keep.remote(name, found))
            self.known[name] = found
        return self.known[name]


def _run(worker: TrainWorker, trial_id: str, config: Mapping[str, object], state: Any) -> None:
    """One trial; an exception is posted as the reason, then ends the worker group, so that ranks never disagree."""
    from ray_unlearn.training.loop import run_trial

    worker.trial_id = trial_id
    try:
        run_trial(from_dict(TrialConfig, config), state, worker)
    except Exception as error:
        traceback.print_exc()
        worker.post_error(error)
        if worker.world > 1:
            raise
        with contextlib.suppress(TrialTakenError):
            worker.post("ended", status="failed", reason=f"{type(error).__name__}: {error}")


def _open_state(config: dict[str, Any]) -> object:
    """The WorkerState on the device that Ray gave this worker; a GPU that it did not give is left alone."""
    import torch

    device = ray.train.torch.get_device()
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"  # read when deepspeed is imported
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config["threads"])))
    return open_worker_state(config["spec"], str(device))


def cold_worker(config: dict[str, Any]) -> None:
    """train_loop_per_worker of one trial's own Train run."""
    worker, state = TrainWorker(config["coordinator"], config["slot"]), _open_state(config)
    started = ray.get(worker.coordinator.begin.remote(config["trial_id"])) if worker.rank == 0 else None
    if worker.broadcast(started):
        _run(worker, config["trial_id"], config["config"], state)


def _hello(worker: TrainWorker) -> int:
    """The epoch of the slot's worker group; 0 tells it to give up, as it must when the search has ended."""
    try:
        return int(ray.get(worker.coordinator.hello.remote(worker.slot)))
    except ray.exceptions.RayActorError:
        return 0


def warm_worker(config: dict[str, Any]) -> None:
    """train_loop_per_worker of a slot: lives for the whole search and leases one trial after another."""
    worker = TrainWorker(config["coordinator"], config["slot"])
    epoch = worker.broadcast(_hello(worker) if worker.rank == 0 else None)
    if epoch == 0:
        return
    state = _open_state(config)
    import deepspeed  # noqa: F401  # the slow imports are paid here, not in the first trial
    import peft  # noqa: F401

    if worker.rank == 0:
        ray.get(worker.coordinator.ready.remote(worker.slot))
    stage_3_trials = 0
    with _signs_of_life(worker, epoch):
        while True:
            lease = ray.get(worker.coordinator.lease.remote(worker.slot, epoch)) if worker.rank == 0 else None
            what, trial_id, trial = worker.broadcast(lease)
            if what == "close":
                return
            if what == "run":
                _run(worker, trial_id, trial, state)
                stage_3_trials += trial["zero_stage"] == 3
                if stage_3_trials >= ZERO_3_TRIALS_PER_PROCESS:
                    raise RuntimeError("recycling the workers: DeepSpeed stage 3 engines leak memory in one process")


@contextmanager
def _signs_of_life(worker: TrainWorker, epoch: int) -> Iterator[None]:
    """Tells the coordinator now and then, from a thread of rank 0, that the group is there: a trial may be silent for
    an hour, and a lost node is for ever."""
    stop = threading.Event()

    def beat() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the coordinator is gone: the next post will say so
            while not stop.wait(BEAT_SECONDS) and ray.get(worker.coordinator.alive.remote(worker.slot, epoch)):
                pass

    if worker.rank == 0:
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


@dataclass(frozen=True, kw_only=True)
class Handle:
    """What any process of the cluster needs to run trials through an executor."""

    coordinator: Any
    spec: object
    resources: ResourcesPart
    storage: str

    def trainer(self, loop: Any, name: str, max_failures: int, **extra: object) -> TorchTrainer:
        """A Ray Train run of `loop` on one trial's workers. `name` must never have been used: a known one resumes."""
        resources = self.resources
        needs: dict[str, float] = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            needs["GPU"] = resources.gpus_per_worker
        common = {"coordinator": self.coordinator, "spec": self.spec, "slot": 0, "threads": resources.cpus_per_worker}
        return TorchTrainer(
            loop,
            train_loop_config=common | extra,
            scaling_config=ScalingConfig(
                num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=needs
            ),
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
            run_config=RunConfig(
                name=name, storage_path=self.storage, failure_config=FailureConfig(max_failures=max_failures)
            ),
        )


def start_coordinator(run_dir: Path, concurrency: int) -> object:
    """The Coordinator's actor, on the driver's node.

    Of each trial side by side one call waits for its next event and one for a lease, and none of
    them may keep what its workers post from getting in.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    calls = max(LEAST_CALLS, 4 * concurrency)
    actor = ray.remote(Coordinator).options(num_cpus=0, max_concurrency=calls, scheduling_strategy=here)
    return actor.remote(str(run_dir), concurrency)


class Executor:
    """Owns a search's Coordinator and, when warm, long-lived Train runs; `handle` lets others run trials on them."""

    def __init__(self, run_dir: Path, spec: WorkerSpec, resources: ResourcesPart, storage: Path | str) -> None:
        self.handle = Handle(
            coordinator=start_coordinator(run_dir, resources.concurrency),
            spec=ray.put(spec),
            resources=resources,
            storage=str(storage),
        )
        self.threads: list[threading.Thread] = []
        self.closing = False
        if resources.executor == "warm":
            for slot in range(resources.concurrency):
                name = f"slot-{slot}-{_stamp()}"
                thread = threading.Thread(target=self._serve, args=(slot, name), name=name, daemon=True)
                thread.start()
                self.threads.append(thread)

    def _serve(self, slot: int, name: str) -> None:
        try:
            self.handle.trainer(warm_worker, name, -1, slot=slot).fit()
            reason = f"they failed {MAX_STARTS} times before their first trial; see Ray's worker logs"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if not self.closing:
            ray.get(self.handle.coordinator.slot_lost.remote(slot, reason))

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Ends the warm workers and waits for their Train runs. After an error, as Ctrl-C is one, nothing is waited
        for: with the coordinator gone, workers end with their next post, and whoever waits for a trial is told."""
        self.closing = True
        if error is None:
            ray.get(self.handle.coordinator.close.remote())
            for thread in self.threads:
                thread.join(30)
        ray.kill(self.handle.coordinator)


def _stamp() -> str:
    return f"{os.getpid()}-{time.time_ns() // 1_000_000}"


def events(handle: Handle, trial_id: str, config: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    """Runs a trial and yields its events: ("snapshot", objectives) as they come, then ("ended", {status, reason})."""
    warm = handle.resources.executor == "warm"
    ray.get(handle.coordinator.submit.remote(trial_id, config, warm))
    thread = None
    if not warm:
        thread = threading.Thread(target=_fit_cold, args=(handle, trial_id, config), daemon=True)
        thread.start()
    while True:
        name, content = ray.get(handle.coordinator.next_event.remote(trial_id))
        if name == "ended" and thread is not None:
            thread.join(60)  # its workers free their CPUs before the next trial asks for them
        yield name, content
        if name == "ended":
            return


def _fit_cold(handle: Handle, trial_id: str, config: dict[str, object]) -> None:
    """A Train run for one trial; whatever ends it without a record is the reason of a failed one."""
    reason = "the Train run ended without a result"
    try:
        name = f"{trial_id}-{_stamp()}"
        handle.trainer(cold_worker, name, MAX_ATTEMPTS - 1, trial_id=trial_id, config=config).fit()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    ray.get(handle.coordinator.fail.remote(trial_id, reason))
