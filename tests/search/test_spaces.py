"""Search spaces: what they return and ask for, the composite one, ranges and fixed values, unusable files."""

from __future__ import annotations

import dataclasses

import pytest
from small import sampled

from ray_unlearn.config.recipes import recipes
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.losses import METHODS, OPTIONS, parameters_of
from ray_unlearn.search.spaces import NEEDS_MORE_DATA, find_space, known_spaces, load_space, trial_config

FIELDS = [field.name for field in dataclasses.fields(TrialConfig)]


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
        assert config.method == name  # the file's name is the method's
        assert set(returned) <= {*FIELDS, *OPTIONS}
        for parameter, value in asked.items():
            found = config.options[parameter] if parameter in OPTIONS else getattr(config, parameter)
            assert returned[parameter] == value == found
        for parameter, (choice, value) in CONDITIONAL.items():
            assert choice not in asked or (parameter in asked) == (getattr(config, choice) == value), parameter
        others = {p for method in METHODS for p in parameters_of(method)} - set(parameters_of(config.method))
        assert not others & set(asked)  # nothing is searched that the method does not read
        seen |= {(choice, getattr(config, choice)) for choice, _ in CONDITIONAL.values() if choice in asked}
    assert {(choice, value) for choice, value in CONDITIONAL.values() if choice in asked} <= seen


def test_every_method_has_a_space_and_the_values_of_its_recipes_lie_inside():
    import optuna

    assert set(known_spaces()) == set(METHODS)
    for recipe in recipes().values():
        if not recipe.config:
            continue
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        space, _ = load_space([recipe.config["method"]], {})
        asked = {}
        for _ in range(20):
            trial = study.ask()
            space(trial)
            asked |= trial.distributions
        for name in {*parameters_of(recipe.config["method"]), "learning_rate"} & set(recipe.config) & set(asked):
            # A weight of 0 is another method, and weights and layers follow the model; what a loss sees is a choice.
            if (
                recipe.config[name] is not None
                and not name.endswith("_weight")
                and name not in ("rmu_layer", "forget_on")
            ):
                assert asked[name]._contains(asked[name].to_internal_repr(recipe.config[name])), (recipe.name, name)


def test_the_composite_space_makes_the_method_a_choice():
    space, texts = load_space(["composite"], {"epochs": 2, "npo_beta": 0.4})
    made = [trial_config(returned) for _, returned in sampled(space, 200)]
    assert {config.method for config in made} == set(METHODS) - set(NEEDS_MORE_DATA) == set(texts)
    assert all(config.epochs == 2 for config in made)
    assert {config.options["npo_beta"] for config in made if "npo_beta" in config.options} == {0.4}


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
    made = sampled(space, 300)
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


@pytest.mark.parametrize("where", ["", "def space(trial):\n    "])
@pytest.mark.parametrize("what", ["import sys; sys.exit(0)", "open('/no/such/file')", "raise RuntimeError('mine')"])
def test_a_space_that_exits_or_raises_is_refused_by_name(tmp_path, where, what):
    (tmp_path / "mine.py").write_text(where + what)
    with pytest.raises(InputError, match=r"search space .*mine.py.*(SystemExit|FileNotFoundError|RuntimeError)"):
        space, _ = load_space([str(tmp_path / "mine.py")], {})
        sampled(space, 1)
