"""The whole job at its smallest, through the command line, killed on the way and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
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
    command = [sys.executable, "-m", "ray_unlearn", "run", str(job), "--out", str(out), "--json", "--debug"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A run whose driver is killed by SIGKILL in its second trial, then started again until it ends."""
    root = tmp_path_factory.mktemp("job")
    job = root / "job.yaml"
    job.write_text(yaml.safe_dump(small_job(root / "cache")))
    out = root / "run"
    process = start(job, out)
    wait_for(lambda: list(out.glob("snapshots/trial-0001/00*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path.name: path.read_bytes() for path in out.glob("records/*.json")}
    process = start(job, out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return out, before, json.loads(stdout), stderr


def test_finished_trials_are_kept_and_the_trial_in_flight_restarts(killed_and_resumed):
    out, before, summary, _ = killed_and_resumed
    assert 1 <= len(before) < 3
    for name, content in before.items():
        assert (out / "records" / name).read_bytes() == content
    assert summary["trials"] == {"finished": 3, "failed": 0, "pruned": 0}
    study = optuna.load_study(study_name="trials", storage=f"sqlite:///{out / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 3 and "RUNNING" not in states
    lost = [trial for trial in study.trials if trial.state.name == "FAIL"]
    redone = [trial for trial in study.trials if "restarts" in trial.user_attrs]
    assert [trial.user_attrs["restarts"] for trial in redone] == [trial.number for trial in lost]
    assert [trial.params for trial in redone] == [trial.params for trial in lost]


def test_the_directory_is_complete_and_nothing_is_half_written(killed_and_resumed):
    out, _, _, _ = killed_and_resumed
    names = {"job.yaml", "records", "study.db", "front.json", "best", "summary.json", "report.html"}
    assert names <= {path.name for path in out.iterdir()}
    assert not [path for path in out.rglob("*.tmp") if "ray" not in path.relative_to(out).parts]
    recorded = {path.stem for path in (out / "records").glob("trial-*.json")}
    assert {path.name for path in (out / "snapshots").iterdir()} == recorded


def test_the_front_is_not_dominated_and_its_hypervolume_is_its_own(killed_and_resumed):
    out, _, summary, _ = killed_and_resumed
    front = json.loads((out / "front.json").read_text())
    points = [(m["task_aggregate"], m["mia_score"], m["utility"]) for m in front["members"]]
    assert points and not any(dominates(a, b) for a in points for b in points)
    assert front["hypervolume"] == pytest.approx(hypervolume(points)) == pytest.approx(summary["hypervolume"])


def test_best_loads_with_from_pretrained_and_scores_as_stated(killed_and_resumed):
    from ray_unlearn import evaluate

    out, _, summary, _ = killed_and_resumed
    AutoModelForCausalLM.from_pretrained(out / "best")
    AutoTokenizer.from_pretrained(out / "best")
    assert (out / "best" / "README.md").read_text().startswith("---")
    data = next((out.parent / "cache").glob("embedded-*"))
    scores = evaluate(
        str(out / "best"), str(data), str(data), mmlu=str(data / "mmlu"), max_new_tokens=24, mmlu_mode="cloze"
    )
    assert scores.task_aggregate == pytest.approx(summary["best"]["task_aggregate"])
    assert scores.utility == pytest.approx(summary["best"]["utility"])


def test_a_warm_trial_reaches_its_first_step_soon(killed_and_resumed):
    out, _, _, _ = killed_and_resumed
    later = [json.loads(path.read_text()) for path in sorted((out / "records").glob("trial-*.json"))][-1]
    assert later["seconds_to_first_step"] < 4


def test_another_job_is_refused_with_the_keys_that_differ(killed_and_resumed):
    out, _, _, _ = killed_and_resumed
    data = small_job(out.parent / "cache")
    data["search"]["trials"] = 5
    with pytest.raises(InputError, match=r"search.trials: 3 there, 5 now"):
        claim(out, from_dict(Job, data))


def test_the_report_is_written_again_from_the_records_alone(killed_and_resumed):
    from ray_unlearn.report import write_report

    out, _, _, _ = killed_and_resumed
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert write_report(out).read_bytes() == before
