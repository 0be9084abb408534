"""What may be merged, and merges that are written as adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from made_merges import weights_of
from safetensors.torch import load_file, save, save_file

from ray_unlearn.errors import InputError
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.members import Member
from ray_unlearn.merging.resident import Merger


def saved(files, folder):
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapters_delta_is_what_peft_itself_merges(bench, members, tmp_path, rslora):
    from peft import PeftModel

    for name in ("lora-a", "lora-b"):
        config = json.loads(members[name]["adapter_config.json"]) | {"use_rslora": rslora}
        files = members[name] | {"adapter_config.json": json.dumps(config).encode()}
        folder = saved(files, tmp_path / name)
        peft = PeftModel.from_pretrained(copy.deepcopy(bench.model), folder).merge_and_unload()
        member = Member.of(folder, bench.model, name)
        for key, parameter in peft.named_parameters():
            base = bench.model.get_parameter(key)
            torch.testing.assert_close(parameter, base + member.delta(key, base), rtol=0, atol=1e-6)


def test_members_of_another_base_are_refused(bench, members, tiny):
    from ray_unlearn.data.benchmarks import embedded as benchmark

    settings = benchmark.EmbeddedSettings(hidden=16, layers=1)
    other = copy.copy(bench)
    other.model = benchmark.make_model(settings, len(tiny.tokenizer))
    for name in ("lora-a", "full"):
        with pytest.raises(InputError, match=f"{name} changes .* another base"):
            Merger(other.model, {name: members[name]})


@pytest.mark.parametrize("setting", ["use_dora", "modules_to_save", "rank_pattern", "fan_in_fan_out"])
def test_adapters_that_are_more_than_b_times_a_are_refused(bench, members, setting):
    value = ["lm_head"] if setting == "modules_to_save" else {"q_proj": 3} if setting == "rank_pattern" else True
    config = json.loads(members["lora-a"]["adapter_config.json"]) | {setting: value}
    with pytest.raises(InputError, match=f"odd: adapters with {setting}="):
        Member.of(members["lora-a"] | {"adapter_config.json": json.dumps(config).encode()}, bench.model, "odd")


def test_an_adapter_with_other_tensors_beside_its_matrices_is_refused(bench, members, tmp_path):
    folder = saved(members["lora-a"], tmp_path / "odd")
    state = load_file(folder / "adapter_model.safetensors")
    save_file({**state, "base_model.model.model.norm.weight": torch.ones(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"changes more than linear layers through LoRA: .*norm.weight"):
        Member.of(folder, bench.model, "odd")


@pytest.fixture
def checkpoint(base_path, tmp_path):
    """A full checkpoint whose tensors a test may change: (folder, tensors, save)."""
    import shutil

    folder = shutil.copytree(base_path, tmp_path / "checkpoint")
    state = load_file(folder / "model.safetensors")
    return folder, state, lambda changed: save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_full_checkpoint_is_read_tensor_by_tensor(bench, base_path, checkpoint):
    folder, state, save = checkpoint
    name = "model.layers.1.mlp.up_proj.weight"
    save(state | {name: state[name] + 0.5})
    merger = Merger(bench.model, {"full": folder}, base_path)
    merger.merge(MergeRecipe(members=["full"], weights=[1.0], densities=[1.0]))
    torch.testing.assert_close(bench.model.get_parameter(name), state[name] + 0.5, rtol=0, atol=1e-6)
    merger.restore()
    assert bench.model.get_parameter(name).equal(state[name])


def test_a_checkpoint_that_lacks_tensors_is_refused_with_their_names(bench, checkpoint):
    folder, state, save = checkpoint
    save({key: value for key, value in state.items() if "layers.1.mlp" not in key})
    with pytest.raises(InputError, match=r"short lacks 3 tensors of the base: .*layers.1.mlp.gate_proj"):
        Member.of(folder, bench.model, "short")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"model.norm.weight": torch.ones(3)}, r"model.norm.weight of shape \[3\]; the base's is \[32\]"),
        (lambda state: {"extra.weight": torch.ones(3)}, "changes extra.weight, which the base does not have"),
        (lambda state: {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "int8; only floating point"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(bench, checkpoint, change, message):
    folder, state, save = checkpoint
    save(state | change(state))
    with pytest.raises(InputError, match=message):
        Member.of(folder, bench.model, "odd")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_a_member_that_holds_no_number_is_refused_by_name(
    bench, members, base_path, checkpoint, tmp_path, value, method
):
    from ray_unlearn.merging.writer import write_merge

    folder, state, write = checkpoint
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][2, 3] = value
    write(state)
    snapshot = {"changed.safetensors": save({name: state[name]})}
    recipe = MergeRecipe(method=method, members=["odd", "full"], weights=[1.0, 1.0], densities=[0.5, 0.5])
    for odd in (folder, snapshot):
        with pytest.raises(InputError, match=rf"odd holds NaN or infinity in {name}"):
            Merger(bench.model, {"odd": odd, "full": members["full"]})
        with pytest.raises(InputError, match=rf"odd holds NaN or infinity in {name}"):
            write_merge(recipe, base_path, {"odd": odd, "full": members["full"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_gives_no_number_is_refused_with_its_numbers(bench, members, base_path, tmp_path):
    from ray_unlearn.merging.adapter import write_adapter
    from ray_unlearn.merging.writer import write_merge

    numbers = {"weights": [1e38], "densities": [1.0], "lambda_": 1e38}
    recipe = MergeRecipe(method="task_arithmetic", members=["full"], **numbers)
    merger = Merger(bench.model, members)
    with pytest.raises(InputError, match=r"task_arithmetic merge of \['full'\] gives NaN or infinity in .*lambda 1e"):
        merger.merge(recipe)
    merger.restore()
    with pytest.raises(InputError, match=r"gives NaN or infinity in model.*weights \[1e\+38\]"):
        write_merge(recipe, base_path, members, tmp_path / "out")
    adapters = dataclasses.replace(recipe, members=["lora-a"])
    with pytest.raises(InputError, match="the adapter's model.* would hold NaN or infinity"):
        write_adapter(adapters, bench.model, base_path, members, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_that_holds_no_number_is_not_written_again(members, checkpoint, tmp_path):
    from ray_unlearn.merging.writer import write_merge

    folder, state, write = checkpoint
    state["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    write(state)
    recipe = MergeRecipe(members=["lora-b"], weights=[1.0], densities=[1.0])  # changes q_proj and down_proj alone
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj.weight of the model to be written holds NaN"):
        write_merge(recipe, str(folder), members, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_merged_once_and_stay_tied(tmp_path):

    from transformers import AutoModelForCausalLM, LlamaConfig

    from ray_unlearn.merging.combine import merge_change
    from ray_unlearn.merging.writer import _write_tensors
    from ray_unlearn.models.stored_tensors import StoredTensors

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))
    model.requires_grad_(False).save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(model)
    tuned.model.embed_tokens.weight.add_(0.25)
    tuned.save_pretrained(tmp_path / "tuned")
    recipe = MergeRecipe(members=["tuned"], weights=[1.0], densities=[1.0])
    merger = Merger(model, {"tuned": tmp_path / "tuned"}, str(tmp_path / "base"))
    merger.merge(recipe)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, tuned.lm_head.weight)
    # A file that holds the tied tensor twice is written with it once.
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    change = merge_change(model, recipe, {"tuned": tmp_path / "tuned"})
    _write_tensors(change, model, StoredTensors(tmp_path / "base"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written
    assert written["model.embed_tokens.weight"].equal(model.model.embed_tokens.weight)


def test_ties_on_factors_refuses_checkpoints_and_warns_of_unlike_starts(bench, members):
    merger = Merger(bench.model, members)
    common = {"method": "ties_factors", "weights": [1.0, 1.0], "densities": [0.8, 0.8]}
    with pytest.raises(InputError, match="full is no adapter; use ties"):
        merger.merge(MergeRecipe(members=["lora-a", "full"], **common))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merger.merge(MergeRecipe(members=["lora-a", "lora-c"], **common))  # one seed, hence one start
    with pytest.warns(UserWarning, match="lora-a and lora-d do not share an initialisation"):
        merger.merge(MergeRecipe(members=["lora-a", "lora-d"], **common))
    merger.restore()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties_factors"])
def test_linear_merges_are_adapters_exactly(bench, members, base_path, tmp_path, method):
    from peft import PeftModel

    from ray_unlearn.merging.adapter import write_adapter

    names = ["lora-a", "lora-c"] if method == "ties_factors" else ["lora-a", "lora-b", "lora-c"]
    recipe = MergeRecipe(
        method=method,
        members=names,
        weights=[0.4, [1.0, -0.5], 0.7][: len(names)] if method != "ties_factors" else [0.4, 0.7],
        densities=[0.8] * len(names),
        lambda_=0.9,
    )
    report = write_adapter(recipe, bench.model, base_path, members, tmp_path / "out")
    assert report.exact and report.error == 0 and report.rank == {2: 4, 3: 10}[len(names)]
    peft = PeftModel.from_pretrained(copy.deepcopy(bench.model), tmp_path / "out").merge_and_unload()
    merger = Merger(bench.model, members)
    merger.merge(recipe)
    for name, tensor in weights_of(bench.model).items():
        torch.testing.assert_close(peft.get_parameter(name), tensor, rtol=0, atol=2e-6)
    merger.restore()


def test_other_merges_are_cut_to_a_rank_and_the_error_is_what_the_adapter_misses(bench, members, base_path, tmp_path):
    from peft import PeftModel

    from ray_unlearn.merging.adapter import write_adapter

    recipe = MergeRecipe(members=["lora-a", "lora-b"], weights=[1.0, 2.0], densities=[0.5, 0.5])
    errors = []
    merger = Merger(bench.model, members)
    merger.merge(recipe)
    whole = weights_of(bench.model)
    merger.restore()
    for rank in (2, None, 32):
        report = write_adapter(recipe, bench.model, base_path, members, tmp_path / "out", rank)
        assert not report.exact and report.rank == (rank or 6)
        peft = PeftModel.from_pretrained(copy.deepcopy(bench.model), tmp_path / "out").merge_and_unload()
        missed = sum((peft.get_parameter(name) - tensor).square().sum() for name, tensor in whole.items())
        moved = sum((bench.model.get_parameter(name) - tensor).square().sum() for name, tensor in whole.items())
        assert report.error == pytest.approx(float((missed / moved).sqrt()), abs=1e-4)
        errors.append(report.error)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_a_merge_that_changes_more_than_matrices_is_no_adapter(bench, members, base_path, tmp_path):
    from ray_unlearn.merging.adapter import write_adapter

    recipe = MergeRecipe(members=["full", "lora-a"], weights=[1.0, 1.0], densities=[0.8, 0.8])
    with pytest.raises(InputError, match=r"an adapter holds linear layers only; the merge changes .*norm"):
        write_adapter(recipe, bench.model, base_path, members, tmp_path / "out", 4)
