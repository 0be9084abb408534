"""Trials on real Ray Train workers with DeepSpeed engines: cold, warm, two workers, killed workers, failures."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack

import psutil
import pytest
from small import SETTINGS

from ray_unlearn import cli
from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.data.rows import load_documents, load_pair
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.loading import save_model
from ray_unlearn.records import load_records
from ray_unlearn.schema import to_dict

pytestmark = pytest.mark.ray

TRIAL = TrialConfig(
    method="npo_kl_ce",
    forget_on="document",
    epochs=1,
    batch_size=4,
    retain_per_forget=1,
    learning_rate=1e-3,
    lora_rank=4,
    snapshots=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data and an untrained model in files: what a trial needs, without the minutes that a target takes."""
    place = tmp_path_factory.mktemp("trial-data")
    data = benchmark.make(SETTINGS)
    benchmark.write(data, place)
    tokenizer = benchmark.make_tokenizer(data, SETTINGS.vocabulary)
    save_model(benchmark.make_model(SETTINGS, len(tokenizer)), tokenizer, place / "model")
    return place


@pytest.fixture(scope="module")
def ray_here():
    from ray_unlearn.cluster.session import cluster

    with cluster("local", ResourcesPart(dashboard=False)):
        yield


@pytest.fixture
def launch(place, ray_here, tmp_path):
    """Starts an executor of given resources; closes it afterwards."""
    from ray_unlearn.cluster.executor import Executor
    from ray_unlearn.cluster.model_transfer import ModelSource, WorkerSpec

    stack = ExitStack()

    def start(shared: bool = True, **resources):
        dev, questions = load_mmlu(place / "mmlu")
        forget, retain = (loaded.examples for loaded in load_pair(place, place))
        members, nonmembers = (load_documents(place / f"mia_{name}.jsonl") for name in ("member", "nonmember"))
        spec = WorkerSpec(
            model=ModelSource.of(str(place / "model"), shared=shared),
            forget=forget,
            retain=retain,
            eval_set=EvalSet(
                forget=forget, retain=retain, members=members, nonmembers=nonmembers, dev=dev, questions=questions
            ),
            eval_settings=EvalSettings(max_new_tokens=8, batch_size=64, mmlu_mode="cloze"),
            dtype="float32",
            utility_floor=0.0,
        )
        return stack.enter_context(Executor(tmp_path, spec, ResourcesPart(**resources), tmp_path / "ray")).handle

    with stack:
        yield start


def outcome(handle, trial: TrialConfig, name: str = "trial-0000"):
    from ray_unlearn.cluster.executor import events

    *_, (last, content) = events(handle, name, to_dict(trial))
    assert last == "ended"
    return content


def test_a_cold_zero_3_trial_on_two_workers_through_the_command_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    config = tmp_path / "trial.yaml"
    config.write_text(json.dumps(to_dict(TRIAL)))
    argv = ["train", "--model", str(place / "model"), "--forget", str(place), "--retain", str(place), "--json"]
    argv += ["--config", str(config), "--set", "zero_stage=3", "--set", "batch_size=3", "--workers", "2"]
    argv += ["--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--debug"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"
    (record,), _ = load_records(tmp_path / "out")
    assert record.config["zero_stage"] == 3 and len(record.snapshots) == 2
    assert (tmp_path / "out" / record.snapshots[0].path / "adapter_model.safetensors").exists()
    assert record.course[0]["tokens_per_second"] > 0 and record.course[0]["memory_mb"] > 0


def test_two_workers_with_zero_2_train_as_one_worker_without(launch, tmp_path):
    """Two cold ZeRO-2 workers see the same losses, gradient norms and scores as one warm stage-0 worker."""
    two = launch(workers=2, executor="cold")
    assert outcome(two, TrialConfig(**to_dict(TRIAL) | {"zero_stage": 2}))["status"] == "finished"
    one = launch(shared=False, executor="warm")
    assert outcome(one, TRIAL, "trial-0001")["status"] == "finished"
    (left, right), _ = load_records(tmp_path)
    for a, b in zip(left.course, right.course, strict=True):
        for key in ("loss", "forget", "retain", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), (key, a, b)
    assert left.snapshots[-1].scores.mia_auc == pytest.approx(right.snapshots[-1].scores.mia_auc, abs=0.02)


def test_warm_failures_are_records_and_a_killed_worker_gives_its_trial_back(launch, tmp_path):
    from ray_unlearn.cluster.executor import events

    handle = launch(executor="warm")
    wild = {"learning_rate": 1e30, "method": "grad_ascent", "options": {}, "max_grad_norm": 1e30}
    diverging = TrialConfig(**to_dict(TRIAL) | wild)
    ended = outcome(handle, diverging)
    assert ended["status"] == "failed" and "step" in ended["reason"], ended
    misfit = TrialConfig(**to_dict(TRIAL) | {"lora_targets": ["no_such_layer"]})
    ended = outcome(handle, misfit, "trial-0001")
    assert ended["status"] == "failed" and "no_such_layer" in ended["reason"] and "q_proj" in ended["reason"]
    long = TrialConfig(**to_dict(TRIAL) | {"epochs": 12, "snapshots": 4})
    killed, content = False, {}
    for name, content in events(handle, "trial-0002", to_dict(long)):  # noqa: B007
        if name == "snapshot" and not killed:
            killed = True
            for process in psutil.Process().children(recursive=True):  # this test's own cluster, and no other
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
    assert content["status"] == "finished"
    trials, _ = load_records(tmp_path)
    assert [trial.status for trial in trials] == ["failed", "failed", "finished"]
    assert not trials[0].snapshots and not trials[1].snapshots
    assert trials[2].attempts == 2 and len(trials[2].snapshots) == 4


def test_the_error_of_any_rank_is_the_reason(launch, tmp_path):
    """On a real group of two, rank 1 fails while rank 0 waits for it in a collective."""
    import ray

    from ray_unlearn.cluster.executor import TrainWorker, _run

    handle = launch(workers=2, executor="cold")

    class Half:
        """A worker's state of which rank 1 cannot read the data."""

        def __init__(self, worker):
            self.worker = worker

        @property
        def forget(self):
            if self.worker.rank == 1:
                raise OSError("rows unreadable here")
            return self.worker.gather([])

    def loop(config):
        worker = TrainWorker(config["coordinator"], config["slot"])
        if worker.rank == 0:
            ray.get(worker.coordinator.begin.remote("trial-0000"))
        worker.gather([])
        _run(worker, "trial-0000", config["config"], Half(worker))

    ray.get(handle.coordinator.submit.remote("trial-0000", to_dict(TRIAL), False))
    with pytest.raises(Exception, match="rows unreadable here"):
        handle.trainer(loop, "half", 0, config=to_dict(TRIAL)).fit()
    ray.get(handle.coordinator.fail.remote("trial-0000", "the Train run failed"))
    (record,), _ = load_records(tmp_path)
    assert record.reason == "rank 1: OSError: rows unreadable here"


def test_hundreds_of_trials_may_wait_for_their_events_while_others_post(ray_here, tmp_path):
    import ray

    from ray_unlearn.cluster.executor import start_coordinator

    coordinator = start_coordinator(tmp_path, 300)
    names = [f"trial-{number:04d}" for number in range(300)]
    ray.get([coordinator.submit.remote(name, {}, False) for name in names])
    waiting = [coordinator.next_event.remote(name) for name in names]
    ended = {"status": "failed", "reason": "why"}
    posts = [coordinator.post.remote(0, name, "ended", ended) for name in names]
    assert ray.get(posts, timeout=60) == [True] * 300
    assert ray.get(waiting, timeout=60) == [("ended", ended)] * 300
    ray.kill(coordinator)
