"""A package outside of the repository adds a loss, a method, a metric and a sampler: a run's Ray workers use them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import optuna
import pytest
import yaml
from small import small_job

PLUGIN = """
from optuna.samplers import RandomSampler

from ray_unlearn.losses import LOSSES, METHODS
from ray_unlearn.losses.table import Loss, Method
from ray_unlearn.metrics import METRICS
from ray_unlearn.metrics.table import Metric
from ray_unlearn.search.samplers import SAMPLERS, Sampler


def halved(logps, mask):
    return 0.5 * (logps * mask).sum() / mask.sum()


LOSSES.add("halved_ascent", Loss(compute=halved, tensors=("logps", "mask")))
METHODS.add(
    "halved", Method(forget="halved_ascent", retain=("cross_entropy",), formula="w_f log p / 2 + w_r CE", source="t")
)
METRICS.add(
    "same_length",
    Metric(
        compute=lambda expected, generated: float(len(expected) == len(generated)), signals=("expected", "generated"),
        formula="share of texts of the expected length", range=(0, 1), best={"forget": 0.0, "retain": 1.0},
        collapsed="0", source="t",
    ),
)
SAMPLERS.add("plain_random", Sampler(make=lambda seed, startup, done: RandomSampler(seed + done), meaning="m", source="t"))
"""
SPACE = """
def space(trial):
    return {"method": "halved", "tuning": "lora", "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}
"""


@pytest.mark.ray
def test_a_package_elsewhere_adds_a_loss_a_metric_and_a_sampler_to_a_run(tmp_path):
    package = tmp_path / "elsewhere" / "third_party"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "rows.py").write_text(PLUGIN)
    (tmp_path / "halved.py").write_text(SPACE)
    job = small_job(tmp_path / "cache")
    job["plugins"] = ["third_party.rows"]
    job["evaluation"]["metrics"] = ["same_length"]
    job["search"] |= {"trials": 1, "spaces": [str(tmp_path / "halved.py")], "sampler": "plain_random", "ranges": {}}
    job["search"]["fixed"] = {"snapshots": 1, "epochs": 1}
    job["merge"] = {"candidates": 0}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [os.environ.get("PYTHONPATH", ""), str(package.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "ray_unlearn", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "records" / "trial-0000.json").read_text())
    assert record["config"]["method"] == "halved" and record["status"] == "finished"
    (snapshot,) = record["snapshots"]
    found = snapshot["scores"]["metrics"]["same_length"]
    assert set(found) == {"forget", "retain"} and 0 <= found["retain"]["value"] <= 1
    study = optuna.load_study(study_name="trials", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
