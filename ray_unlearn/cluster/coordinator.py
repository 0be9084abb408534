"""The coordinator of a run's trials: queue between the search and the workers, and the one writer of trial records.

It lives in an actor on the driver's node, so that no path has to be shared between the nodes.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_unlearn.files import versions
from ray_unlearn.models.snapshot_files import write_snapshot
from ray_unlearn.records import Scores, Snapshot, TrialRecord, save_record

MAX_ATTEMPTS = 2
MAX_STARTS = 3
LEASE_POLL_SECONDS = 0.05
AWAY_SECONDS = 180.0
"""Silence after which a slot's trial goes to another: a node that is gone says nothing, and Ray Train waits for a new
one for ever. Longer than a worker group needs to start again."""


@dataclass(kw_only=True)
class TrialState:
    """A trial from its announcement to its record."""

    config: dict[str, object]
    queued: bool
    """Whether it waits for a warm slot; else its own workers come for it."""
    submitted: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[tuple[str, dict[str, object]]] = field(default_factory=asyncio.Queue)
    attempts: int = 0
    error: str = ""
    """The first one of the latest attempt: what other ranks say after it only follows from it."""
    snapshots: list[Snapshot] = field(default_factory=list)
    course: list[dict[str, object]] = field(default_factory=list)
    first_step: float | None = None
    ended: bool = False


@dataclass(kw_only=True)
class Slot:
    """A warm slot: the worker groups that hold it one after another."""

    epoch: int = 0
    """Of the group that holds it; earlier ones are sent home."""
    starts: int = 0
    """Groups since one was last ready."""
    trial: str | None = None
    heard: float = field(default_factory=time.monotonic)
    """When its workers last gave a sign of life."""
    lost: str = ""
    """Why nobody will hold it again."""


class Coordinator:
    """Queue between the search and the workers, and the one writer of a run's trial records."""

    def __init__(self, run_dir: str, slots: int, away_seconds: float = AWAY_SECONDS) -> None:
        self.run_dir, self.away_seconds = Path(run_dir), away_seconds
        self.queue: deque[str] = deque()
        self.trials: dict[str, TrialState] = {}
        self.slots = [Slot() for _ in range(slots)]
        self.closed = False
        self.common: dict[str, object] = {}

    async def made(self, name: str) -> object:
        """What a worker has shared under that name, or None."""
        return self.common.get(name)

    async def keep(self, name: str, value: object) -> None:
        """Keeps a value for all later trials; the first one stays."""
        self.common.setdefault(name, value)

    async def submit(self, trial_id: str, config: dict[str, object], queued: bool) -> None:
        """Announces a trial; a queued one waits for a warm worker."""
        self.trials[trial_id] = TrialState(config=config, queued=queued)
        self._restart(trial_id)
        if queued:
            self.queue.append(trial_id)
            await self._fail_if_nobody_is_left()

    def _restart(self, trial_id: str) -> None:
        """A new attempt starts from nothing: what an earlier one posted is dropped."""
        trial = self.trials[trial_id]
        trial.snapshots, trial.course, trial.first_step, trial.error = [], [], None, ""
        shutil.rmtree(self.run_dir / "snapshots" / trial_id, ignore_errors=True)

    async def hello(self, slot: int) -> int:
        """A worker group's first call, before it loads anything; a group of the slot that came before is to close.

        0 tells the group to give up: Ray Train restarts a group that fails without limit, and one
        that cannot even load its model would be restarted for ever.
        """
        state = self._heard(slot)
        state.starts += 1
        if state.starts > MAX_STARTS:
            return 0
        state.epoch += 1
        return state.epoch

    async def ready(self, slot: int) -> None:
        """The slot's worker group has loaded what it needs."""
        self._heard(slot).starts = 0

    async def alive(self, slot: int, epoch: int) -> bool:
        """A sign of life while the group trains; whether the slot is still its own."""
        if epoch != self.slots[slot].epoch:
            return False
        self._heard(slot)
        return True

    def _heard(self, slot: int) -> Slot:
        self.slots[slot].heard = time.monotonic()
        return self.slots[slot]

    async def lease(self, slot: int, epoch: int) -> tuple[str, str, dict[str, object]]:
        """("run", id, config), ("wait", ...) or ("close", ...). A slot whose workers died gets its trial back once."""
        for _ in range(int(5 / LEASE_POLL_SECONDS)):
            if self.closed or epoch != self.slots[slot].epoch:
                return "close", "", {}
            state = self._heard(slot)
            if not self.queue:
                self._take_back_from_the_absent()
            if state.trial is None and self.queue:
                state.trial = self.queue.popleft()
            if state.trial is not None:
                if await self.begin(state.trial):
                    return "run", state.trial, self.trials[state.trial].config
                state.trial = None
            await asyncio.sleep(LEASE_POLL_SECONDS)
        return "wait", "", {}

    def _take_back_from_the_absent(self) -> None:
        """Queues the trials of slots that have been silent for too long; should their workers come back, they close."""
        for state in self.slots:
            if state.trial is not None and time.monotonic() - state.heard > self.away_seconds:
                self.queue.append(state.trial)
                state.trial = None
                state.epoch += 1

    async def begin(self, trial_id: str) -> bool:
        """Starts an attempt; False, and a failed record, once the attempts are used up."""
        trial = self.trials[trial_id]
        if trial.ended:
            return False
        trial.attempts += 1
        if trial.attempts > MAX_ATTEMPTS:
            await self._end(trial_id, "failed", trial.error or f"the workers died {MAX_ATTEMPTS} times")
            return False
        self._restart(trial_id)
        return True

    async def post(self, slot: int, trial_id: str, event: str, content: dict[str, Any]) -> bool:
        """Takes an event of a trial: started, snapshot, error, ended. False where the trial is no longer the slot's,
        so that workers that were thought lost stop."""
        trial = self.trials[trial_id]
        if trial.ended or (trial.queued and self.slots[slot].trial != trial_id):
            return False
        if trial.queued:
            self._heard(slot)
        if event == "started":
            trial.first_step = time.monotonic() - trial.submitted
        elif event == "error":
            trial.error = trial.error or content["reason"]
        elif event == "snapshot":
            await self._keep_snapshot(trial_id, content)
        elif event == "ended":
            if trial.queued:
                self.slots[slot].trial = None
            await self._end(trial_id, content["status"], content["reason"])
        return True

    async def _keep_snapshot(self, trial_id: str, content: dict[str, Any]) -> None:
        trial = self.trials[trial_id]
        name = f"{trial_id}/{content['step']:05d}"
        write_snapshot(self.run_dir / "snapshots" / name, content["files"])
        scores = Scores.from_json(content["scores"])
        trial.snapshots.append(
            Snapshot(
                id=name,
                step=content["step"],
                phase=content["phase"],
                scores=scores,
                path=f"snapshots/{name}",
                seconds=content["seconds"],
            )
        )
        trial.course += content["course"]
        await trial.events.put(("snapshot", {"step": content["step"], **scores.headlines()}))

    async def _end(self, trial_id: str, status: str, reason: str) -> None:
        trial = self.trials[trial_id]
        trial.ended = True
        record = TrialRecord(
            id=trial_id,
            status=status,
            reason=reason,
            config=trial.config,
            snapshots=() if status == "failed" else tuple(trial.snapshots),
            course=tuple(trial.course),
            seconds=time.monotonic() - trial.submitted,
            seconds_to_first_step=trial.first_step,
            attempts=min(trial.attempts, MAX_ATTEMPTS),
            versions=versions(),
        )
        try:
            save_record(self.run_dir, record)
        finally:  # a full disk must not leave the trial's driver waiting for ever
            trial.course, trial.snapshots = [], []  # thousands of trials end in one search
            await trial.events.put(("ended", {"status": status, "reason": reason}))

    async def fail(self, trial_id: str, reason: str) -> None:
        """Ends a trial from outside, unless it has ended; what its workers said weighs more than the given reason."""
        trial = self.trials[trial_id]
        if not trial.ended:
            await self._end(trial_id, "failed", trial.error or reason)

    async def next_event(self, trial_id: str) -> tuple[str, dict[str, object]]:
        """Waits for a trial's next event: snapshot, or ended."""
        return await self.trials[trial_id].events.get()

    async def slot_lost(self, slot: int, reason: str) -> None:
        """A warm slot's Train run is gone for good: its trial fails, and with the last slot all that wait."""
        state = self.slots[slot]
        state.lost = f"the warm workers could not go on: {reason}"
        if state.trial is not None:
            await self.fail(state.trial, state.lost)
            state.trial = None
        await self._fail_if_nobody_is_left()

    async def _fail_if_nobody_is_left(self) -> None:
        if all(state.lost for state in self.slots):
            while self.queue:
                await self.fail(self.queue.popleft(), self.slots[0].lost)

    async def close(self) -> None:
        """Sends the warm workers home."""
        self.closed = True
