"""The keeper of a run's trials: leases, attempts, lost slots. No trial may wait for ever."""

from __future__ import annotations

import asyncio

import pytest

from ray_unlearn.cluster import coordinator as keeping
from ray_unlearn.cluster.session import check_room
from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.records import load_records
from ray_unlearn.schema import to_dict

CONFIG = to_dict(TrialConfig())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def ended(keeper, name):
    while True:
        event, content = await keeper.next_event(name)
        if event == "ended":
            return content


def test_a_slot_whose_workers_died_gets_its_trial_back_once_then_it_fails(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 1)
        await keeper.submit("trial-0000", CONFIG, queued=True)
        for attempt in range(keeping.MAX_ATTEMPTS):
            epoch = await keeper.hello(0)
            await keeper.ready(0)
            assert await keeper.lease(0, epoch) == ("run", "trial-0000", CONFIG)
            await keeper.post(0, "trial-0000", "error", {"reason": f"out of memory {attempt}"})
        epoch = await keeper.hello(0)
        waiting = asyncio.create_task(keeper.lease(0, epoch))
        content = await ended(keeper, "trial-0000")
        await keeper.close()
        assert (await waiting)[0] == "close"
        return content

    assert run(story()) == {"status": "failed", "reason": "out of memory 1"}
    (record,), _ = load_records(tmp_path)
    assert record.status == "failed" and record.attempts == 2 and not record.snapshots


def test_a_new_worker_group_sends_the_old_one_home(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 1)
        old = await keeper.hello(0)
        await keeper.hello(0)
        return await keeper.lease(0, old)

    assert run(story())[0] == "close"


def test_workers_that_never_get_ready_are_told_to_give_up(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 1)
        starts = [await keeper.hello(0) for _ in range(keeping.MAX_STARTS + 1)]
        other = keeping.Coordinator(str(tmp_path), 1)
        for _ in range(5):
            assert await other.hello(0) > 0
            await other.ready(0)
        return starts

    assert run(story()) == [1, 2, 3, 0]


def test_with_the_last_slot_lost_waiting_and_later_trials_fail_at_once(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 2)
        epoch = await keeper.hello(0)
        await keeper.submit("trial-0000", CONFIG, queued=True)
        await keeper.submit("trial-0001", CONFIG, queued=True)
        assert (await keeper.lease(0, epoch))[1] == "trial-0000"
        await keeper.slot_lost(0, "no memory")
        first = await ended(keeper, "trial-0000")  # its own trial; the other slot may still take the next
        assert not keeper.trials["trial-0001"].ended
        await keeper.slot_lost(1, "no memory")
        second = await ended(keeper, "trial-0001")
        await keeper.submit("trial-0002", CONFIG, queued=True)
        return first, second, await ended(keeper, "trial-0002")

    for content in run(story()):
        assert content["status"] == "failed" and "no memory" in content["reason"]


def test_a_trial_whose_slot_stays_away_is_given_to_another_and_the_lost_workers_are_sent_home(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 2, away_seconds=0.3)
        lost, other = await keeper.hello(0), await keeper.hello(1)
        await keeper.submit("trial-0000", CONFIG, queued=True)
        assert (await keeper.lease(0, lost))[1] == "trial-0000"
        for _ in range(4):  # a long step: signs of life alone keep the trial
            await asyncio.sleep(0.1)
            assert await keeper.alive(0, lost)
        waiting = asyncio.create_task(keeper.lease(1, other))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert await asyncio.wait_for(waiting, 2) == ("run", "trial-0000", CONFIG)  # slot 0 says no more
        assert not await keeper.alive(0, lost)
        assert not await keeper.post(0, "trial-0000", "ended", {"status": "finished", "reason": ""})
        assert (await keeper.lease(0, lost))[0] == "close"
        assert await keeper.post(1, "trial-0000", "ended", {"status": "finished", "reason": ""})
        return await ended(keeper, "trial-0000")

    assert run(story())["status"] == "finished"
    (record,), _ = load_records(tmp_path)
    assert record.attempts == 2


def test_the_first_error_of_the_last_attempt_is_the_reason(tmp_path):
    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 1)
        await keeper.submit("trial-0000", CONFIG, queued=False)
        for attempt in range(2):
            assert await keeper.begin("trial-0000")
            for reason in (f"rank 1: out of memory {attempt}", "rank 0: a peer has closed its connection"):
                await keeper.post(0, "trial-0000", "error", {"reason": reason})
        await keeper.fail("trial-0000", "the Train run failed")
        return await ended(keeper, "trial-0000")

    assert run(story())["reason"] == "rank 1: out of memory 1"


def test_a_record_that_cannot_be_written_does_not_leave_its_driver_waiting(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("no space left on device")

    async def story():
        keeper = keeping.Coordinator(str(tmp_path), 1)
        await keeper.submit("trial-0000", CONFIG, queued=False)
        monkeypatch.setattr(keeping, "save_record", full)
        with pytest.raises(OSError, match="no space"):
            await keeper.fail("trial-0000", "why")
        return await ended(keeper, "trial-0000")

    assert run(story())["status"] == "failed"


def node(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_a_cluster_too_small_for_the_trials_is_refused():
    check_room(ResourcesPart(workers=2, concurrency=2, cpus_per_worker=2), [node(4), node(4)])
    with pytest.raises(InputError, match="need 8 CPUs .*the cluster has 4"):
        check_room(ResourcesPart(workers=2, concurrency=2, cpus_per_worker=2), [node(4), node(8, alive=False)])
    with pytest.raises(InputError, match="need 1 GPUs .*the cluster has 0"):
        check_room(ResourcesPart(gpus_per_worker=1), [node(4)])
    with pytest.raises(InputError, match="no node of the cluster has 6 CPUs and 0 GPUs"):
        check_room(ResourcesPart(cpus_per_worker=6), [node(4), node(4)])
