"""What Optuna is told and asked: outcomes, constraints, recovery after a kill, and which merges are proposed."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from ray_unlearn import search
from ray_unlearn.config import TrialConfig, from_dict, to_dict
from ray_unlearn.errors import InputError
from ray_unlearn.job import FirstPoint, Job
from ray_unlearn.records import MergeRecord, Scores, Snapshot, TrialRecord, save_record
from ray_unlearn.spaces import load_space


def scores(aggregate: float, mia: float, utility: float) -> Scores:
    return Scores(
        terms={}, raw={}, counts={}, task_aggregate=aggregate, mia_auc=mia / 2, mia_score=mia, utility=utility,
        final=(aggregate + mia + utility) / 3,
    )  # fmt: skip


def record(name: str, *points: Scores, status: str = "finished") -> TrialRecord:
    snapshots = tuple(
        Snapshot(id=f"{name}/{i}", step=i, phase="forget", scores=point, path="", seconds=1.0)
        for i, point in enumerate(points)
    )
    return TrialRecord(id=name, status=status, config=to_dict(TrialConfig()), snapshots=snapshots, reason="why")


@pytest.fixture
def study(tmp_path):
    return search.open_study(f"sqlite:///{tmp_path / 'study.db'}", "trials", 0, 4)


FLOOR = 0.5


def test_a_trial_is_told_its_best_feasible_snapshot_and_how_far_utility_is_from_the_floor(study):
    study.ask()
    points = scores(0.9, 0.9, 0.4), scores(0.6, 0.6, 0.6), scores(0.1, 0.1, 1.0)
    search.tell_record(study, 0, record("trial-0000", *points), FLOOR)
    (told,) = study.trials
    assert told.state is TrialState.COMPLETE and told.values == [0.6, 0.6, 0.6]
    assert told.constraints["utility_floor"] == pytest.approx(-0.1)
    assert [trial.number for trial in study.best_trials] == [0]


def test_a_trial_without_feasible_snapshot_is_told_its_highest_utility_and_is_no_best_trial(study):
    study.ask()
    search.tell_record(study, 0, record("trial-0000", scores(0.9, 0.9, 0.2), scores(0.5, 0.5, 0.5)), FLOOR)
    (told,) = study.trials
    assert told.values == [0.5, 0.5, 0.5] and told.constraints["utility_floor"] == 0
    study.ask()
    search.tell_record(study, 1, record("trial-0001", scores(0.9, 0.9, 0.2)), FLOOR)
    assert study.trials[1].constraints["utility_floor"] > 0
    assert [trial.number for trial in study.best_trials] == [0]


def test_failed_trials_and_numbers_that_are_none_are_told_as_failures(study):
    for _ in range(3):
        study.ask()
    search.tell_record(study, 0, record("trial-0000", scores(0.9, 0.9, 0.9), status="failed"), FLOOR)
    search.tell(study, 1, scores(float("nan"), 0.5, 0.5), FLOOR, {})
    search.tell_record(study, 2, record("trial-0002"), FLOOR)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 3
    assert all(trial.values is None for trial in study.trials)


def test_a_stopped_trial_is_told_its_snapshots(study):
    study.ask()
    search.tell_record(study, 0, record("trial-0000", scores(0.6, 0.6, 0.6), status="stopped"), FLOOR)
    assert study.trials[0].values == [0.6, 0.6, 0.6] and study.trials[0].user_attrs["status"] == "stopped"


def test_recovery_tells_what_is_on_record_and_queues_the_rest_again(study, tmp_path):
    for _ in range(3):
        study.ask().suggest_float("x", 0, 1)
    save_record(tmp_path, record("trial-0000", scores(0.7, 0.7, 0.7)))
    (tmp_path / "snapshots" / "trial-0001" / "00010").mkdir(parents=True)
    assert search.recover(study, tmp_path, FLOOR) == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL", "WAITING", "WAITING"]
    assert not (tmp_path / "snapshots" / "trial-0001").exists()
    again = study.ask()
    assert again.suggest_float("x", 0, 1) == study.trials[1].params["x"] and again.number == 3
    assert search.recover(study, tmp_path, FLOOR) == 1  # killed once more: only the one that ran is queued again


def test_first_points_are_queued_once(study):
    search.enqueue(study, [{"x": 0.25}, {"x": 0.5}])
    assert study.ask().suggest_float("x", 0, 1) == 0.25
    search.enqueue(study, [{"x": 0.25}, {"x": 0.5}, {"x": 0.75}])  # as after a kill between the second and the third
    assert [study.ask().suggest_float("x", 0, 1) for _ in range(2)] == [0.5, 0.75] and len(study.trials) == 3


def test_a_resumed_study_does_not_propose_its_beginning_again(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = [search.open_study(url, "trials", 3, 9).ask().suggest_float("x", 0, 1) for _ in range(3)]
    assert len(set(first)) == 3
    other = search.open_study(f"sqlite:///{tmp_path / 'other.db'}", "trials", 3, 9)
    assert other.ask().suggest_float("x", 0, 1) == first[0]  # one seed, one beginning


def test_check_space_returns_configurations_of_every_branch():
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {"snapshots": 3})
    configs, _ = search.check_space(space, 0)
    assert {config.method for config in configs} == {"ascent_kl_ce", "npo_kl_ce"}
    assert {config.tuning for config in configs} == {"lora", "full"} and {config.snapshots for config in configs} == {3}


def test_a_recipe_as_first_point_fixes_its_method_and_drops_what_the_space_does_not_ask():
    job = from_dict(Job, {"target": {"benchmark": "embedded"}, "search": {"first_points": ["zjuklab-model1"]}})
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {}, {"tuning": ["full"]})
    configs, points = search.check_space(space, 0, job.first_points(), ["tuning"])
    assert points[0]["space"] == "npo_kl_ce" and points[0]["forget_weight"] == 0.4 and "lora_rank" not in points[0]
    assert configs[-1].method == "npo_kl_ce" and configs[-1].kl_weight == 0.4


@pytest.mark.parametrize("point", [{"schedule": "pairedd"}, {"space": "npo"}])
def test_a_first_point_with_a_value_that_the_space_does_not_offer_is_refused(point):
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {})
    with pytest.raises(InputError, match="the search space refuses a trial"):
        search.check_space(space, 0, [FirstPoint(point, None)])


# -- merges ----------------------------------------------------------------------------------------

POOL = [f"trial-000{i}/00010" for i in range(5)]


def test_suggested_merges_have_distinct_members_and_weights_that_sum_to_one():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sizes = set()
    for _ in range(200):
        recipe = search.suggest_merge(study.ask(), POOL, ["ties", "linear"], 4)
        sizes.add(len(recipe.members))
        assert len(set(recipe.members)) == len(recipe.members) and sum(recipe.weights) == pytest.approx(1)
        assert recipe.method == "ties" or recipe.densities == [1.0] * len(recipe.members)
    assert sizes == {2, 3, 4}


def test_first_merges_are_the_ends_then_the_neighbours_around_one_half():
    aucs = [0.1, 0.3, 0.45, 0.62, 0.99]
    points = search.first_merges(aucs, ["ties"], 3)
    assert [(point["member_0"], point["member_1"]) for point in points] == [(0, 4), (2, 3), (1, 2), (0, 1), (3, 4)]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    search.enqueue(study, points)
    recipe = search.suggest_merge(study.ask(), POOL, ["ties"], 3)
    assert recipe.members == [POOL[0], POOL[4]] and recipe.weights == [0.5, 0.5]
    assert recipe.densities == [0.8, 0.8] and recipe.lambda_ == 1.0


def test_a_pool_of_two_leaves_no_choice_of_how_many():
    assert len(search.first_merges([0.2, 0.8], ["ties"], 3)) == 1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert len(search.suggest_merge(study.ask(), POOL[:2], ["ties"], 3).members) == 2


def test_merges_that_a_killed_driver_had_scored_are_told_and_others_are_queued_again(study):
    for _ in range(2):
        study.ask().suggest_float("x", 0, 1)
    done = MergeRecord(id="merge-0001", status="finished", recipe={}, scores=scores(0.8, 0.8, 0.8))
    search.recover_merges(study, [done], FLOOR)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "WAITING"]
    assert study.trials[1].values == [0.8, 0.8, 0.8]
    assert study.ask().suggest_float("x", 0, 1) == study.trials[0].params["x"]
