"""What Optuna is told and asked: outcomes, constraints, recovery after a kill, and which merges are proposed."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from ray_unlearn.config.job import FirstPoint, Job
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.pareto import hypervolume
from ray_unlearn.records import MergeRecord, Scores, Snapshot, TrialRecord, save_record
from ray_unlearn.schema import from_dict, to_dict
from ray_unlearn.search.merge_space import Growth, MergeSpace, bisected
from ray_unlearn.search.merges import recover_merges, search_merges
from ray_unlearn.search.spaces import load_space
from ray_unlearn.search.study import check_space, enqueue, open_study, recover, tell, tell_record


def scores(aggregate: float, mia: float, utility: float, auc: float | None = None) -> Scores:
    area = mia / 2 if auc is None else auc
    return Scores(
        terms={}, raw={}, counts={}, task_aggregate=aggregate, mia_auc=area, mia_score=mia, utility=utility,
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
    return open_study(f"sqlite:///{tmp_path / 'study.db'}", "trials", 0, 4)


FLOOR = 0.5


def test_a_trial_is_told_its_best_feasible_snapshot_and_how_far_utility_is_from_the_floor(study):
    trial = study.ask()
    points = scores(0.9, 0.9, 0.4), scores(0.6, 0.6, 0.6), scores(0.1, 0.1, 1.0)
    tell_record(study, trial, record("trial-0000", *points), FLOOR)
    (told,) = study.trials
    assert told.state is TrialState.COMPLETE and told.values == [0.6, 0.6, 0.6]
    assert told.constraints["utility_floor"] == pytest.approx(-0.1)
    assert [trial.number for trial in study.best_trials] == [0]


def test_a_trial_without_feasible_snapshot_is_told_its_highest_utility_and_is_no_best_trial(study):
    tell_record(study, study.ask(), record("trial-0000", scores(0.9, 0.9, 0.2), scores(0.5, 0.5, 0.5)), FLOOR)
    (told,) = study.trials
    assert told.values == [0.5, 0.5, 0.5] and told.constraints["utility_floor"] == 0
    tell_record(study, study.ask(), record("trial-0001", scores(0.9, 0.9, 0.2)), FLOOR)
    assert study.trials[1].constraints["utility_floor"] > 0
    assert [trial.number for trial in study.best_trials] == [0]


def test_failed_trials_and_numbers_that_are_none_are_told_as_failures(study):
    asked = [study.ask() for _ in range(3)]
    tell_record(study, asked[0], record("trial-0000", scores(0.9, 0.9, 0.9), status="failed"), FLOOR)
    tell(study, asked[1], scores(float("nan"), 0.5, 0.5), FLOOR, {})
    tell_record(study, asked[2], record("trial-0002"), FLOOR)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 3
    assert all(trial.values is None for trial in study.trials)


def test_a_stopped_trial_is_told_its_snapshots(study):
    tell_record(study, study.ask(), record("trial-0000", scores(0.6, 0.6, 0.6), status="stopped"), FLOOR)
    assert study.trials[0].values == [0.6, 0.6, 0.6] and study.trials[0].user_attrs["status"] == "stopped"


def test_recovery_tells_what_is_on_record_and_queues_the_rest_again(study, tmp_path):
    for _ in range(3):
        study.ask().suggest_float("x", 0, 1)
    save_record(tmp_path, record("trial-0000", scores(0.7, 0.7, 0.7)))
    (tmp_path / "snapshots" / "trial-0001" / "00010").mkdir(parents=True)
    assert recover(study, tmp_path, FLOOR) == 2
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL", "WAITING", "WAITING"]
    assert not (tmp_path / "snapshots" / "trial-0001").exists()
    again = study.ask()
    assert again.suggest_float("x", 0, 1) == study.trials[1].params["x"] and again.number == 3
    assert recover(study, tmp_path, FLOOR) == 1  # killed once more: only the one that ran is queued again


def test_first_points_are_queued_once(study):
    enqueue(study, [{"x": 0.25}, {"x": 0.5}])
    assert study.ask().suggest_float("x", 0, 1) == 0.25
    enqueue(study, [{"x": 0.25}, {"x": 0.5}, {"x": 0.75}])  # as after a kill between the second and the third
    assert [study.ask().suggest_float("x", 0, 1) for _ in range(2)] == [0.5, 0.75] and len(study.trials) == 3


def test_a_resumed_study_does_not_propose_its_beginning_again(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = [open_study(url, "trials", 3, 9).ask().suggest_float("x", 0, 1) for _ in range(3)]
    assert len(set(first)) == 3
    other = open_study(f"sqlite:///{tmp_path / 'other.db'}", "trials", 3, 9)
    assert other.ask().suggest_float("x", 0, 1) == first[0]  # one seed, one beginning


def test_check_space_returns_configurations_of_every_branch():
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {"snapshots": 3})
    configs, _ = check_space(space, 0)
    assert {config.method for config in configs} == {"ascent_kl_ce", "npo_kl_ce"}
    assert {config.tuning for config in configs} == {"lora", "full"} and {config.snapshots for config in configs} == {3}


def test_a_recipe_as_first_point_fixes_its_method_and_drops_what_the_space_does_not_ask():
    job = from_dict(Job, {"target": {"benchmark": "embedded"}, "search": {"first_points": ["zjuklab-model1"]}})
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {}, {"tuning": ["full"]})
    configs, points = check_space(space, 0, job.first_points(), ["tuning"])
    assert points[0]["space"] == "npo_kl_ce" and points[0]["forget_weight"] == 0.4 and "lora_rank" not in points[0]
    assert configs[-1].method == "npo_kl_ce" and configs[-1].kl_weight == 0.4


@pytest.mark.parametrize("point", [{"schedule": "pairedd"}, {"space": "npo"}])
def test_a_first_point_with_a_value_that_the_space_does_not_offer_is_refused(point):
    space, _ = load_space(["ascent_kl_ce", "npo_kl_ce"], {})
    with pytest.raises(InputError, match="the search space .*refuses a trial"):
        check_space(space, 0, [FirstPoint(point, None)])


# -- merges ----------------------------------------------------------------------------------------

POOL = [f"trial-000{i}/00010" for i in range(5)]
AUCS = [0.1, 0.3, 0.45, 0.62, 0.99]


def merge_space(**options):
    values = {"snapshots": POOL, "aucs": AUCS, "methods": ["ties"], "max_members": 3}
    return MergeSpace(**{**values, **options})


def random_study():
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_suggested_merges_have_distinct_members_and_weights_that_sum_to_one():
    study, sizes, graded = random_study(), set(), 0
    space = merge_space(methods=[name for name in MERGES if name != "slerp"], max_members=4, layerwise=True)
    for _ in range(300):
        recipe = space.suggest(study.ask())
        sizes.add(len(recipe.members))
        assert len(set(recipe.members)) == len(recipe.members)
        for depth in (0.0, 0.4, 1.0):
            assert sum(recipe.at(depth).weights) == pytest.approx(1)
        graded += isinstance(recipe.weights[0], list)
        assert MERGES[recipe.method].uses_density or recipe.densities == [1.0] * len(recipe.members)
    assert sizes == {2, 3, 4} and 50 < graded < 200


def test_slerp_takes_two_members_whatever_the_trial_says():
    study, space = random_study(), merge_space(methods=["slerp"])
    assert {len(space.suggest(study.ask()).members) for _ in range(20)} == {2}


def test_no_merge_is_a_member_where_factors_are_merged():
    study, space = random_study(), merge_space(methods=["ties_factors", "ties"], remerged=2)
    joined = {"merge-0000": space.suggest(study.ask())}
    drawn = [space.suggest(study.ask(), joined) for _ in range(60)]
    assert {recipe.method for recipe in drawn if recipe.merges} == {"ties"}


def test_sums_may_add_members_whole_where_means_may_not():
    study, space = random_study(), merge_space(methods=["linear", "task_arithmetic"])
    largest = {"linear": 0.0, "task_arithmetic": 0.0}
    for _ in range(100):
        recipe = space.suggest(study.ask())
        largest[recipe.method] = max(largest[recipe.method], recipe.lambda_)
    assert 1.2 < largest["linear"] <= 1.4 < 1.8 < largest["task_arithmetic"] <= 2.0


def test_first_merges_are_the_ends_then_the_neighbours_around_one_half():
    points = merge_space().first_points()
    assert [(point["member_0"], point["member_1"]) for point in points] == [(0, 4), (2, 3), (1, 2), (0, 1), (3, 4)]
    study = random_study()
    enqueue(study, points)
    recipe = merge_space().suggest(study.ask())
    assert recipe.members == [POOL[0], POOL[4]] and recipe.weights == [0.5, 0.5]
    assert recipe.densities == [0.8, 0.8] and recipe.lambda_ == 1.0


@pytest.mark.parametrize(
    "methods", [["ties", "linear", "slerp"], ["della"], ["model_stock", "ties"], ["task_arithmetic", "ties"]]
)
def test_first_points_are_points_of_their_space(methods):
    space = merge_space(methods=methods, layerwise=True, remerged=2)
    study = random_study()
    points = space.first_points()
    enqueue(study, points)
    for point in points:
        recipe = space.suggest(study.ask())
        assert recipe.method == methods[0] and recipe.members == [POOL[point["member_0"]], POOL[point["member_1"]]]
        assert recipe.densities == [0.8 if MERGES[methods[0]].uses_density else 1.0] * 2


def test_a_pool_of_two_leaves_no_choice_of_how_many():
    space = merge_space(snapshots=POOL[:2], aucs=[0.2, 0.8])
    assert len(space.first_points()) == 1
    assert len(space.suggest(random_study().ask()).members) == 2


def test_merges_that_joined_the_pool_bring_their_recipes():
    study, space = random_study(), merge_space(remerged=2)
    joined = {"merge-0003": MergeRecipe(members=POOL[:2], weights=[1.0, 1.0], densities=[0.8, 0.8])}
    recipes = [space.suggest(study.ask(), joined) for _ in range(60)]
    with_merge = [recipe for recipe in recipes if "merge-0003" in recipe.members]
    assert with_merge and all(recipe.merges == joined and "merge-0003" not in recipe.leaves() for recipe in with_merge)
    assert all(not recipe.merges for recipe in recipes if "merge-0003" not in recipe.members)


def test_the_segment_is_bisected_towards_an_auc_of_one_half():
    space = merge_space(methods=["ties", "linear"], layerwise=True)
    study, known, shares = random_study(), [], []
    while (point := space.segment_point(known)) is not None:
        study.enqueue_trial(point)
        recipe = space.suggest(study.ask())
        assert recipe.method == "linear" and recipe.members == [POOL[0], POOL[-1]]
        assert space.segment_point([*known, (recipe, None)]) is None  # one at a time
        share = recipe.weights[1]
        shares.append(share)
        area = 0.1 + 0.89 * share**2
        known.append((recipe, scores(0.5, 0.5, 0.5, auc=area)))
    assert len(shares) == 5 and abs(0.1 + 0.89 * shares[-1] ** 2 - 0.5) < 0.02
    assert merge_space(aucs=[0.6, 0.7, 0.8, 0.9, 1.0]).segment_point([]) is None
    assert bisected([(0.5, 0.505)]) is None and bisected([(0.5, None)]) is None
    assert bisected([(0.5, 0.9), (0.3, 0.2)]) == pytest.approx(0.4)


def test_growth_counts_merges_that_bring_nothing_and_says_which_may_join():
    recipe = MergeRecipe(members=POOL[:2], weights=[1.0, 1.0], densities=[1.0, 1.0])
    nested = MergeRecipe(
        members=["merge-0000", POOL[0]], weights=[1.0, 1.0], densities=[1.0, 1.0], merges={"merge-0000": recipe}
    )
    growth = Growth([scores(0.5, 0.5, 0.9).objectives()], FLOOR, remerged=2)
    growth.add("merge-0000", recipe, scores(0.6, 0.6, 0.9))
    assert growth.idle == 0 and list(growth.joined) == ["merge-0000"]
    growth.add("merge-0001", recipe, None)  # failed
    growth.add("merge-0002", recipe, scores(0.9, 0.9, 0.4))  # not feasible
    growth.add("merge-0003", recipe, scores(0.6, 0.6, 0.9))  # as good as another
    assert growth.idle == 3 and growth.stalled(3) and not growth.stalled(4) and not growth.stalled(0)
    growth.add("merge-0004", nested, scores(0.7, 0.7, 0.7))
    assert growth.idle == 0 and list(growth.joined) == ["merge-0000"]
    assert growth.volume == pytest.approx(hypervolume([(0.6, 0.6, 0.9), (0.7, 0.7, 0.7)]))


def quick_study():
    return optuna.create_study(directions=["maximize"] * 3, sampler=optuna.samplers.RandomSampler(seed=0))


class Scorers:
    """Made-up outcomes of recipes, in the order in which they were started."""

    def __init__(self, outcomes, size):
        self.outcomes, self.size, self.running = outcomes, size, []

    @property
    def free(self):
        return len(self.running) < self.size

    def start(self, name, recipe):
        self.running.append((name, recipe))

    def wait(self):
        name, recipe = self.running.pop(0)
        found = self.outcomes(recipe)
        return name, found, "" if found else "it broke"


def merges_of(study, outcomes, missing, patience=0, actors=1):
    """Runs search_merges over made-up outcomes, a function of the recipe; returns what was saved."""
    saved = []
    search_merges(
        study,
        merge_space(methods=["ties", "linear"], remerged=1),
        Scorers(outcomes, actors),
        lambda name, recipe, scores, reason, seconds: saved.append((name, recipe, scores, reason)),
        Growth([], FLOOR, 1),
        missing=missing,
        patience=patience,
        utility_floor=FLOOR,
    )
    return saved


@pytest.mark.parametrize("actors", [1, 2])
def test_a_merge_search_tries_segment_and_neighbours_first_and_records_failures(actors):
    def outcome(recipe):
        return None if recipe.method == "ties" else scores(0.6, 0.6, 0.6, auc=0.9)

    study = quick_study()
    saved = merges_of(study, outcome, 12, actors=actors)
    assert [name for name, *_ in saved] == [f"merge-{number:04d}" for number in range(12)]
    segment = [
        recipe for _, recipe, _, _ in saved if recipe.members == [POOL[0], POOL[4]] and recipe.densities == [1.0] * 2
    ]
    assert len(segment) >= 5 and saved[0][1] == segment[0]
    pairs = [recipe.members for _, recipe, _, _ in saved if recipe.densities == [0.8, 0.8]]
    assert [POOL[2], POOL[3]] in pairs and [POOL[0], POOL[1]] in pairs
    assert all(reason == "it broke" for _, recipe, _, reason in saved if recipe.method == "ties")
    assert len(study.trials) == 12


def test_a_merge_search_ends_when_the_hypervolume_stops_growing():
    saved = merges_of(quick_study(), lambda recipe: scores(0.6, 0.6, 0.6, auc=0.5), 40, patience=4)
    assert len(saved) == 5


def test_merges_that_a_killed_driver_had_scored_are_told_and_others_are_queued_again(study):
    for _ in range(2):
        study.ask().suggest_float("x", 0, 1)
    done = MergeRecord(id="merge-0001", status="finished", recipe={}, scores=scores(0.8, 0.8, 0.8))
    recover_merges(study, [done], FLOOR)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "WAITING"]
    assert study.trials[1].values == [0.8, 0.8, 0.8]
    assert study.ask().suggest_float("x", 0, 1) == study.trials[0].params["x"]
