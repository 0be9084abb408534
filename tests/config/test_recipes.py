"""Recipes: complete, sourced, plannable; what scaling to a smaller model changes."""

from __future__ import annotations

import pytest
import torch

from ray_unlearn.config.recipes import UNVERIFIED, Geometry, recipe, recipes, scaled
from ray_unlearn.errors import InputError
from ray_unlearn.losses import LOSSES, options_of
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


@pytest.mark.parametrize("name", [name for name in recipes() if recipe(name).config])
def test_what_decides_a_trial_acts_by_a_recipes_word_and_not_by_the_projects_default(name):
    made = recipe(name)
    stated = {"tuning", "forget_eos", "retain_eos", "lr_schedule", "warmup", "weight_decay", "max_grad_norm"}
    stated |= {"pool_tokens"} & set(options_of(made.config["method"]))
    assert stated <= set(made.config)


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        (
            "baseline",
            {"forget_eos": True, "retain_eos": True, "warmup": 0.1, "weight_decay": 0.01, "max_grad_norm": None},
        ),
        ("ails-ntua", {"forget_eos": False, "retain_eos": False, "max_grad_norm": 1.0, "weight_decay": 0.0}),
        ("zjuklab-model", {"forget_eos": True, "retain_eos": True, "schedule": "fixed_pairs", "max_grad_norm": None}),
        ("atyaephyra", {"forget_eos": False, "retain_eos": False, "pool_tokens": True, "max_grad_norm": None}),
        ("sha256", {"forget_eos": False, "retain_eos": False, "pool_tokens": True, "micro_batches": 10}),
        ("snuffleupagus", {"forget_eos": False, "retain_eos": False, "max_grad_norm": None}),
        ("open-unlearning", {"forget_eos": True, "retain_eos": True, "micro_batches": 4, "max_grad_norm": 1.0}),
        ("open-unlearning-AltPO", {"epochs": 2, "warmup": 0.5, "weight_decay": 0.01}),
    ],
)
def test_recipes_say_what_their_systems_code_does(start, wanted):
    found = [made for name, made in recipes().items() if name.startswith(start)]
    for made in found:
        assert {key: made.config[key] for key in wanted} == wanted, made.name
    assert found


def test_atyaephyras_cross_entropy_is_the_mean_over_the_batchs_tokens():
    """Rows of 4 and 60 tokens with losses of 3.0 and 0.5 nats: 0.656 there, 1.75 as a mean of rows."""
    mask = torch.arange(60) < torch.tensor([[4], [60]])
    logps = torch.tensor([[-3.0], [-0.5]]).expand(2, 60)
    for name in (name for name in recipes() if name.startswith("atyaephyra")):
        options, loss = recipe(name).trial().options, LOSSES["cross_entropy"]
        chosen = {argument: options[key] for argument, key in loss.options.items()}
        assert loss.compute(logps, mask, **chosen).item() == pytest.approx(0.65625)


def test_nothing_of_malto_but_its_method_has_a_source():
    made = recipe("malto")
    assert [key for key in made.config if key not in made.unverified] == ["method"]


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
    config = {
        "tuning": "full", "train_layers": [24, 25, 26], "rmu_layer": 26, "last_layers": 8, "learning_rate": 1e-5,
        "batch_size": 32, "micro_batches": 4, "chunk_size": 64,
    }  # fmt: skip
    new, changed = scaled(config, source, SMALL)
    assert new == {
        "tuning": "full", "train_layers": [2, 3], "rmu_layer": 3, "last_layers": 1, "learning_rate": 3.2e-4,
        "batch_size": 5, "micro_batches": 1, "chunk_size": 10,
    }  # fmt: skip
    assert "rmu_layer: 26 -> 3" in changed and len(changed) == 7
    same, nothing = scaled(config, source, source)
    assert same == config and nothing == []
    larger, _ = scaled(config, source, Geometry(layers=64, hidden=8192, rows=2224))
    assert (larger["learning_rate"], larger["batch_size"], larger["micro_batches"]) == (5e-6, 64, 8)
    assert (larger["chunk_size"], larger["last_layers"], larger["rmu_layer"]) == (128, 16, 53)


def test_scaled_adapters_rates_go_with_the_root_of_the_width_and_micro_batches_keep_their_pairs():
    """ZJUKLAB's second model pools 2 pairs to a ratio; 4 rows in 4 micro-batches would pool 1."""
    new, changed = scaled(recipe("zjuklab-model2").config, recipe("zjuklab-model2").model, SMALL)
    assert (new["batch_size"], new["micro_batches"]) == (4, 2) and "micro_batches: 4 -> 2" in changed
    assert new["learning_rate"] == pytest.approx(1e-4 * 32**0.5, rel=1e-2)


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
