"""A run's directory has one owner: a second is refused, a dead one is followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml
from small import small_job

from ray_unlearn import cli
from ray_unlearn.errors import InputError
from ray_unlearn.pipeline import lock
from ray_unlearn.pipeline.lock import owned

HOLD = "import sys, time; from ray_unlearn.pipeline.lock import owned; from pathlib import Path\n" + (
    "with owned(Path(sys.argv[1])): print('owns', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """A live process that owns the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_and_told_who_the_first_is(holder, tmp_path):
    owner = json.loads((tmp_path / "lock.json").read_text())
    assert owner["pid"] == holder.pid
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on {owner['host']}"), owned(tmp_path):
        raise AssertionError
    assert json.loads((tmp_path / "lock.json").read_text()) == owner


def test_a_second_run_is_refused_before_anything_is_built(holder, tmp_path, capsys):
    job = tmp_path / "job.yaml.txt"
    job.write_text(yaml.safe_dump(small_job(tmp_path / "cache")))
    assert cli.main(["run", str(job), "--out", str(tmp_path)]) == 2
    assert f"in use by process {holder.pid}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_an_owner_that_was_killed_is_followed_at_once_and_named(holder, tmp_path):
    holder.kill()
    holder.wait()
    said = []
    with owned(tmp_path, said.append):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert len(said) == 1 and f"process {holder.pid} on" in said[0]
    assert (tmp_path / "lock.json").read_text() == ""
    with owned(tmp_path, said.append):
        pass
    assert len(said) == 1  # whoever left properly is not spoken of


def test_an_error_in_the_block_frees_the_directory(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path):
        _ = 1 / 0
    with owned(tmp_path):
        pass


def test_another_number_again_in_use_by_a_later_process_is_not_the_owner(tmp_path):
    with owned(tmp_path):
        mine = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(mine | {"started": "1"}))
    with owned(tmp_path):
        pass


def test_an_owner_on_another_host_is_followed_after_five_silent_minutes_alone(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "since": 0.0}))
    with pytest.raises(InputError, match="process 7 on elsewhere"), owned(tmp_path):
        raise AssertionError
    silent = time.time() - lock.STALE_SECONDS - 1
    os.utime(path, (silent, silent))
    with owned(tmp_path):
        pass


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "lock.json"
    with owned(tmp_path):
        os.utime(path, (1, 1))
        limit = time.monotonic() + 10
        while path.stat().st_mtime < 2:
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_an_owner_that_was_taken_for_dead_leaves_when_it_wakes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    follower = json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "since": 0.0})
    with pytest.raises(RuntimeError, match="taken over by process 7 on elsewhere"), owned(tmp_path):
        (tmp_path / "lock.json").write_text(follower)
        time.sleep(20)
    assert (tmp_path / "lock.json").read_text() == follower


def test_of_many_that_find_a_dead_owner_one_follows(tmp_path):
    dead = {"host": lock.socket.gethostname(), "pid": os.getpid(), "started": "1", "since": 0.0}
    (tmp_path / "lock.json").write_text(json.dumps(dead))
    outcomes, gate = [], threading.Barrier(8)

    def contend():
        gate.wait()
        try:
            with owned(tmp_path):
                outcomes.append("owned")
                gate.wait(10)
        except InputError:
            outcomes.append("refused")
            gate.wait(10)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["owned"] + ["refused"] * 7
