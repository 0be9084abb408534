"""The command line: exit codes, refusals that say what to do, JSON that is only JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small import small_job

from ray_unlearn import cli
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.models.loading import save_model


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """The tiny benchmark's data and model as files."""
    place = tmp_path_factory.mktemp("files")
    benchmark.write(tiny.data, place)
    save_model(tiny.model, tiny.tokenizer, place / "model")
    return place


def refused(capsys, *argv: object) -> str:
    """The message of a command that must exit with 2, without a traceback."""
    code = cli.main([str(part) for part in argv])
    message = capsys.readouterr().err
    assert code == 2 and "Traceback" not in message, message
    return message


@pytest.mark.parametrize(
    "command",
    ["run", "target", "train", "evaluate", "score", "merge", "report", "methods", "recipes", "merge-methods", "submit"],
)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"example:\n  ray-unlearn {command}" in capsys.readouterr().out


def test_unknown_arguments_exit_with_2():
    for argv in (["run", "--nope"], ["fly"], []):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2


@pytest.mark.parametrize("command", ["methods", "recipes", "merge-methods"])
def test_lists_name_formula_parameters_and_source(command, capsys):
    assert cli.main([command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["formula"] and row["parameters"] and row["source"] for row in rows)
    assert cli.main([command]) == 0
    text = capsys.readouterr().out
    assert all(row["name"] in text for row in rows)


def predictions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prediction(name, split, task="Task1", output="a b", model_output="a b"):
    return {"id": name, "task": task, "split": split, "expected_output": output, "model_output": model_output}


def test_score_prints_and_writes_the_same_json(tmp_path, capsys):
    rows = [prediction(f"{split[0]}{kind}0", split) for split in ("forget", "retain") for kind in ("sc", "qa")]
    rows[0]["model_output"] = "nothing of it"
    rows[1]["model_output"] = ""
    path = predictions(tmp_path / "p.jsonl", rows)
    losses = tmp_path / "losses.json"
    losses.write_text('{"member": [1.0, 2.0], "nonmember": [1.0, 2.0]}')
    out = tmp_path / "scores.json"
    argv = ["score", "--predictions", path, "--mia", losses, "--mmlu-accuracy", 0.25, "--json", "--out", out]
    assert cli.main([str(part) for part in argv]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["task_aggregate"] == 1.0 and printed["mia_score"] == 1.0 and printed["final"] == 0.75
    assert printed["terms"]["forget/Task1/regurgitation"] == 1.0 and printed["raw"]["forget/Task1/knowledge"] == 0.0


def test_score_without_all_parts_has_no_final(tmp_path, capsys):
    path = predictions(tmp_path / "p.jsonl", [prediction("asc0", "forget"), prediction("bsc0", "retain")])
    assert cli.main(["score", "--predictions", str(path), "--json", "--out", str(tmp_path / "s.json")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert not {"final", "mia_score", "mia_auc", "utility"} & set(scores)


def test_score_refusals(tmp_path, capsys):
    out = tmp_path / "scores.json"
    path = predictions(tmp_path / "p.jsonl", [prediction("asc0", "forget"), prediction("bqa0", "retain")])
    assert "retain lacks Task1/sc; forget lacks Task1/qa" in refused(
        capsys, "score", "--predictions", path, "--out", out
    )
    path = predictions(tmp_path / "p.jsonl", [prediction("asc0", "forget"), prediction("bsc0", "retain")])
    assert "missing ['Task1/qa'" in refused(capsys, "score", "--predictions", path, "--official", "--out", out)
    losses = tmp_path / "losses.json"
    losses.write_text('{"member": [NaN], "nonmember": [1.0]}')
    assert "member[0] is nan" in refused(capsys, "score", "--predictions", path, "--mia", losses, "--out", out)
    losses.write_text("[]")
    assert "must be" in refused(capsys, "score", "--predictions", path, "--mia", losses, "--out", out)
    broken = predictions(tmp_path / "q.jsonl", [prediction("asc0", "forget")] * 2 + [prediction("x", "both")])
    message = refused(capsys, "score", "--predictions", broken, "--out", out)
    assert "q.jsonl:2: id 'asc0' is already used in row 1" in message and "q.jsonl:3: split must be" in message
    assert not out.exists()


def test_evaluate_scores_a_model_and_an_adapter_for_another_base_is_refused(files, tmp_path, capsys):
    data = ["--model", files / "model", "--forget", files, "--retain", files, "--max-new-tokens", 4]
    out = tmp_path / "scores.json"
    argv = ["evaluate", *data, "--mmlu", files / "mmlu", "--mmlu-mode", "cloze", "--json", "--out", out]
    assert cli.main([str(part) for part in argv]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["terms"]) == 12 and 0 <= printed["utility"] <= 1 and "final" not in printed
    other = tmp_path / "other"
    shutil.copytree(files / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 99}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(other), "r": 2, "lora_alpha": 2, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 99), f"{layer}.lora_B.weight": torch.ones(99, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    message = refused(capsys, "evaluate", *data, "--adapter", adapter, "--out", out)
    assert "another base" in message and "hidden_size 99 there, 32 here" in message
    assert "--mia-nonmember" in refused(capsys, "evaluate", *data, "--mia-member", files / "forget.jsonl", "--out", out)


def test_models_that_cannot_work_are_refused(files, tmp_path, capsys):
    rest = ["--forget", files, "--retain", files, "--out", tmp_path / "s.json"]
    assert "is neither a directory" in refused(capsys, "evaluate", "--model", tmp_path / "none", *rest)
    bare = tmp_path / "bare"
    shutil.copytree(files / "model", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    assert "has no tokenizer" in refused(capsys, "evaluate", "--model", bare, *rest)


def job_file(tmp_path, **changes):
    data = small_job(tmp_path / "cache")
    for key, value in changes.items():
        part, name = key.split("__")
        data[part][name] = value
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def run_refused(capsys, tmp_path, *extra, **changes):
    return refused(capsys, "run", job_file(tmp_path, **changes), "--out", tmp_path / "run", *extra)


def test_bad_jobs_are_refused_before_anything_is_built(tmp_path, capsys):
    assert "Did you mean 'trials'?" in run_refused(capsys, tmp_path, search__trails=3)
    assert "search.trials must be at least 1, got 0" in run_refused(capsys, tmp_path, search__trials=0)
    assert "must be int, got 'many'" in run_refused(capsys, tmp_path, "--set", "search.trials=many")
    assert "unknown search space 'npo_kl_cee'" in run_refused(capsys, tmp_path, search__spaces=["npo_kl_cee"])
    assert "exactly one of model.path" in run_refused(capsys, tmp_path, target__base="x/y")
    assert "no such job file" in refused(capsys, "run", tmp_path / "none.yaml")
    assert not (tmp_path / "cache").exists()


def test_a_space_with_an_unknown_parameter_or_method_lists_the_known_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ray_unlearn.pipeline.run.job_target", lambda job, rows, log: (_ for _ in ()).throw(AssertionError)
    )
    space = tmp_path / "mine.py"
    space.write_text(
        "def space(trial):\n    return {'learning_rat': trial.suggest_float('learning_rate', 1e-5, 1e-4)}\n"
    )
    message = run_refused(capsys, tmp_path, search__spaces=[str(space)], search__fixed={})
    assert "unknown key in trial 'learning_rat'" in message and "Did you mean 'learning_rate'?" in message
    space.write_text("def space(trial):\n    return {'method': 'npoo'}\n")
    message = run_refused(capsys, tmp_path, search__spaces=[str(space)], search__fixed={}, search__ranges={})
    assert "unknown value for trial.method: 'npoo'" in message and "npo_kl_ce" in message
    assert "unknown parameter in search.ranges" in run_refused(
        capsys, tmp_path, search__ranges={"learning_rte": [1, 2]}
    )
    first = [{"space": "ascent_kl_ce", "learnin_rate": 1e-4}]
    assert "unknown parameter in search.first_points" in run_refused(capsys, tmp_path, search__first_points=first)


def test_an_unset_variable_and_an_unwritable_directory_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    message = run_refused(capsys, tmp_path, "--set", "target.cache=$NO_SUCH_PLACE/x")
    assert "$NO_SUCH_PLACE" in message and "not set" in message
    (tmp_path / "file").write_text("")
    message = refused(capsys, "run", job_file(tmp_path), "--out", tmp_path / "file" / "run")
    assert "cannot be written" in message and "--out" in message


def test_too_little_disk_is_refused_with_the_arithmetic(files, tmp_path, monkeypatch):
    from ray_unlearn.config.job import Job
    from ray_unlearn.config.trial import TrialConfig
    from ray_unlearn.errors import InputError
    from ray_unlearn.pipeline.directory import check_trials
    from ray_unlearn.schema import from_dict

    job = from_dict(Job, small_job(tmp_path))
    configs = [TrialConfig(snapshots=2), TrialConfig(snapshots=5, tuning="full")]
    check_trials(tmp_path, job, str(files / "model"), configs)
    (tmp_path / "records").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(InputError, match=r"0\.00 GiB free.*15 snapshots of up to 0\.\d MiB"):
        check_trials(tmp_path, job, str(files / "model"), configs)


def test_train_needs_one_configuration_and_known_names(files, tmp_path, capsys):
    data = ["train", "--model", files / "model", "--forget", files, "--retain", files, "--out", tmp_path / "out"]
    assert "either --recipe NAME or --config FILE" in refused(capsys, *data)
    assert "Did you mean 'zjuklab-model1'?" in refused(capsys, *data, "--recipe", "zjuklab-model-1")
    message = refused(capsys, *data, "--recipe", "zjuklab-model1", "--set", "zero_stage=4")
    assert "trial.zero_stage must be from 0 to 3, got 4" in message


def test_merge_refuses_members_of_another_base_and_bad_densities(files, tmp_path, capsys):
    argv = ["merge", "--base", files / "model", "--out", tmp_path / "out"]
    assert "is no model directory" in refused(capsys, *argv, "--adapters", tmp_path)
    assert "density must be above 0" in refused(capsys, *argv, "--adapters", files / "model", "--density", 0)
    assert "2 weights" in refused(capsys, *argv, "--adapters", files / "model", files, "--weights", 1)
    assert "unknown merge method 'tiess'" in refused(capsys, *argv, "--adapters", files / "model", "--method", "tiess")


def test_outputs_that_are_not_ours_are_left_alone(files, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    merge = ["merge", "--base", files / "model", "--adapters", files / "model"]
    for argv in (
        [*merge, "--out", tmp_path / "mine"],
        ["target", "--benchmark", "embedded", "--out", tmp_path / "mine"],
        ["target", "--base", files / "model", "--forget", files, "--retain", files, "--out", tmp_path / "mine"],
        [*merge, "--out", files / "model"],
    ):
        assert "was not written by this command" in refused(capsys, *argv)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    score = ["score", "--predictions", tmp_path / "none.jsonl", "--out", "/proc/nowhere/s.json"]
    assert "/proc/nowhere cannot be written" in refused(capsys, *score)


def test_a_merge_of_one_member_is_that_member_and_may_be_written_again(files, tmp_path, tiny):
    from safetensors.torch import load_file, save_file

    shutil.copytree(files / "model", tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.25
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    argv = ["merge", "--base", files / "model", "--adapters", tmp_path / "tuned", "--out", tmp_path / "out"]
    for _ in range(2):
        assert cli.main([str(part) for part in argv]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all((merged[name] - weights[name]).abs().max() < 1e-6 for name in weights)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["lambda"] == 1.0


@pytest.fixture
def adapters(files, tmp_path):
    """Two adapters on the model's query projections, of unlike rank."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(files / "model" / "model.safetensors")
    made = []
    for rank in (2, 3):
        generator = torch.Generator().manual_seed(rank)
        state = {}
        for name, tensor in weights.items():
            if name.endswith("q_proj.weight"):
                key = f"base_model.model.{name.removesuffix('.weight')}"
                state[f"{key}.lora_A.weight"] = 0.1 * torch.randn(rank, tensor.shape[1], generator=generator)
                state[f"{key}.lora_B.weight"] = 0.1 * torch.randn(tensor.shape[0], rank, generator=generator)
        folder = tmp_path / f"adapter-{rank}"
        folder.mkdir()
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        made.append(folder)
    return made


def run_merge(*argv):
    return cli.main(["merge", *(str(part) for part in argv)])


@pytest.mark.parametrize("source", ["", "merge.json", "README.md"])
def test_a_merge_is_made_again_from_its_recipe_bit_for_bit(files, adapters, tmp_path, source):
    options = ["--method", "dare_ties", "--density", "0.5,0.8", "--weights", "1,0.5", "2", "--seed", 3, "--no-rescale"]
    options += ["--dtype", "bfloat16"]
    assert run_merge("--base", files / "model", "--adapters", *adapters, *options, "--out", tmp_path / "out") == 0
    assert run_merge("--recipe", tmp_path / "out" / source, "--out", tmp_path / "again") == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert json.loads(made["merge.json"])["weights"] == [[1.0, 0.5], 2.0]
    assert made["model.safetensors"] != (files / "model" / "model.safetensors").read_bytes()


def test_a_merge_may_be_an_adapter_and_says_what_was_cut_off(files, adapters, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    argv = ["--base", files / "model", "--adapters", *adapters]
    assert run_merge(*argv, "--method", "linear", "--out", tmp_path / "model") == 0
    assert run_merge(*argv, "--method", "linear", "--as-adapter", "--out", tmp_path / "adapter") == 0
    assert "an adapter of rank 5, exact" in "".join(capsys.readouterr())
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert (parameter - adapted.get_parameter(name)).abs().max() < 1e-6
    assert run_merge(*argv, "--density", 0.5, "--as-adapter", "--rank", 1, "--out", tmp_path / "cut") == 0
    assert "of the merged delta's Frobenius norm is cut off" in "".join(capsys.readouterr())


def test_what_a_merge_command_cannot_mean_is_refused(files, adapters, tmp_path, capsys):
    argv = ["merge", "--base", files / "model", "--out", tmp_path / "out"]
    both = [*argv, "--adapters", *adapters]
    assert "either --adapters A B ... or --recipe FILE" in refused(capsys, *argv)
    assert "needs --base" in refused(capsys, "merge", "--adapters", *adapters, "--out", tmp_path / "out")
    assert "linear thins nothing out" in refused(capsys, *both, "--method", "linear", "--density", 0.5)
    assert "model_stock uses no weights" in refused(capsys, *both, "--method", "model_stock", "--weights", 1, 2)
    assert "--rank belongs to --as-adapter" in refused(capsys, *both, "--rank", 3)
    assert "one rank, got ranks [2, 3]" in refused(capsys, *both, "--method", "ties_factors")
    assert "no such recipe" in refused(capsys, *argv, "--recipe", tmp_path / "none.json")
    (tmp_path / "card.md").write_text("# A model without a recipe")
    assert "holds no merge recipe" in refused(capsys, *argv, "--recipe", tmp_path / "card.md")
    recipe = {"members": ["gone"], "weights": [1], "densities": [1]}
    (tmp_path / "lost.json").write_text(json.dumps(recipe))
    assert "no such member: gone" in refused(capsys, *argv, "--recipe", tmp_path / "lost.json")


def test_budgets_of_zero_are_refused_everywhere(files, tmp_path, capsys):
    data = ["--forget", files, "--retain", files, "--out", tmp_path / "out"]
    assert "epochs must be above 0" in refused(capsys, "target", "--base", files / "model", *data, "--epochs", 0)
    train = ["train", "--model", files / "model", *data, "--recipe", "zjuklab-model1"]
    assert "resources.workers must be at least 1" in refused(capsys, *train, "--workers", 0)
    evaluate = ["evaluate", "--model", tmp_path / "none", *data]
    assert "must be at least 1" in refused(capsys, *evaluate, "--max-new-tokens", 0)
    assert "merge.candidates must be at least 0" in run_refused(capsys, tmp_path, merge__candidates=-1)
    assert "mmlu.mode" in run_refused(capsys, tmp_path, mmlu__mode="letter")
    assert "mmlu.limit must be at least 1" in run_refused(capsys, tmp_path, mmlu__limit=0)


def test_a_run_time_failure_exits_with_1_and_debug_shows_the_traceback(tmp_path, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("the disk caught fire")

    monkeypatch.setattr("ray_unlearn.report.write_report", broken)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "ray-unlearn: RuntimeError: the disk caught fire\n"
    assert cli.main(["report", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_module_and_console_script_are_the_same_command():
    answer = subprocess.run([sys.executable, "-m", "ray_unlearn", "methods", "--json"], capture_output=True, text=True)
    assert answer.returncode == 0 and json.loads(answer.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "{forget}"], "--out .* is an input of this command"),
        (["--out", "{s}", "--predictions", "{forget}"], "--predictions .* is an input"),
        (["--out", "{s}", "--predictions", "{s}"], "--predictions and --out are both"),
        (["--out", "{model}/config.json"], "--out .* is an input"),
    ],
)
def test_an_output_never_replaces_an_input_or_another_output(tmp_path, capsys, flags, message):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain", "s")}
    for name, text in (("forget", "one"), ("retain", "two")):
        row = {"id": f"{name}1qa0", "input": "q", "output": text, "task": "Task1"}
        files[name].write_text(json.dumps(row) + "\n")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    argv = ["evaluate", "--model", model, "--forget", files["forget"], "--retain", files["retain"]]
    argv += [flag.format(model=model, **files) for flag in flags]
    assert cli.main([str(part) for part in argv]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
