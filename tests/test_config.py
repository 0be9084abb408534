"""Strict configuration: round trips, refusals, digests, recipes, search spaces, jobs and their overrides."""

from __future__ import annotations

import dataclasses
import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from ray_unlearn.config import TrialConfig, digest, from_dict, to_dict
from ray_unlearn.errors import InputError
from ray_unlearn.job import Job, apply_override, differences, load_job
from ray_unlearn.losses import METHODS
from ray_unlearn.recipes import RECIPES, recipe
from ray_unlearn.schedule import plan
from ray_unlearn.search import check_space
from ray_unlearn.spaces import find_space, known_spaces, load_space, shipped, trial_config

CHANGED = {
    "method": "npo",
    "forget_weight": 0.5,
    "retain_weight": 0.5,
    "kl_weight": 0.5,
    "forget_on": "document",
    "retain_on": "document",
    "ascent_bound": 3.0,
    "npo_beta": 0.2,
    "npo_ratio": "mean",
    "schedule": "sugd",
    "epochs": 6,
    "batch_size": 9,
    "retain_per_forget": 2,
    "chunk_size": 33,
    "repair_epochs": 3,
    "repair_scale": 0.5,
    "micro_batches": 2,
    "learning_rate": 2e-4,
    "lr_schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "tuning": "full",
    "lora_rank": 17,
    "lora_alpha": 8.0,
    "lora_dropout": 0.1,
    "lora_targets": ["q_proj", "v_proj"],
    "forget_eos": True,
    "max_length": 128,
    "zero_stage": 2,
    "snapshots": 7,
    "max_seconds": 9.5,
    "seed": 1,
}
FIELDS = [field.name for field in dataclasses.fields(TrialConfig)]


# -- TrialConfig -----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, CHANGED, *({name: value} for name, value in CHANGED.items())])
def test_a_trial_config_survives_the_round_trip_through_yaml(values):
    config = from_dict(TrialConfig, values)
    assert from_dict(TrialConfig, to_dict(config)) == config
    assert from_dict(TrialConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert to_dict(from_dict(TrialConfig, to_dict(config))) == to_dict(config)
    assert set(to_dict(config)) == set(FIELDS)


def test_the_digest_changes_with_every_field_and_with_nothing_else():
    assert set(CHANGED) == set(FIELDS)
    digests = [digest(TrialConfig()), *(digest(TrialConfig(**{name: CHANGED[name]})) for name in FIELDS)]
    assert len(set(digests)) == len(FIELDS) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in digests)
    assert digest(TrialConfig()) == digest(to_dict(TrialConfig())) == digest(TrialConfig(seed=0))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_an_unknown_key_offers_the_nearest():
    with pytest.raises(InputError, match=r"unknown key in trial 'learnin_rate'. Did you mean 'learning_rate'\?"):
        from_dict(TrialConfig, {"learnin_rate": 1}, "trial")
    with pytest.raises(InputError, match="unknown key in search 'trails'. Did you mean 'trials'"):
        from_dict(Job, {"target": {"benchmark": "embedded"}, "search": {"trails": 1}})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 1.5, "trial.epochs must be int, got 1.5"),
        ("epochs", True, "trial.epochs must be int, got True"),
        ("epochs", "3", "trial.epochs must be int, got '3'"),
        ("epochs", None, "trial.epochs must be int, got None"),
        ("learning_rate", "fast", "trial.learning_rate must be float, got 'fast'"),
        ("learning_rate", True, "trial.learning_rate must be float, got True"),
        ("learning_rate", [1], "trial.learning_rate must be float"),
        ("method", 3, "trial.method must be str, got 3"),
        ("forget_eos", 1, "trial.forget_eos must be bool, got 1"),
        ("forget_eos", "yes", "trial.forget_eos must be bool"),
        ("lora_targets", 3, "trial.lora_targets must be"),
        ("lora_targets", [1], r"trial.lora_targets\[0\] must be str, got 1"),
        ("max_length", "12", "trial.max_length must be int"),
    ],
)
def test_a_wrong_type_is_refused_by_key_and_value(name, value, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrialConfig, {name: value}, "trial")


def test_ints_and_yamls_text_numbers_pass_for_floats():
    config = from_dict(TrialConfig, {"learning_rate": "1e-4", "forget_weight": 2, "ascent_bound": "3"})
    assert (config.learning_rate, config.forget_weight, config.ascent_bound) == (1e-4, 2.0, 3.0)
    assert type(config.forget_weight) is float
    with pytest.raises(InputError, match="must be a mapping of keys to values, got 3"):
        from_dict(TrialConfig, 3)


NAN, INF = float("nan"), float("inf")
OUT_OF_BOUNDS = [
    *product(("epochs", "batch_size", "chunk_size", "micro_batches", "lora_rank", "snapshots"), (0, -1)),
    *product(("retain_per_forget", "repair_epochs"), (-1,)),
    *product(("learning_rate", "npo_beta", "max_grad_norm", "repair_scale"), (0.0, -1.0, NAN, INF)),
    *product(("forget_weight", "retain_weight", "kl_weight", "weight_decay"), (-0.1, NAN, INF)),
    *product(("ascent_bound", "max_seconds", "lora_alpha"), (0.0, -1.0, NAN)),
    ("max_length", 0),
    *product(("warmup", "lora_dropout"), (-0.1, 1.0, NAN)),
    *product(("zero_stage",), (-1, 4)),
    *product(("method", "forget_on", "retain_on", "npo_ratio", "schedule", "lr_schedule", "tuning"), ("other", "")),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS)
def test_every_bound_is_checked_and_named(name, value):
    with pytest.raises(InputError, match=name):
        from_dict(TrialConfig, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 1), ("retain_per_forget", 0), ("repair_epochs", 0), ("forget_weight", 0.0), ("weight_decay", 0.0),
        ("warmup", 0.99), ("zero_stage", 3), ("max_length", 1), ("ascent_bound", 1e-9),
    ],
)  # fmt: skip
def test_the_bounds_themselves_are_allowed(name, value):
    assert getattr(from_dict(TrialConfig, {name: value}), name) == value


def test_a_near_choice_is_offered():
    with pytest.raises(InputError, match="'npo_kl'.*Did you mean 'npo_kl_ce'"):
        TrialConfig(method="npo_kl")
    with pytest.raises(InputError, match="'pair'.*Did you mean 'paired'"):
        TrialConfig(schedule="pair")


# -- recipes and spaces ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_trial_that_can_be_planned(name):
    config = recipe(name).trial()
    assert recipe(name).source and set(recipe(name).config) <= set(FIELDS)
    assert plan(config, 3, 4)


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(InputError, match="'zjuklab-model3'.*Did you mean 'zjuklab-model"):
        recipe("zjuklab-model3")


def sampled(space, count=50, seed=0):
    """(parameters asked for, config returned) of `count` random trials of a study in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    made = []
    for _ in range(count):
        trial = study.ask()
        returned = space(trial)
        made.append((trial.params, returned))
    return made


CONDITIONAL = {
    "lora_rank": ("tuning", "lora"),
    "repair_epochs": ("schedule", "two_phase"),
    "repair_scale": ("schedule", "two_phase"),
    "chunk_size": ("schedule", "sugd"),
}


@pytest.mark.parametrize("name", known_spaces())
def test_a_shipped_space_returns_trial_fields_and_asks_only_what_its_choices_need(name):
    space, texts = load_space([name], {})
    assert list(texts) == [name] and "def space(trial)" in texts[name]
    seen = set()
    for asked, returned in sampled(space):
        config = trial_config(returned)
        assert set(returned) <= set(FIELDS)
        for parameter, value in asked.items():
            assert returned[parameter] == value == getattr(config, parameter)
        for parameter, (choice, value) in CONDITIONAL.items():
            assert (parameter in asked) == (getattr(config, choice) == value), parameter
        own = set(METHODS[config.method].parameters)
        others = {p for method in METHODS.values() for p in method.parameters} - own
        assert not others & set(asked)  # nothing is searched that the method does not read
        seen |= {(choice, getattr(config, choice)) for choice, _ in CONDITIONAL.values()}
    assert {(choice, value) for choice, value in CONDITIONAL.values()} <= seen


def test_there_are_shipped_spaces_and_every_one_is_found_by_name():
    assert known_spaces() and all(find_space(name) == path for name, path in known_spaces().items())
    with pytest.raises(InputError, match="unknown search space 'npo_kl_cee'. Did you mean 'npo_kl_ce'"):
        find_space("npo_kl_cee")
    with pytest.raises(InputError, match=r"no such search space file: absent\.py"):
        find_space("absent.py")
    with pytest.raises(InputError, match="search.spaces is empty"):
        load_space([], {})


def test_several_spaces_make_the_space_a_choice_and_fixed_values_overrule():
    names = list(known_spaces())
    space, _ = load_space(names, {"epochs": 2, "snapshots": 3})
    made = sampled(space)
    assert {asked["space"] for asked, _ in made} == set(names)
    assert all("space" not in returned for _, returned in made)
    assert all((returned["epochs"], returned["snapshots"]) == (2, 3) for _, returned in made)
    assert {trial_config(returned).method for _, returned in made} == set(names)


def test_ranges_narrow_bounds_and_choices():
    ranges = {"epochs": [1, 2], "learning_rate": ["1e-3", 2e-3], "schedule": ["sugd"], "lora_rank": [4]}
    space, _ = load_space(list(known_spaces())[:1], {}, ranges)
    made = [trial_config(returned) for _, returned in sampled(space)]
    assert {config.epochs for config in made} == {1, 2}
    assert all(1e-3 <= config.learning_rate <= 2e-3 and config.schedule == "sugd" for config in made)
    assert {config.lora_rank for config in made if config.tuning == "lora"} == {4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def space(trial:\n", "cannot be read: SyntaxError"),
        ("1 / 0\n", "cannot be read: ZeroDivisionError"),
        ("other = 1\n", "must define `def space"),
    ],
)
def test_an_unusable_space_file_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_space([str(path)], {})


def test_a_space_that_returns_other_things_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def space(trial):\n    return {'epoch': 3}\n")
    space, _ = load_space([str(path)], {})
    with pytest.raises(InputError, match="unknown key in trial 'epoch'. Did you mean 'epochs'"):
        trial_config(space(None))
    path.write_text("def space(trial):\n    return [3]\n")
    space, _ = load_space([str(path)], {})
    with pytest.raises(InputError, match="must return a dict"):
        space(None)


# -- jobs ------------------------------------------------------------------------------------------

EMBEDDED = {"target": {"benchmark": "embedded"}}
FILES = {"forget": "f", "retain": "r", "mia_member": "m", "mia_nonmember": "n", "mmlu": "u"}


@pytest.mark.parametrize(
    "data",
    [
        EMBEDDED,
        {"model": {"path": "m", "dtype": "bfloat16"}, "data": {**FILES, "limit": {"Task1": 3}}},
        {"target": {"base": "b"}, "data": {**FILES, "limit": 4}},
        {**EMBEDDED, "search": {"first_points": ["baseline-npo", {"epochs": 3}], "fixed": {"epochs": 2}}},
    ],
)
def test_a_job_survives_the_round_trip_through_yaml(data):
    job = from_dict(Job, data)
    plain = yaml.safe_load(yaml.safe_dump(to_dict(job)))
    assert from_dict(Job, plain) == job and to_dict(from_dict(Job, plain)) == plain
    assert differences(to_dict(job), plain) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "exactly one of model.path, target.benchmark and target.base"),
        ({**EMBEDDED, "model": {"path": "m"}}, "exactly one of model.path, target.benchmark and target.base"),
        ({"model": {"path": "m"}, "data": {"forget": "f"}}, "data.retain is missing"),
        ({"target": {"benchmark": "embeded"}}, "Did you mean 'embedded'"),
        ({**EMBEDDED, "model": {"dtype": "float8"}}, "model.dtype"),
        ({**EMBEDDED, "resources": {"executor": "hot"}}, "resources.executor"),
        ({**EMBEDDED, "resources": {"workers": 0}}, "resources.workers must be at least 1, got 0"),
        ({**EMBEDDED, "resources": {"concurrency": 0}}, "resources.concurrency must be at least 1"),
        ({**EMBEDDED, "search": {"trials": 0}}, "search.trials must be at least 1"),
        ({**EMBEDDED, "search": {"fixed": {"epoch": 1}}}, "unknown key in search.fixed 'epoch'"),
        ({**EMBEDDED, "search": {"fixed": {"epochs": 0}}}, "epochs must be at least 1"),
        ({**EMBEDDED, "search": {"first_points": ["nope"]}}, "unknown recipe 'nope'"),
        ({**EMBEDDED, "search": {"first_points": [3]}}, "recipe names .* or mappings, got 3"),
        ({**EMBEDDED, "search": 3}, "search must be a mapping of keys to values, got 3"),
        ({**EMBEDDED, "merge": {"methods": ["dare"]}}, "merge.methods"),
        ({**EMBEDDED, "merge": {"candidates": -1}}, "merge.candidates must be at least 0"),
        ({**EMBEDDED, "merge": {"max_members": 0}}, "merge.max_members must be at least 1"),
        ({**EMBEDDED, "selection": {"utility_floor": 0.0}}, r"utility_floor must be in \(0, 1\]"),
        ({**EMBEDDED, "selection": {"utility_floor": NAN}}, r"utility_floor must be in \(0, 1\]"),
        ({**EMBEDDED, "selection": {"weights": [1, 1]}}, "selection.weights must be three numbers"),
        ({**EMBEDDED, "selection": {"weights": [0, 0, 0]}}, "selection.weights must be three numbers"),
        ({**EMBEDDED, "selection": {"weights": [1, 1, -1]}}, "selection.weights must be three numbers"),
        ({**EMBEDDED, "mmlu": {"mode": "words"}}, "mmlu.mode .*must be letters or cloze"),
        ({**EMBEDDED, "evaluation": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({**EMBEDDED, "target": {"benchmark": "embedded", "epochs": 0}}, "target.epochs must be at least 1"),
        ({**EMBEDDED, "target": {"benchmark": "embedded", "settings": {"layer": 1}}}, "target.settings 'layer'"),
    ],
)
def test_a_job_that_cannot_run_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        from_dict(Job, data)


def write_job(tmp_path, text="target: {benchmark: embedded}\nsearch: {trials: 3}\n"):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_overrides_set_nested_keys_with_yaml_values(tmp_path):
    sets = [
        "seed=4",
        "search.trials=7",
        "search.fixed.epochs=2",
        "search.fixed.lora_targets=[q_proj]",
        "target.learning_rate=1e-3",
        "data.limit={Task1: 2}",
        "search.storage=sqlite:///a=b.db",
        "resources.dashboard=false",
        "evaluation.max_new_tokens=8",
    ]
    job = load_job(write_job(tmp_path), sets)
    assert (job.seed, job.search.trials, job.evaluation.max_new_tokens) == (4, 7, 8)
    assert job.search.fixed == {"epochs": 2, "lora_targets": ["q_proj"]}
    assert job.target.learning_rate == 1e-3 and job.target.benchmark == "embedded"
    assert job.data.limit == {"Task1": 2} and job.resources.dashboard is False
    assert job.search.storage == "sqlite:///a=b.db"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set takes key=value with a dotted key, got 'seed'"),
        ("=3", "--set takes key=value"),
        ("search.trials.x=1", "--set search.trials.x=1: 'trials' is not a mapping"),
        ("search.trials=[1", "the value is not YAML"),
        ("search.trails=3", "unknown key in search 'trails'. Did you mean 'trials'"),
        ("serch.trials=3", "'serch'. Did you mean 'search'"),
        ("search.trials=many", "search.trials must be int, got 'many'"),
        ("search.fixed.epoch=3", "unknown key in search.fixed 'epoch'"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_job(write_job(tmp_path), [override])


def test_an_override_changes_nothing_else():
    data = {"search": {"trials": 3, "startup": 1}}
    apply_override(data, "search.trials=5")
    assert data == {"search": {"trials": 5, "startup": 1}}


@pytest.mark.parametrize("text", ["- 1\n", "3\n", "a: [\n", "a: b: c\n"])
def test_an_unreadable_job_file_is_refused_by_its_name(tmp_path, text):
    with pytest.raises(InputError, match=r"job\.yaml (must hold a mapping|is not readable YAML)"):
        load_job(write_job(tmp_path, text))
    with pytest.raises(InputError, match=r"no such job file: .*absent\.yaml"):
        load_job(tmp_path / "absent.yaml")


def test_differences_name_the_dotted_keys_and_both_values():
    one, other = from_dict(Job, EMBEDDED), from_dict(Job, {**EMBEDDED, "seed": 2, "search": {"trials": 5}})
    assert differences(to_dict(one), to_dict(other)) == [
        f"search.trials: {one.search.trials} there, 5 now",
        "seed: 0 there, 2 now",
    ]


@pytest.mark.parametrize("path", sorted(shipped("jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_job_loads_and_its_space_can_be_sampled(path: Path, monkeypatch):
    for name in re.findall(r"\$\{?(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "somewhere")
    job = load_job(path)
    space, _ = load_space(job.search.spaces, job.search.fixed, job.search.ranges)
    asked = set()
    for parameters, returned in sampled(space, 30):
        trial_config(returned)
        asked |= set(parameters)
    assert set(job.search.ranges) <= asked
    configs, points = check_space(space, job.seed, job.first_points(), list(job.search.ranges))
    assert len(points) == len(job.search.first_points) and all(set(point) <= asked for point in points)
    assert all(config.seed == 0 for config in configs)
