"""Recipes side by side: which runs a job makes of them, and the table of what came of them."""

from __future__ import annotations

import pytest

from ray_unlearn.config.job import Job
from ray_unlearn.config.recipes import recipes
from ray_unlearn.errors import InputError
from ray_unlearn.models.loading import save_model
from ray_unlearn.pipeline.comparison import configs, entries, markdown, table
from ray_unlearn.records import MergeRecord, Scores, Snapshot, TrialRecord
from ray_unlearn.schema import from_dict


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("compared") / "model"
    save_model(tiny.model, tiny.tokenizer, place)
    return str(place)


def job(**comparison):
    return from_dict(Job, {"target": {"benchmark": "embedded"}, "comparison": comparison})


def test_every_recipe_meets_every_seed_and_merges_are_numbered_apart(model):
    made = job(recipes=["all"], seeds=[4, 5], scale_to_model=True)
    planned = entries(made, model, 20)
    assert planned == entries(made, model, 20)
    assert [(entry.recipe.name, entry.seed) for entry in planned] == [(n, s) for n in recipes() for s in (4, 5)]
    trials = [entry for entry in planned if entry.config]
    assert [entry.id for entry in trials] == [f"trial-{i:04d}" for i in range(made.trials)]
    assert [entry.id for entry in planned if not entry.config] == ["merge-0000", "merge-0001"]
    assert {config.seed for config in configs(planned)} == {4, 5} and len(configs(planned)) == made.trials
    assert all("learning_rate" in " ".join(entry.changed) for entry in trials)


def test_a_job_of_unknown_recipes_or_without_seeds_is_refused_and_the_jobs_own_values_overrule():
    with pytest.raises(InputError, match="unknown recipe 'baseline-npo2'. Did you mean 'baseline-npo'"):
        job(recipes=["baseline-npo2"])
    with pytest.raises(InputError, match="comparison.seeds is empty"):
        job(recipes=["all"], seeds=[])
    assert job().trials == job().search.trials


def test_fixed_values_of_the_job_overrule_a_recipes(model):
    made = from_dict(
        Job,
        {
            "target": {"benchmark": "embedded"},
            "comparison": {"recipes": ["baseline-npo"]},
            "search": {"fixed": {"snapshots": 2, "epochs": 1}},
        },
    )
    (config,) = configs(entries(made, model, 20))
    assert (config.snapshots, config.epochs, config.learning_rate) == (2, 1, 1e-5)


def scores(final, utility=0.5):
    return Scores(terms={}, raw={}, counts={}, task_aggregate=0.1, mia_score=0.2, utility=utility, final=final)


def trial(name, *finals, status="finished", reason="", seconds=10.0):
    shots = tuple(
        Snapshot(id=f"{name}/{i}", step=i, phase="forget", scores=scores(final), path="", seconds=1.0)
        for i, final in enumerate(finals)
    )
    return TrialRecord(id=name, status=status, reason=reason, config={}, snapshots=shots, seconds=seconds)


def test_the_table_takes_the_last_snapshot_the_best_on_the_way_and_says_what_failed(model):
    made = job(recipes=["baseline-npo", "malto", "zjuklab-merge"], seeds=[0, 1])
    planned = entries(made, model, 20)
    records = [
        trial("trial-0000", 0.2, 0.9, 0.4, seconds=10),
        trial("trial-0001", 0.6, seconds=20),
        trial("trial-0002", status="failed", reason="step 3: loss is nan"),
    ]
    merges = [MergeRecord(id="merge-0000", status="finished", recipe={}, scores=scores(0.7), seconds=3.0)]
    rows = {row["recipe"]: row for row in table(planned, records, merges)}
    assert rows["baseline-npo"]["final"] == [0.4, 0.6] and rows["baseline-npo"]["best_final"] == [0.9, 0.6]
    assert rows["baseline-npo"]["seconds"] == 15 and rows["baseline-npo"]["failed"] == []
    assert rows["malto"]["failed"] == ["seed 0: step 3: loss is nan", "seed 1: no record"]
    assert rows["malto"]["final"] == []
    assert rows["zjuklab-merge"]["final"] == [0.7] and rows["zjuklab-merge"]["failed"] == ["seed 1: no record"]
    text = markdown(list(rows.values()))
    lines = text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == ["zjuklab-merge", "baseline-npo", "malto"]
    assert "0.500 ± 0.141" in lines[3] and "0.750 ± 0.212" in lines[3] and lines[3].endswith("| 15 |")
    assert "failed" in lines[4] and "* malto, seed 0: step 3: loss is nan" in lines
