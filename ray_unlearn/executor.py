"""Trials on Ray Train workers: cold, a Train run each, or warm, long-lived runs that lease them.

The only owner of ray.train.
Both ways speak to one Keeper: an actor on the driver's node that queues trials, collects what they
post, and writes snapshots and records. No path has to be shared between the nodes for that.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_unlearn.config import TrialConfig, from_dict
from ray_unlearn.job import ResourcesPart
from ray_unlearn.records import Scores, Snapshot, TrialRecord, save_record, versions
from ray_unlearn.workbench import BenchSpec, open_bench

MAX_ATTEMPTS = 2
MAX_STARTS = 3
LEASE_POLL_SECONDS = 0.05
ZERO_3_TRIALS_PER_PROCESS = 8
"""DeepSpeed leaks memory when stage 3 engines are made again in one process (its issue 7204)."""


class Keeper:
    """Queue between the search and the workers, and the one writer of a run's trial records."""

    def __init__(self, run_dir: str, slots: int) -> None:
        self.run_dir, self.slots = Path(run_dir), slots
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.trials: dict[str, dict[str, Any]] = {}
        self.leases: dict[int, str] = {}
        self.epochs: dict[int, int] = {}
        self.starts: dict[int, int] = {}
        self.lost: dict[int, str] = {}
        self.closed = False

    async def submit(self, trial_id: str, config: dict[str, Any], queued: bool) -> None:
        """Announces a trial; a queued one waits for a warm worker."""
        self.trials[trial_id] = {
            "config": config,
            "events": asyncio.Queue(),
            "attempts": 0,
            "submitted": time.monotonic(),
            "ended": False,
        }
        self._restart(trial_id)
        if queued:
            await self.queue.put(trial_id)
            await self._fail_if_nobody_is_left()

    def _restart(self, trial_id: str) -> None:
        """A new attempt starts from nothing: what an earlier one posted is dropped."""
        self.trials[trial_id] |= {"snapshots": [], "course": [], "first_step": None}
        shutil.rmtree(self.run_dir / "snapshots" / trial_id, ignore_errors=True)

    async def hello(self, slot: int) -> int:
        """A worker group's first call, before it loads anything; a group of the slot that came before is to close.

        0 tells the group to give up: Ray Train restarts a group that fails without limit, and one
        that cannot even load its model would be restarted for ever.
        """
        self.starts[slot] = self.starts.get(slot, 0) + 1
        if self.starts[slot] > MAX_STARTS:
            return 0
        self.epochs[slot] = self.epochs.get(slot, 0) + 1
        return self.epochs[slot]

    async def ready(self, slot: int) -> None:
        """The slot's worker group has loaded what it needs."""
        self.starts[slot] = 0

    async def lease(self, slot: int, epoch: int) -> tuple[str, str, dict[str, Any]]:
        """("run", id, config), ("wait", ...) or ("close", ...). A slot whose workers died gets its trial back once."""
        for _ in range(int(5 / LEASE_POLL_SECONDS)):
            if self.closed or epoch != self.epochs[slot]:
                return "close", "", {}
            trial_id = self.leases.get(slot)
            if trial_id is None and not self.queue.empty():
                trial_id = self.queue.get_nowait()
            if trial_id is not None:
                self.leases[slot] = trial_id
                if await self.begin(trial_id):
                    return "run", trial_id, self.trials[trial_id]["config"]
                del self.leases[slot]
            await asyncio.sleep(LEASE_POLL_SECONDS)
        return "wait", "", {}

    async def begin(self, trial_id: str) -> bool:
        """Starts an attempt; False, and a failed record, once the attempts are used up."""
        trial = self.trials[trial_id]
        if trial["ended"]:
            return False
        trial["attempts"] += 1
        if trial["attempts"] > MAX_ATTEMPTS:
            reason = trial.get("error") or f"the workers died {MAX_ATTEMPTS} times"
            await self._end(trial_id, "failed", reason)
            return False
        self._restart(trial_id)
        return True

    async def post(self, slot: int, trial_id: str, event: str, content: dict[str, Any]) -> None:
        """Takes an event of a trial: started, snapshot, error, ended."""
        trial = self.trials[trial_id]
        if trial["ended"]:
            return
        if event == "started":
            trial["first_step"] = time.monotonic() - trial["submitted"]
        elif event == "error":
            trial["error"] = content["reason"]
        elif event == "snapshot":
            await self._keep_snapshot(trial_id, content)
        elif event == "ended":
            self.leases.pop(slot, None)
            await self._end(trial_id, content["status"], content["reason"])

    async def _keep_snapshot(self, trial_id: str, content: dict[str, Any]) -> None:
        trial = self.trials[trial_id]
        name = f"{trial_id}/{content['step']:05d}"
        folder = self.run_dir / "snapshots" / name
        temporary = folder.with_name(f".{folder.name}.tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        for file, data in content["files"].items():
            (temporary / file).write_bytes(data)
        os.replace(temporary, folder)
        scores = Scores.from_json(content["scores"])
        trial["snapshots"].append(
            Snapshot(
                id=name,
                step=content["step"],
                phase=content["phase"],
                scores=scores,
                path=f"snapshots/{name}",
                seconds=content["seconds"],
            )
        )
        trial["course"] += content["course"]
        await trial["events"].put(("snapshot", {"step": content["step"], **_objectives(scores)}))

    async def _end(self, trial_id: str, status: str, reason: str) -> None:
        trial = self.trials[trial_id]
        trial["ended"] = True
        record = TrialRecord(
            id=trial_id,
            status=status,
            reason=reason,
            config=trial["config"],
            snapshots=() if status == "failed" else tuple(trial["snapshots"]),
            course=tuple(trial["course"]),
            seconds=time.monotonic() - trial["submitted"],
            seconds_to_first_step=trial["first_step"],
            attempts=min(trial["attempts"], MAX_ATTEMPTS),
            versions=versions(),
        )
        try:
            save_record(self.run_dir, record)
        finally:  # a full disk must not leave the trial's driver waiting for ever
            await trial["events"].put(("ended", {"status": status, "reason": reason}))

    async def fail(self, trial_id: str, reason: str) -> None:
        """Ends a trial from outside, unless it has ended."""
        if not self.trials[trial_id]["ended"]:
            await self._end(trial_id, "failed", reason)

    async def next_event(self, trial_id: str) -> tuple[str, dict[str, Any]]:
        """Waits for a trial's next event: snapshot, or ended."""
        return await self.trials[trial_id]["events"].get()

    async def slot_lost(self, slot: int, reason: str) -> None:
        """A warm slot's Train run is gone for good: its trial fails, and with the last slot all that wait."""
        self.lost[slot] = f"the warm workers could not go on: {reason}"
        if slot in self.leases:
            await self.fail(self.leases.pop(slot), self.lost[slot])
        await self._fail_if_nobody_is_left()

    async def _fail_if_nobody_is_left(self) -> None:
        if len(self.lost) == self.slots:
            while not self.queue.empty():
                await self.fail(self.queue.get_nowait(), next(iter(self.lost.values())))

    async def close(self) -> None:
        """Sends the warm workers home."""
        self.closed = True


def _objectives(scores: Scores) -> dict[str, float]:
    names = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")
    return {name: value for name in names if (value := getattr(scores, name)) is not None}


class TrainWorker:
    """A Ray Train worker as the trial loop sees it (trial.Worker)."""

    def __init__(self, keeper: Any, slot: int) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.keeper, self.slot, self.trial_id = keeper, slot, ""

    def gather(self, items: list[Any]) -> list[Any]:
        if self.world == 1:
            return items
        import torch.distributed as dist

        parts: list[Any] = [None] * self.world
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

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def report(self, metrics: dict[str, Any]) -> None:
        ray.train.report({"trial": self.trial_id, **metrics})

    def post(self, event: str, **content: Any) -> None:
        if self.rank == 0:
            ray.get(self.keeper.post.remote(self.slot, self.trial_id, event, content))


def _run(worker: TrainWorker, trial_id: str, config: dict[str, Any], bench: Any) -> None:
    """One trial; an exception is posted as the reason, then ends the worker group, so that ranks never disagree."""
    from ray_unlearn.trial import run_trial

    worker.trial_id = trial_id
    try:
        run_trial(from_dict(TrialConfig, config), bench, worker)
    except Exception as error:
        traceback.print_exc()
        worker.post("error", reason=f"{type(error).__name__}: {error}")
        if worker.world > 1:
            raise
        worker.post("ended", status="failed", reason=f"{type(error).__name__}: {error}")


def _open_bench(config: dict[str, Any]) -> Any:
    """The Bench on the device that Ray gave this worker; a GPU that it did not give is left alone."""
    import torch

    device = ray.train.torch.get_device()
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"  # read when deepspeed is imported
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config["threads"])))
    return open_bench(config["spec"], str(device))


def cold_worker(config: dict[str, Any]) -> None:
    """train_loop_per_worker of one trial's own Train run."""
    worker, bench = TrainWorker(config["keeper"], config["slot"]), _open_bench(config)
    started = ray.get(worker.keeper.begin.remote(config["trial_id"])) if worker.rank == 0 else None
    if worker.broadcast(started):
        _run(worker, config["trial_id"], config["config"], bench)


def warm_worker(config: dict[str, Any]) -> None:
    """train_loop_per_worker of a slot: lives for the whole search and leases one trial after another."""
    worker = TrainWorker(config["keeper"], config["slot"])
    epoch = worker.broadcast(ray.get(worker.keeper.hello.remote(worker.slot)) if worker.rank == 0 else None)
    if epoch == 0:
        return
    bench = _open_bench(config)
    import deepspeed  # noqa: F401  # the slow imports are paid here, not in the first trial
    import peft  # noqa: F401

    if worker.rank == 0:
        ray.get(worker.keeper.ready.remote(worker.slot))
    stage_3_trials = 0
    while True:
        lease = ray.get(worker.keeper.lease.remote(worker.slot, epoch)) if worker.rank == 0 else None
        what, trial_id, trial = worker.broadcast(lease)
        if what == "close":
            return
        if what == "run":
            _run(worker, trial_id, trial, bench)
            stage_3_trials += trial["zero_stage"] == 3
            if stage_3_trials >= ZERO_3_TRIALS_PER_PROCESS:
                raise RuntimeError("recycling the workers: DeepSpeed stage 3 engines leak memory in one process")


@dataclass(frozen=True, kw_only=True)
class Handle:
    """What any process of the cluster needs to run trials through an executor."""

    keeper: Any
    spec: Any
    resources: ResourcesPart
    storage: str

    def trainer(self, loop: Any, name: str, max_failures: int, **extra: Any) -> TorchTrainer:
        """A Ray Train run of `loop` on one trial's workers. `name` must never have been used: a known one resumes."""
        resources = self.resources
        needs: dict[str, float] = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            needs["GPU"] = resources.gpus_per_worker
        common = {"keeper": self.keeper, "spec": self.spec, "slot": 0, "threads": resources.cpus_per_worker}
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


class Executor:
    """Owns a search's Keeper and, when warm, the long-lived Train runs; `handle` lets others run trials on them."""

    def __init__(self, run_dir: Path, spec: BenchSpec, resources: ResourcesPart, storage: Path | str) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = ray.remote(Keeper).options(num_cpus=0, max_concurrency=256, scheduling_strategy=here)
        self.handle = Handle(
            keeper=keeper.remote(str(run_dir), resources.concurrency),
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
            ray.get(self.handle.keeper.slot_lost.remote(slot, reason))

    def close(self) -> None:
        """Ends the warm workers and waits for their Train runs."""
        self.closing = True
        ray.get(self.handle.keeper.close.remote())
        for thread in self.threads:
            thread.join(30)
        ray.kill(self.handle.keeper)


def _stamp() -> str:
    return f"{os.getpid()}-{time.time_ns() // 1_000_000}"


def events(handle: Handle, trial_id: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs a trial and yields its events: ("snapshot", objectives) as they come, then ("ended", {status, reason})."""
    warm = handle.resources.executor == "warm"
    ray.get(handle.keeper.submit.remote(trial_id, config, warm))
    thread = None
    if not warm:
        thread = threading.Thread(target=_fit_cold, args=(handle, trial_id, config), daemon=True)
        thread.start()
    while True:
        name, content = ray.get(handle.keeper.next_event.remote(trial_id))
        if name == "ended" and thread is not None:
            thread.join(60)  # its workers free their CPUs before the next trial asks for them
        yield name, content
        if name == "ended":
            return


def _fit_cold(handle: Handle, trial_id: str, config: dict[str, Any]) -> None:
    """A Train run for one trial; whatever ends it without a record is the reason of a failed one."""
    reason = "the Train run ended without a result"
    try:
        name = f"{trial_id}-{_stamp()}"
        handle.trainer(cold_worker, name, MAX_ATTEMPTS - 1, trial_id=trial_id, config=config).fit()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    ray.get(handle.keeper.fail.remote(trial_id, reason))
