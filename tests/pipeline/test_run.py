"""The whole job at its smallest, through the command line, interrupted and killed on the way, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
import yaml
from small import small_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_unlearn.config.job import Job
from ray_unlearn.errors import InputError
from ray_unlearn.pareto import dominates, hypervolume
from ray_unlearn.pipeline.directory import claim
from ray_unlearn.schema import from_dict

pytestmark = pytest.mark.ray


def start(job: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_unlearn", "run", str(job), "--out", str(out), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """A run that gets Ctrl-C in its second trial, is killed by SIGKILL among its merges, and then ends."""
    root = tmp_path_factory.mktemp("job")
    job = root / "job.yaml"
    job.write_text(yaml.safe_dump(small_job(root / "cache")))
    out = root / "run"
    process = start(job, out)
    wait_for(lambda: list(out.glob("snapshots/trial-0001/00*")), process)
    family, began = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    interrupted = SimpleNamespace(
        code=process.returncode,
        seconds=time.monotonic() - began,
        message=message,
        left=[child for child in family if child.is_running()],
        records=contents(out),
        command=f"ray-unlearn run {job} --out {out} --json",
    )
    process = start(job, out)
    wait_for(lambda: list(out.glob("records/merge-0000.json")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = contents(out)
    process = start(job, out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return SimpleNamespace(
        out=out, interrupted=interrupted, killed=killed, summary=json.loads(stdout), records=contents(out)
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("records/*.json")}


def test_ctrl_c_in_the_search_ends_the_run_soon_says_how_to_go_on_and_leaves_no_process(disturbed):
    stopped = disturbed.interrupted
    assert stopped.code == 1 and stopped.seconds < 15
    assert stopped.command in stopped.message and "Traceback" not in stopped.message
    assert stopped.left == []
    assert [name for name in stopped.records if name.startswith("merge")] == []


def test_what_was_finished_is_kept_and_the_trial_in_flight_restarts(disturbed):
    for before in (disturbed.interrupted.records, disturbed.killed):
        assert before.items() <= disturbed.records.items()
    assert 1 <= len(disturbed.interrupted.records) < 3 < len(disturbed.killed)
    assert disturbed.summary["trials"] == {"finished": 3, "failed": 0, "pruned": 0}
    study = optuna.load_study(study_name="trials", storage=f"sqlite:///{disturbed.out / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 3 and "RUNNING" not in states
    lost = [trial for trial in study.trials if trial.state.name == "FAIL"]
    redone = [trial for trial in study.trials if "restarts" in trial.user_attrs]
    assert [trial.user_attrs["restarts"] for trial in redone] == [trial.number for trial in lost]
    assert [trial.params for trial in redone] == [trial.params for trial in lost]


def test_the_directory_is_complete_and_nothing_is_half_written(disturbed):
    out = disturbed.out
    names = {"job.yaml", "records", "study.db", "front.json", "best", "summary.json", "report.html"}
    assert names <= {path.name for path in out.iterdir()}
    assert not [path for path in out.rglob("*.tmp") if "ray" not in path.relative_to(out).parts]
    recorded = {path.stem for path in (out / "records").glob("trial-*.json")}
    assert {path.name for path in (out / "snapshots").iterdir()} == recorded


def test_the_front_is_not_dominated_and_its_hypervolume_is_its_own(disturbed):
    out, summary = disturbed.out, disturbed.summary
    front = json.loads((out / "front.json").read_text())
    points = [(m["task_aggregate"], m["mia_score"], m["utility"]) for m in front["members"]]
    assert points and not any(dominates(a, b) for a in points for b in points)
    assert front["hypervolume"] == pytest.approx(hypervolume(points)) == pytest.approx(summary["hypervolume"])


def test_best_loads_with_from_pretrained_and_scores_as_stated(disturbed):
    from ray_unlearn import evaluate

    out, summary = disturbed.out, disturbed.summary
    AutoModelForCausalLM.from_pretrained(out / "best")
    AutoTokenizer.from_pretrained(out / "best")
    assert (out / "best" / "README.md").read_text().startswith("---")
    data = next((out.parent / "cache").glob("embedded-*"))
    scores = evaluate(
        str(out / "best"), str(data), str(data), mmlu=str(data / "mmlu"), max_new_tokens=24, mmlu_mode="cloze"
    )
    assert scores.task_aggregate == pytest.approx(summary["best"]["task_aggregate"])
    assert scores.utility == pytest.approx(summary["best"]["utility"])


def test_a_warm_trial_reaches_its_first_step_soon(disturbed):
    out = disturbed.out
    later = [json.loads(path.read_text()) for path in sorted((out / "records").glob("trial-*.json"))][-1]
    assert later["seconds_to_first_step"] < 4


def test_another_job_is_refused_with_the_keys_that_differ(disturbed):
    out = disturbed.out
    data = small_job(out.parent / "cache")
    data["search"]["trials"] = 5
    with pytest.raises(InputError, match=r"search.trials: 3 there, 5 now"):
        claim(out, from_dict(Job, data))


def test_the_report_is_written_again_from_the_records_alone(disturbed):
    from ray_unlearn.report import write_report

    out = disturbed.out
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert write_report(out).read_bytes() == before
