"""A third party's package, in no place that workers know of, adds a method, a metric and a sampler; a run uses them."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from third_parties import guests

from ray_unlearn import plugins
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.models.loading import save_model
from ray_unlearn.pipeline.run import run
from ray_unlearn.records import load_records

pytestmark = pytest.mark.ray

PACKAGE = {
    "__init__.py": "from third_acceptance import losses, metrics, samplers\n",
    "losses.py": """
from ray_unlearn.losses import LOSSES, METHODS, OPTIONS, Loss, Method, Option

def shifted(logps, mask, shift):
    return shift + (logps * mask).sum() / mask.sum()

OPTIONS.add("third_shift", Option(hint=float, default=100.0, meaning="what is added"))
LOSSES.add("third_ascent", Loss(compute=shifted, tensors=("logps", "mask"), options={"shift": "third_shift"}))
METHODS.add(
    "third_method",
    Method(forget="third_ascent", retain=("cross_entropy",), formula="shift - CE_f + CE_r", source="a test"),
)
""",
    "metrics.py": """
from ray_unlearn.metrics import METRICS, Metric

METRICS.add(
    "third_letters",
    Metric(
        compute=lambda generated: float(len(generated)), signals=("generated",), formula="letters said",
        range=(0, float("inf")), best={"forget": 0.0, "retain": 0.0}, collapsed="any", source="a test",
    ),
)
""",
    "samplers.py": """
from optuna.samplers import RandomSampler
from ray_unlearn.search.samplers import SAMPLERS, Sampler

class Lowest(RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        if name == "learning_rate":
            return distribution.low
        return super().sample_independent(study, trial, name, distribution)

def make(seed, startup, done):
    return Lowest(seed + done)

SAMPLERS.add("third_lowest", Sampler(make=make, meaning="the lowest rate", source="a test"))
""",
}
SPACE = """
def space(trial):
    rate = trial.suggest_float("learning_rate", 2e-5, 1e-3, log=True)
    return {"method": "third_method", "learning_rate": rate, "batch_size": trial.suggest_int("batch_size", 4, 40)}
"""


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """The package on this process's path alone, a space, and a model with its data in files."""
    for name, text in PACKAGE.items():
        (tmp_path / "outside" / "third_acceptance").mkdir(parents=True, exist_ok=True)
        (tmp_path / "outside" / "third_acceptance" / name).write_text(text)
    (tmp_path / "third_space.py").write_text(SPACE)
    benchmark.write(tiny.data, tmp_path)
    save_model(tiny.model, tiny.tokenizer, tmp_path / "model")
    monkeypatch.setenv("RAY_ADDRESS", "")
    with guests():
        sys.path.append(str(tmp_path / "outside"))
        yield tmp_path


def test_a_run_on_ray_workers_trains_scores_and_searches_with_a_plugins_rows(place):
    files = {name: str(place / f"{name}.jsonl") for name in ("forget", "retain", "mia_member", "mia_nonmember")}
    out = place / "run"
    run(
        {
            "plugins": ["third_acceptance"],
            "model": {"path": str(place / "model")},
            "data": {**files, "mmlu": str(place / "mmlu")},
            "evaluation": {"max_new_tokens": 8, "metrics": ["third_letters"]},
            "mmlu": {"mode": "cloze"},
            "search": {
                "trials": 2,
                "spaces": [str(place / "third_space.py")],
                "sampler": "third_lowest",
                "fixed": {"epochs": 1, "snapshots": 1, "lora_rank": 2, "third_shift": 50.0},
            },
            "resources": {"dashboard": False},
            "merge": {"candidates": 1},
            "selection": {"utility_floor": 0.1},
        },
        out,
    )
    trials, merges = load_records(out)
    assert [trial.status for trial in trials] == ["finished"] * 2 and merges[0].status == "finished"
    for trial in trials:
        assert trial.config["method"] == "third_method" and trial.config["options"]["third_shift"] == 50.0
        assert 40 < trial.course[0]["forget"] < 50  # the shift less some nats: the package's own function
        assert trial.config["learning_rate"] == 2e-5  # the package's sampler
    assert len({trial.config["batch_size"] for trial in trials}) == 2
    scores = [trial.snapshots[0].scores.metrics for trial in trials] + [merges[0].scores.metrics]
    files = [json.loads((out / name).read_text()) for name in ("baseline.json", "final.json")]
    for found in (*scores, files[0]["metrics"], files[1]["target"]["metrics"], files[1]["best"]["metrics"]):
        assert set(found["third_letters"]) == {"forget", "retain"} and found["third_letters"]["forget"]["value"] > 0
    about = yaml.safe_load((out / "job.yaml").read_text())
    assert about["plugins"] == {"third_acceptance": plugins.loaded()[-1].digest()}
