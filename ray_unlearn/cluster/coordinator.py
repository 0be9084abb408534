"""The coordinator of a run's trials: queue between the search and the workers, and the one writer of trial records.

It lives in an actor on the driver's node, so that no path has to be shared between the nodes.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from ray_unlearn.files import versions
from ray_unlearn.models.snapshot_files import write_snapshot
from ray_unlearn.records import Scores, Snapshot, TrialRecord, save_record

MAX_ATTEMPTS = 2
MAX_STARTS = 3
LEASE_POLL_SECONDS = 0.05


class Coordinator:
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
        self.common: dict[str, Any] = {}

    async def made(self, name: str) -> Any:
        """What a worker has shared under that name, or None."""
        return self.common.get(name)

    async def keep(self, name: str, value: Any) -> None:
        """Keeps a value for all later trials; the first one stays."""
        self.common.setdefault(name, value)

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
        write_snapshot(self.run_dir / "snapshots" / name, content["files"])
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
