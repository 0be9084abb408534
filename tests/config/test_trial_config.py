"""Strict configuration: round trips, refusals, digests, jobs and their overrides."""

from __future__ import annotations

import dataclasses
import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from small import sampled

from ray_unlearn.config.job import Job, apply_override, differences, load_job
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.files import shipped
from ray_unlearn.losses import OPTIONS
from ray_unlearn.schema import digest, from_dict, to_dict
from ray_unlearn.search.spaces import load_space, trial_config
from ray_unlearn.search.study import check_space
from ray_unlearn.training.schedule import SCHEDULES

CHANGED = {
    "method": "npo",
    "forget_weight": 0.5,
    "retain_weight": 0.5,
    "kl_weight": 0.5,
    "forget_on": "document",
    "retain_on": "document",
    "kl_on": "answer",
    "options": {"npo_beta": 0.2},
    "negation": 2.0,
    "schedule": "sugd",
    "epochs": 6,
    "batch_size": 9,
    "retain_per_forget": 2,
    "chunk_size": 33,
    "anneal_every": 2,
    "anneal_fraction": 0.5,
    "anneal_finally": False,
    "repair_epochs": 3,
    "repair_scale": 0.5,
    "micro_batches": 2,
    "learning_rate": 2e-4,
    "lr_schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "tuning": "full",
    "train_modules": "mlp",
    "train_layers": [0, 2],
    "last_layers": 3,
    "gradient_mask": "sure",
    "mask_percentile": 90.0,
    "mask_cosine": 0.5,
    "lora_rank": 17,
    "lora_alpha": 8.0,
    "lora_rslora": True,
    "lora_init": "xavier",
    "lora_dropout": 0.1,
    "lora_targets": ["q_proj", "v_proj"],
    "forget_eos": True,
    "retain_eos": False,
    "max_length": 128,
    "zero_stage": 2,
    "snapshots": 7,
    "max_seconds": 9.5,
    "seed": 1,
}
TOGETHER = {"train_modules": {"tuning": "full"}}
"""Fields that go only with another value of one more field."""
WHOLE = {name: value for name, value in CHANGED.items() if name not in ("last_layers", "gradient_mask")}
FIELDS = [field.name for field in dataclasses.fields(TrialConfig)]


# -- TrialConfig -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{}, WHOLE, *({name: value} | TOGETHER.get(name, {}) for name, value in CHANGED.items())]
)
def test_a_trial_config_survives_the_round_trip_through_yaml(values):
    config = from_dict(TrialConfig, values)
    assert from_dict(TrialConfig, to_dict(config)) == config
    assert from_dict(TrialConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert to_dict(from_dict(TrialConfig, to_dict(config))) == to_dict(config)
    assert set(to_dict(config)) == set(FIELDS)


def test_the_digest_changes_with_every_field_and_with_nothing_else():
    assert set(CHANGED) == set(FIELDS)
    digests = [
        digest(TrialConfig()),
        *(digest(TrialConfig(**{name: CHANGED[name]} | TOGETHER.get(name, {}))) for name in FIELDS),
    ]
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
    config = from_dict(
        TrialConfig, {"method": "grad_diff", "learning_rate": "1e-4", "forget_weight": 2, "ascent_bound": "3"}
    )
    assert (config.learning_rate, config.forget_weight, config.options["ascent_bound"]) == (1e-4, 2.0, 3.0)
    assert type(config.forget_weight) is float
    with pytest.raises(InputError, match="must be a mapping of keys to values, got 3"):
        from_dict(TrialConfig, 3)


NAN, INF = float("nan"), float("inf")
OUT_OF_BOUNDS = [
    *product(("epochs", "batch_size", "chunk_size", "micro_batches", "lora_rank", "snapshots"), (0, -1)),
    *product(("anneal_every",), (0, -1)),
    *product(("retain_per_forget", "repair_epochs"), (-1,)),
    *product(("learning_rate", "npo_beta", "max_grad_norm", "repair_scale", "negation"), (0.0, -1.0, NAN, INF)),
    *product(("forget_weight", "retain_weight", "kl_weight", "weight_decay"), (-0.1, NAN, INF)),
    *product(("max_seconds", "lora_alpha"), (0.0, -1.0, NAN)),
    *product(("max_length", "last_layers"), (0,)),
    *product(("anneal_fraction",), (0.0, 1.1, NAN)),
    *product(("mask_percentile",), (-1.0, 100.0, NAN)),
    *product(("warmup", "lora_dropout"), (-0.1, 1.0, NAN)),
    *product(("zero_stage",), (-1, 4)),
    *product(("method", "forget_on", "retain_on", "kl_on", "npo_ratio", "schedule", "lr_schedule"), ("other", "")),
    *product(("tuning", "gradient_mask", "lora_init", "kl_direction"), ("other", "")),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS)
def test_every_bound_is_checked_and_named(name, value):
    with pytest.raises(InputError, match=name):
        from_dict(TrialConfig, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 1), ("retain_per_forget", 0), ("repair_epochs", 0), ("forget_weight", 0.0), ("weight_decay", 0.0),
        ("warmup", 0.99), ("zero_stage", 3), ("max_length", 1),
    ],
)  # fmt: skip
def test_the_bounds_themselves_are_allowed(name, value):
    assert getattr(from_dict(TrialConfig, {name: value}), name) == value


def test_a_near_choice_is_offered():
    with pytest.raises(InputError, match="'npo_kl'.*Did you mean 'npo_kl_ce'"):
        TrialConfig(method="npo_kl")
    with pytest.raises(InputError, match="'pair'.*Did you mean 'paired'"):
        TrialConfig(schedule="pair")


# -- a method's own parameters ---------------------------------------------------------------------


def test_a_methods_parameters_may_stand_beside_the_fields_and_get_their_defaults():
    beside = from_dict(TrialConfig, {"method": "npo", "npo_beta": 0.3})
    assert beside == from_dict(TrialConfig, {"method": "npo", "options": {"npo_beta": 0.3}})
    assert beside.options == {"npo_beta": 0.3, "npo_ratio": "sum"}
    assert TrialConfig(method="rmu").options["rmu_layer"] == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "npo", "ascent_bound": 3}, "unknown parameter of the method npo 'ascent_bound'"),
        ({"method": "npo", "options": {"npo_bta": 3}}, "npo_bta'. Did you mean 'npo_beta'"),
        ({"method": "npo", "options": 3}, "options must be a mapping"),
        ({"method": "grad_diff", "ascent_bound": 0}, "ascent_bound must be above 0 or null, got 0"),
        ({"method": "grad_diff", "ascent_bound": NAN}, "ascent_bound must be finite and above 0 or null, got nan"),
        ({"method": "ce_u", "ce_u_skip": 1.5}, "ce_u_skip must be int"),
        ({"method": "npo_renyi_ce", "renyi_alpha": 1}, "renyi_alpha must not be 1"),
        ({"method": "grad_ascent", "forget_weight": 0}, "forget_weight are all 0: nothing would be trained"),
        ({"forget_weight": 0, "kl_weight": 0, "retain_weight": 0}, "are all 0: nothing would be trained"),
        ({"tuning": "full", "train_layers": []}, "train_layers is empty"),
        ({"tuning": "full", "train_layers": [1], "last_layers": 1}, "train_layers or last_layers, not both"),
        ({"train_modules": "mlp"}, "train_modules goes with tuning: full"),
        ({"tuning": "full", "train_modules": "("}, "is no regular expression"),
        ({"gradient_mask": "sure", "zero_stage": 3}, "zero_stage 0, 1 or 2"),
    ],
)
def test_what_does_not_go_together_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrialConfig, data)


def test_every_schedule_that_a_configuration_may_name_exists():
    for name in SCHEDULES:
        assert TrialConfig(schedule=name).schedule == name
    assert not set(OPTIONS) & set(FIELDS)


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
        ({**EMBEDDED, "search": {"fixed": {"epochs": 0}}}, "search.fixed.epochs must be at least 1"),
        ({**EMBEDDED, "search": {"first_points": ["nope"]}}, "unknown recipe 'nope'"),
        ({**EMBEDDED, "search": {"first_points": [3]}}, "recipe names .* or mappings, got 3"),
        ({**EMBEDDED, "search": 3}, "search must be a mapping of keys to values, got 3"),
        ({**EMBEDDED, "merge": {"methods": ["dare"]}}, "merge.methods"),
        ({**EMBEDDED, "merge": {"candidates": -1}}, "merge.candidates must be at least 0"),
        ({**EMBEDDED, "merge": {"timeout": 0}}, "merge.timeout must be above 0 or null, got 0.0"),
        ({**EMBEDDED, "merge": {"max_members": 0}}, "merge.max_members must be at least 1"),
        ({**EMBEDDED, "selection": {"utility_floor": 0.0}}, r"utility_floor must be in \(0, 1\]"),
        ({**EMBEDDED, "selection": {"utility_floor": NAN}}, r"utility_floor must be finite and in \(0, 1\]"),
        ({**EMBEDDED, "selection": {"weights": [1, 1]}}, "selection.weights must be three numbers"),
        ({**EMBEDDED, "selection": {"weights": [0, 0, 0]}}, "selection.weights must be three numbers"),
        ({**EMBEDDED, "selection": {"weights": [1, 1, -1]}}, r"selection.weights\[2\] must be at least 0, got -1"),
        ({**EMBEDDED, "mmlu": {"mode": "words"}}, "mmlu.mode: 'words'.*cloze, letters"),
        ({**EMBEDDED, "evaluation": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({**EMBEDDED, "target": {"benchmark": "embedded", "epochs": 0}}, "target.epochs must be at least 1"),
        ({"target": {"benchmark": "embedded", "settings": {"layers": 0}}}, "target.settings.layers must be at least 1"),
        ({**EMBEDDED, "data": {"limit": {"Task1": 0}}}, "data.limit.Task1 must be at least 1"),
        ({**EMBEDDED, "data": {"limit": {"Task1": "all"}}}, "data.limit.Task1 must be int, got 'all'"),
        ({**EMBEDDED, "data": {"mia_limit": 0}}, "data.mia_limit must be at least 1 or null"),
        ({**EMBEDDED, "mmlu": {"limit": 0}}, "mmlu.limit must be at least 1 or null"),
        ({**EMBEDDED, "search": {"startup": -1}}, "search.startup must be at least 0"),
        ({**EMBEDDED, "resources": {"cpus_per_worker": 0}}, "resources.cpus_per_worker must be above 0"),
        (
            {**EMBEDDED, "resources": {"gpus_per_worker": INF}},
            "gpus_per_worker must be finite and at least 0",
        ),
        ({**EMBEDDED, "comparison": {"seeds": []}}, "comparison.seeds is empty: give at least one"),
        ({**EMBEDDED, "merge": {"methods": []}}, "merge.methods is empty: name at least one"),
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
