"""What is trained: names, layers, adapters, shared weights, negation."""

from __future__ import annotations

import pytest
import torch

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.training.parameters import TrainableModel, check_trainable, snapshot_bytes, trained_names


def full(**more):
    return TrialConfig(tuning="full", **more)


@pytest.mark.parametrize(
    ("config", "inside", "outside"),
    [
        (full(), ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], []),
        (full(last_layers=1), ["model.layers.1.mlp.up_proj.weight"], ["model.layers.0", "embed_tokens", "model.norm"]),
        (full(train_layers=[0]), ["model.layers.0.mlp.up_proj.weight"], ["model.layers.1", "embed_tokens"]),
        (full(train_modules=r"\.mlp\."), ["model.layers.1.mlp.up_proj.weight"], ["self_attn", "embed_tokens"]),
        (
            full(train_modules="down_proj", train_layers=[1]),
            ["model.layers.1.mlp.down_proj.weight"],
            ["up_proj", "layers.0"],
        ),
    ],
)
def test_names_and_layers_say_what_is_trained_and_the_rest_is_shared_with_the_base(tiny, config, inside, outside):
    names = trained_names(tiny.model, config)
    assert set(inside) <= names and not any(part in name for part in outside for name in names)
    tuned = TrainableModel(tiny.model, config)
    base = dict(tiny.model.named_parameters())
    for name, parameter in tuned.model.named_parameters():
        assert parameter.requires_grad == (name in names) == (parameter is not base[name])
    assert sorted(tuned.names) == sorted(names)
    files = tuned.files({name: base[name] + 1.0 for name in names})
    assert abs(sum(len(data) for data in files.values()) - snapshot_bytes(tiny.model, config)) < 5000
    tuned.release()
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (full(train_modules="experts"), "'experts' is found in no parameter's name; some are"),
        (full(train_layers=[0, 2]), "train_layers names layer 2, and the model has layers 0 to 1"),
        (full(last_layers=3), "last_layers is 3, and the model has 2 layers"),
        (TrialConfig(train_layers=[5]), "train_layers names layer 5"),
        (TrialConfig(lora_targets=["c_attn"]), r"\['c_attn'\] match nothing; .*'down_proj'"),
        (TrialConfig(method="rmu", options={"rmu_layer": 7}), "rmu_layer names layer 7"),
        (TrialConfig(method="rmu", options={"rmu_layer": "block.1"}), "matches no module; .* model.layers.0"),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_what_it_has(tiny, config, message):
    with pytest.raises(InputError, match=message):
        check_trainable(tiny.model, config)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_follow_layers_scaling_and_initialisation(tiny, rslora):
    made = {}
    for init in ("kaiming", "gaussian", "xavier"):
        config = TrialConfig(
            lora_rank=4, lora_alpha=8, lora_rslora=rslora, lora_init=init, train_layers=[1], lora_targets=["q_proj"]
        )
        tuned = TrainableModel(tiny.model, config)
        assert {name.split(".lora")[0] for name in tuned.names} == {"base_model.model.model.layers.1.self_attn.q_proj"}
        layer = tuned.model.base_model.model.model.layers[1].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(8 / 2 if rslora else 8 / 4)
        assert layer.lora_B["default"].weight.eq(0).all()
        made[init] = layer.lora_A["default"].weight.detach().clone()
        tuned.release()
        assert snapshot_bytes(tiny.model, config) == 4 * 4 * (made[init].shape[1] + 32)
    assert made["gaussian"].std() == pytest.approx(1 / 4, rel=0.3)
    width = made["xavier"].shape[1]
    assert made["xavier"].std() == pytest.approx((2 / (width + 4)) ** 0.5, rel=0.3)
    assert made["kaiming"].abs().max() <= (1 / width) ** 0.5 * 1.001


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_negation_delivers_the_reference_minus_what_training_added(tiny, tuning):
    config = TrialConfig(method="task_vector", tuning=tuning, negation=0.5, lora_rank=2)
    base = {name: parameter.detach().clone() for name, parameter in tiny.model.named_parameters()}
    ids = torch.tensor([[3, 4, 5]])
    tuned = TrainableModel(tiny.model, config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    trained = tuned.model(input_ids=ids).logits
    with tuned.delivered(tuned.model):
        inside = tuned.model(input_ids=ids).logits
        if tuning == "full":
            for name, parameter in tuned.model.named_parameters():
                torch.testing.assert_close(parameter, base[name] - 0.5 * (before[name] - base[name]))
        else:
            layer = tuned.model.base_model.model.model.layers[0].mlp.up_proj
            key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
            torch.testing.assert_close(layer.lora_B["default"].weight, -0.5 * before[key])
    assert not torch.allclose(inside, trained)
    for name, parameter in tuned.model.named_parameters():
        assert torch.equal(parameter, before[name])
    tuned.release()
