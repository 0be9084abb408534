"""Recipes: complete, sourced, plannable; what scaling to a smaller model changes."""

from __future__ import annotations

import pytest

from ray_unlearn.config.recipes import UNVERIFIED, Geometry, recipe, recipes, scaled
from ray_unlearn.errors import InputError
from ray_unlearn.training.parameters import check_trainable
from ray_unlearn.training.schedule import training_steps

SMALL = Geometry(layers=4, hidden=128, rows=176)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_trial_that_can_be_planned_and_every_value_has_a_source(name):
    made = recipe(name)
    assert made.system and made.source and set(made.origin) == set(made.config or made.merge)
    assert made.unverified == [key for key, origin in made.origin.items() if origin == UNVERIFIED]
    if made.merge:
        assert all(recipe(member).config for member in made.merge["members"])
        with pytest.raises(InputError, match="is a merge of"):
            made.trial()
    else:
        assert training_steps(made.trial(), 3, 4)


def test_the_published_systems_are_all_there():
    starts = {"baseline": 4, "ails-ntua": 3, "zjuklab": 3, "sha256": 1, "atyaephyra": 5, "snuffleupagus": 2, "malto": 1}
    for start, count in starts.items():
        assert sum(name.startswith(start) for name in recipes()) == count, start
    assert sum(name.startswith("open-unlearning") for name in recipes()) == 12


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(InputError, match="'zjuklab-model3'.*Did you mean 'zjuklab-model"):
        recipe("zjuklab-model3")


@pytest.mark.parametrize("name", [name for name in recipes() if recipe(name).config])
def test_scaled_recipes_fit_the_smaller_model_and_say_what_changed(name):
    from ray_unlearn.config.trial import TrialConfig
    from ray_unlearn.data.benchmarks.embedded import EmbeddedSettings, make_model
    from ray_unlearn.schema import from_dict

    config, changed = scaled(recipe(name).config, recipe(name).model, SMALL)
    check_trainable(make_model(EmbeddedSettings(), 300), from_dict(TrialConfig, config, name))
    differing = [key for key in config if config[key] != recipe(name).config[key]]
    assert [line.split(":")[0] for line in changed] == differing and "learning_rate" in differing


def test_scaling_keeps_relative_depth_width_times_rate_and_steps_of_an_epoch():
    source = Geometry(layers=32, hidden=4096, rows=1112)
    config = {"train_layers": [24, 25, 26], "rmu_layer": 26, "last_layers": 8, "learning_rate": 1e-5, "batch_size": 32}
    new, changed = scaled(config, source, SMALL)
    assert new == {
        "train_layers": [2, 3], "rmu_layer": 3, "last_layers": 1, "learning_rate": 3.2e-4, "batch_size": 5,
    }  # fmt: skip
    assert "rmu_layer: 26 -> 3" in changed and len(changed) == 5
    same, nothing = scaled(config, source, source)
    assert same == config and nothing == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snuffleupagus-7b", "train_layers names layer 24.*0 to 1"),
        ("ails-ntua-sugd", "last_layers is 8, and the model has 2"),
    ],
)
def test_a_recipe_for_layers_that_the_model_lacks_is_refused(tiny, name, message):
    with pytest.raises(InputError, match=message):
        check_trainable(tiny.model, recipe(name).trial())
