"""Adapters that cannot be right are refused alike by `merge` and by `evaluate --adapter`; the others are PEFT's."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ray_unlearn.api.merging import merge
from ray_unlearn.cli import main
from ray_unlearn.errors import InputError
from ray_unlearn.models.loading import check_adapter, load_model

Q, DOWN = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return str(path)


def made(model, folder, **settings):
    """A PEFT adapter whose matrices are all drawn anew, so that none is zero."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**(defaults | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return made(tiny.model, tmp_path_factory.mktemp("adapters") / "whole")


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(content):
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def tensors(change):
    def changed(folder):
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)

    return changed


def data(change):
    def changed(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return changed


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed(state):
    return {key.replace("layers.1.", "layers.7."): value for key, value in state.items()}


def with_nan(state):
    state[f"{Q}.lora_A.weight"][1, 2] = float("nan")
    return state


FAULTS = {
    "B missing": (tensors(without(f"{Q}.lora_B.weight")), "q_proj lacks lora_B"),
    "A missing": (tensors(without(f"{DOWN}.lora_A.weight")), "down_proj lacks lora_A"),
    "a layer the base lacks": (
        tensors(renamed),
        "changes model.layers.7.mlp.down_proj.weight, which",
    ),
    "int8": (tensors(lambda s: {k: v.to(torch.int8) for k, v in s.items()}), "has the type I8; only floating-point"),
    "NaN weights": (tensors(with_nan), "q_proj.lora_A.weight holds NaN or infinity"),
    "infinite weights": (tensors(lambda s: {k: v / 0 for k, v in s.items()}), "holds NaN or infinity"),
    "another rank": (tensors(lambda s: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in s.items()}), "has rank 2"),
    "no product": (tensors(lambda s: {k: v[:3] if "lora_A" in k else v for k, v in s.items()}), r"A of \[3, 96\]: no"),
    "no matrices": (tensors(lambda s: {"x": torch.ones(2)}), r"holds no LoRA matrices; its keys: \['x'\]"),
    "not JSON": (text("{"), "adapter_config.json is not JSON"),
    "a list": (text("[1]"), r"must hold a mapping, got \[1\]"),
    "rank 0": (config(r=0), "r must be a whole number of at least 1, got 0"),
    "rank text": (config(r="4"), "r must be a whole number of at least 1, got '4'"),
    "alpha NaN": (config(lora_alpha=float("nan")), "lora_alpha must be a finite number, got nan"),
    "alpha text": (config(lora_alpha="8"), "lora_alpha must be a finite number, got '8'"),
    "unknown type": (config(peft_type="SUPERLORA"), "peft_type is 'SUPERLORA', and only LORA"),
    "no type": (config(peft_type=None), "peft_type is None, and only LORA"),
    "targets not in the base": (
        config(target_modules=["nope"]),
        r"down_proj, which is none of .*target_modules \(\['nope'",
    ),
    "targets a bad pattern": (config(target_modules="("), r"none of its config's target_modules \('\('"),
    "targets numbers": (config(target_modules=[1]), "target_modules must be a list of names or a pattern"),
    "truncated": (data(lambda b: b[: len(b) // 2]), "is no whole safetensors file"),
    "header truncated": (data(lambda b: b[:40]), "is no whole safetensors file"),
    "garbage": (data(lambda b: bytes(range(256)) * 4), "is no whole safetensors file"),
    "empty": (data(lambda b: b""), "adapter_model.safetensors is empty"),
    "a pickle": (pickled, "adapter_model.bin, a pickle, which may run code"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "no (model directory, )?adapter"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_refused_alike_by_merge_and_evaluate(base, adapter, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(adapter)
    with pytest.raises(InputError, match=message):
        load_model(base, adapter=str(adapter))
    with pytest.raises(InputError, match=message):
        merge(base, [str(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "unheard-of"])
def test_adapters_that_belong_to_an_altered_base_are_refused_by_name(base, adapter, tmp_path, start):
    config(init_lora_weights=start)(adapter)
    for refused in (lambda: load_model(base, adapter=str(adapter)), lambda: merge(base, [adapter], tmp_path / "out")):
        with pytest.raises(InputError, match=f"init_lora_weights='{start}' altered the base .* Convert it with PEFT"):
            refused()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"use_rslora": True},
        {"lora_alpha": 5.5},
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\..*(k_proj|up_proj)"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*eva_config.*")
def test_other_adapters_merge_as_peft_merges_them(tiny, base, tmp_path, settings):
    folder = made(tiny.model, tmp_path / "adapter", **settings)
    theirs = PeftModel.from_pretrained(load_model(base), folder).merge_and_unload()
    merged = load_model(str(merge(base, [folder], tmp_path / "out", method="task_arithmetic")))
    evaluated = load_model(base, adapter=str(folder))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=1e-6)
        assert evaluated.get_parameter(name).equal(parameter)
    assert any(not p.equal(tiny.model.get_parameter(name)) for name, p in theirs.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_what_peft_alone_can_merge_is_evaluated_but_no_member(tiny, base, tmp_path, settings):
    folder = made(tiny.model, tmp_path / "adapter", **settings)
    theirs = PeftModel.from_pretrained(load_model(base), folder).merge_and_unload()
    evaluated = load_model(base, adapter=str(folder))
    assert all(parameter.equal(evaluated.get_parameter(name)) for name, parameter in theirs.named_parameters())
    with pytest.raises(InputError, match=r"cannot be merged here|It cannot be merged"):
        merge(base, [folder], tmp_path / "out")


def test_an_adapter_of_conv1d_layers_is_evaluated(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2))
    model.requires_grad_(False).save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    folder = made(model, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    name = "transformer.h.0.attn.c_attn.weight"
    evaluated = load_model(str(tmp_path / "base"), adapter=str(folder))
    assert not evaluated.get_parameter(name).equal(model.get_parameter(name))


def test_a_tensor_that_peft_has_no_place_for_is_refused(base, adapter):
    tensors(lambda state: state | {"base_model.model.model.extra.lora_magnitude_vector": torch.ones(2)})(adapter)
    with pytest.raises(InputError, match=r"PEFT has no place .*extra.lora_magnitude_vector"):
        load_model(base, adapter=str(adapter))


def test_a_base_whose_shapes_cannot_be_known_is_refused(adapter):
    with pytest.raises(InputError, match="the configuration of nobody/such-a-model cannot be loaded"):
        check_adapter(str(adapter), "nobody/such-a-model")


def test_the_commands_end_with_2_and_the_reason(base, adapter, tmp_path, capsys):
    tensors(without(f"{Q}.lora_B.weight"))(adapter)
    for row in ("forget", "retain"):
        (tmp_path / f"{row}.jsonl").write_text(
            json.dumps({"id": f"{row}-sc1", "input": row, "output": "b", "task": "T"}) + "\n"
        )
    files = ["--forget", f"{tmp_path}/forget.jsonl", "--retain", f"{tmp_path}/retain.jsonl"]
    evaluate = ["evaluate", "--model", base, "--adapter", str(adapter), *files, "--out", f"{tmp_path}/scores.json"]
    for command in (evaluate, ["merge", "--base", base, "--adapters", str(adapter), "--out", f"{tmp_path}/out"]):
        assert main(command) == 2
        assert "q_proj lacks lora_B" in capsys.readouterr().err
