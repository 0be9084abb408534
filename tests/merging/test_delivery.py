"""best/: what was scored is what is delivered, in the job's dtype, and the guard can fail."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ray_unlearn.errors import InputError
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.combine import member_change
from ray_unlearn.merging.resident import Merger
from ray_unlearn.merging.writer import check_written, write_model
from ray_unlearn.models.loading import load_model
from ray_unlearn.models.snapshot_files import write_snapshot
from ray_unlearn.pipeline import selection
from ray_unlearn.records import Candidate, MergeRecord, Scores, Snapshot, TrialRecord
from tests.helpers.made_merges import weights_of

EMPTY = Scores(terms={}, raw={}, counts={})
IDS = {name: f"trial-0000/{step:05d}" for step, name in enumerate(("full", "full-2", "lora-a", "lora-b"))}


def tuned(model, seed, step=5e-4):
    """A full-weight snapshot of a trial in bfloat16, as an engine's weights are: float32 of what bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name}
    return {
        "changed.safetensors": save(
            {n: (p + step * torch.randn(p.shape, generator=generator)).bfloat16().float() for n, p in matrices.items()}
        )
    }


@pytest.fixture(scope="module")
def snapshots(bench, members):
    return {
        "full": tuned(bench.model, 1),
        "full-2": tuned(bench.model, 2),
        "lora-a": members["lora-a"],
        "lora-b": members["lora-b"],
    }


@pytest.fixture
def run(snapshots, base_path, tmp_path):
    """As much of a run as delivery reads, with its snapshots; its dtype is for the test to say."""
    for name, files in snapshots.items():
        write_snapshot(tmp_path / "snapshots" / IDS[name], files)
    job = SimpleNamespace(model=SimpleNamespace(dtype="float32"))
    return SimpleNamespace(dir=tmp_path, model_path=base_path, job=job)


def merge_of(method, names, density=0.5):
    ids = [IDS[name] for name in names]
    return MergeRecipe(method=method, members=ids, weights=[1.0, 0.6], densities=[density] * len(ids))


def as_merge(recipe):
    stored = json.loads(json.dumps(recipe.to_json()))
    return Candidate(
        id="merge-0001",
        scores=EMPTY,
        record=MergeRecord(id="merge-0001", status="finished", recipe=stored, scores=EMPTY),
    )


def as_snapshot(name):
    snapshot = Snapshot(id=IDS[name], step=1, phase="forget", scores=EMPTY, path=f"snapshots/{IDS[name]}", seconds=1.0)
    return Candidate(
        id=IDS[name],
        scores=EMPTY,
        record=TrialRecord(id="trial-0000", status="finished", config={}, snapshots=(snapshot,)),
        snapshot=snapshot,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [("full", "full-2"), ("lora-a", "lora-b"), ("full", "lora-a")], ids="+".join)
@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic"])
def test_the_delivered_merge_is_the_scored_one_bit_for_bit(run, snapshots, method, names, dtype):
    from transformers import AutoModelForCausalLM

    run.job.model.dtype = dtype
    recipe = merge_of(method, names)
    actors = load_model(run.model_path, dtype)  # as cluster.merge_actor.MergeActor has it
    Merger(actors, {IDS[name]: snapshots[name] for name in names}, run.model_path).merge(recipe)
    scored = weights_of(actors)
    assert selection.write_best(run, as_merge(recipe)) == 0.0
    for delivered in (load_model(str(run.dir / "best"), dtype), AutoModelForCausalLM.from_pretrained(run.dir / "best")):
        assert all(tensor.dtype == getattr(torch, dtype) for tensor in weights_of(delivered).values())
        assert all(tensor.equal(scored[name]) for name, tensor in weights_of(delivered).items())
    base = weights_of(load_model(run.model_path, dtype))
    assert any(not tensor.equal(base[name]) for name, tensor in scored.items())


INNER = merge_of("dare_ties", ("full", "lora-a"))
NESTED = MergeRecipe(
    members=["merge-0000", IDS["lora-b"]], weights=[1.0] * 2, densities=[0.8] * 2, merges={"merge-0000": INNER}
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [INNER, NESTED], ids=["flat", "nested"])
def test_a_merge_made_again_from_what_was_delivered_is_the_same_bytes(run, recipe, dtype):
    from ray_unlearn.api.merging import merge_by_recipe

    run.job.model.dtype = dtype
    assert selection.write_best(run, as_merge(recipe)) == 0.0
    merge_by_recipe(run.dir / "best", None, run.dir / "again")
    first, second = (run.dir / name / "model.safetensors" for name in ("best", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_delivered_snapshot_of_full_weights_has_the_trials_own_bits(run, snapshots, tmp_path, dtype):
    run.job.model.dtype = dtype
    assert selection.write_best(run, as_snapshot("full")) == 0.0
    delivered = weights_of(load_model(str(run.dir / "best"), dtype))
    kept = load_file(run.dir / "snapshots" / IDS["full"] / "changed.safetensors")
    base = weights_of(load_model(run.model_path, dtype))
    assert len(kept) > 10
    for name, tensor in delivered.items():
        assert tensor.equal(kept[name].to(tensor) if name in kept else base[name])


def test_a_delivered_adapter_is_what_peft_merges(run):
    from peft import PeftModel

    assert selection.write_best(run, as_snapshot("lora-a")) == 0.0
    folder = run.dir / "snapshots" / IDS["lora-a"]
    theirs = weights_of(PeftModel.from_pretrained(load_model(run.model_path), folder).merge_and_unload())
    for name, tensor in weights_of(load_model(str(run.dir / "best"))).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("choice", [as_merge(merge_of("ties", ("full", "lora-a"))), as_snapshot("full")])
def test_a_damaged_written_tensor_fails_the_run_and_leaves_the_earlier_best(run, monkeypatch, choice, dtype):
    name = "model.layers.1.mlp.down_proj.weight"

    def damaged(base, change_of, out, dtype):
        write_model(base, change_of, out, dtype)
        state = load_file(out / "model.safetensors")
        state[name][3, 5] += 0.01
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    run.job.model.dtype = dtype
    monkeypatch.setattr(selection, "write_model", damaged)
    (run.dir / "best").mkdir()
    (run.dir / "best" / "mine").touch()
    with pytest.raises(RuntimeError, match=f"{choice.id} was not written as it was scored: the written {name} is 1"):
        selection.write_best(run, choice)
    assert sorted(path.name for path in run.dir.iterdir()) == ["best", "snapshots"]
    assert (run.dir / "best" / "mine").exists()


def test_a_flipped_bit_in_a_member_reaches_neither_best_nor_a_merge_by_hand(run):
    from ray_unlearn.api.merging import merge_by_recipe

    recipe = merge_of("ties", ("full", "lora-a"))
    selection.write_best(run, as_merge(recipe))
    before = (run.dir / "best" / "model.safetensors").read_bytes()
    path = run.dir / "snapshots" / IDS["lora-a"] / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} is not what was written"):
        selection.write_best(run, as_merge(recipe))
    with pytest.raises(InputError, match=f"{path} is not what was written"):
        merge_by_recipe(run.dir / "best", None, run.dir / "again")
    assert (run.dir / "best" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in run.dir.iterdir()) == ["best", "snapshots"]


# -- families whose files differ from what is in memory --------------------------------------------


SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def saved_model(config, tokenizer, path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_that_the_files_hold_one_by_one_are_delivered(tiny, tmp_path, dtype):
    from transformers import MixtralConfig

    model = saved_model(MixtralConfig(num_local_experts=2, **SIZES), tiny.tokenizer, tmp_path / "base")
    assert any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    source = {
        "changed.safetensors": save(
            {n: p + 0.01 for n, p in model.named_parameters() if n.endswith("experts.down_proj")}
        )
    }
    base = str(tmp_path / "base")
    write_model(base, lambda model: member_change(model, "m", source), tmp_path / "out", dtype)
    loaded = load_model(base, dtype)
    change = member_change(loaded, "m", source)
    assert len(change.touched) == 2
    assert check_written(loaded, change, tmp_path / "out", dtype) == 0.0


def test_what_a_family_keeps_in_float32_is_delivered_in_float32(tiny, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    model = saved_model(LlamaConfig(**SIZES), tiny.tokenizer, tmp_path / "base")
    name = "model.layers.0.input_layernorm.weight"
    source = {"changed.safetensors": save({name: model.get_parameter(name) + 1e-4})}
    base = str(tmp_path / "base")
    write_model(base, lambda model: member_change(model, "m", source), tmp_path / "out", "bfloat16")
    loaded = load_model(base, "bfloat16")
    assert loaded.get_parameter(name).dtype == torch.float32
    assert check_written(loaded, member_change(loaded, "m", source), tmp_path / "out", "bfloat16") == 0.0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[name].equal(model.get_parameter(name) + 1e-4)
    assert written["model.norm.weight"].dtype == torch.bfloat16
