"""The embedded benchmark meets its conditions, is the same wherever it is made, and is built once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from small import SETTINGS

from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.data.rows import load_documents, load_pair
from ray_unlearn.evaluation.scoring import evaluate_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.pipeline.target import _alone, build_benchmark, build_target_at
from ray_unlearn.schema import digest, to_dict


def test_data_are_the_same_in_another_process_with_another_hash_seed():
    program = (
        "from ray_unlearn.data.benchmarks import embedded as benchmark;"
        "from ray_unlearn.schema import digest; import dataclasses;"
        "print(digest(dataclasses.asdict(benchmark.make(benchmark.EmbeddedSettings()))))"
    )
    import dataclasses

    here = digest(dataclasses.asdict(benchmark.make(benchmark.EmbeddedSettings())))
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": seed, "PATH": ""}
        )
        assert answer.stdout.strip() == here, answer.stderr


def test_no_document_or_question_is_in_two_sets():
    data = benchmark.make(benchmark.EmbeddedSettings())
    questions = [row["input"] for row in data.forget + data.retain] + [fact[0] for fact in data.facts + data.dev_facts]
    assert len(set(questions)) == len(questions)
    trained = {f"{row['input']} {row['output']}" for row in data.forget + data.retain}
    assert not trained & {row["document"] for row in data.nonmembers}
    assert [sum(fact[2] == place for fact in data.facts) > 0 for place in range(4)] == [True] * 4


def test_the_standard_error_of_the_auc_is_at_most_one_twentieth():
    settings = benchmark.EmbeddedSettings()
    m, n = settings.entries, settings.nonmembers // 2
    assert ((m + n + 1) / (12 * m * n)) ** 0.5 <= 0.05  # Hanley and McNeil 1982, at AUC 0.5


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_benchmark("embedded", tmp_path_factory.mktemp("targets"), to_dict(benchmark.EmbeddedSettings()))


def scores_of(place, name):
    dev, questions = load_mmlu(place / "mmlu")
    forget, retain = load_pair(place, place)
    data = EvalSet(
        forget=forget.examples,
        retain=retain.examples,
        members=load_documents(place / "mia_member.jsonl"),
        nonmembers=load_documents(place / "mia_nonmember.jsonl"),
        dev=dev,
        questions=questions,
    )
    path = str(place / name)
    settings = EvalSettings(max_new_tokens=32, batch_size=64, mmlu_mode="cloze")
    return evaluate_model(load_model(path), load_tokenizer(path), data, settings)[0]


@pytest.mark.slow
def test_the_target_knows_everything_and_the_reference_nothing_of_the_forget_set(built):
    target, reference = scores_of(built, "target"), scores_of(built, "reference")
    assert len(target.terms) == 12 and min(target.raw.values()) >= 0.95
    assert target.utility >= 0.9 and target.mia_auc >= 0.95 and target.task_aggregate == 0
    assert reference.task_aggregate >= 0.85 and 0.4 <= reference.mia_auc <= 0.6
    assert min(value for key, value in reference.raw.items() if key.startswith("retain/")) >= 0.95
    assert reference.utility >= 0.9


@pytest.mark.slow
def test_a_finished_benchmark_is_not_built_again(built):
    before = (built / "target" / "model.safetensors").stat().st_mtime_ns
    assert build_benchmark("embedded", built.parent, to_dict(benchmark.EmbeddedSettings())) == built
    assert (built / "target" / "model.safetensors").stat().st_mtime_ns == before


def test_a_target_from_any_base_learns_the_rows(tmp_path):
    from ray_unlearn.models.loading import save_model

    data = benchmark.make(SETTINGS)
    benchmark.write(data, tmp_path)
    tokenizer = benchmark.make_tokenizer(data, SETTINGS.vocabulary)
    save_model(benchmark.make_model(SETTINGS, len(tokenizer)), tokenizer, tmp_path / "base")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")]
    lines: list[str] = []
    build_target_at(
        str(tmp_path / "base"), *files, 1, False, tmp_path / "target", lines.append,
        epochs=30, batch_size=4, learning_rate=5e-3, seed=0,
    )  # fmt: skip
    assert "epoch 30/30" in lines[-1]
    row = load_pair(tmp_path, tmp_path)[0].examples[1]
    model, tokenizer = load_model(str(tmp_path / "target")), load_tokenizer(str(tmp_path / "target"))
    _, texts = evaluate_model(model, tokenizer, EvalSet(forget=[row], retain=[row]), EvalSettings(max_new_tokens=24))
    assert texts[0].strip() == row.output


BUILD = """
import sys
from pathlib import Path
from ray_unlearn.data.benchmarks.embedded import EmbeddedSettings
from ray_unlearn.pipeline.target import build_benchmark
from ray_unlearn.schema import to_dict
sizes = {"stories": 2, "biographies": 1, "entries": 3, "nonmembers": 6, "facts": 6, "vocabulary": 320}
settings = EmbeddedSettings(hidden=32, layers=1, epochs=int(sys.argv[2]), **sizes)
print(build_benchmark("embedded", Path(sys.argv[1]), to_dict(settings), lambda line: print(line, flush=True)))
"""


def build(place, epochs):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(place), str(epochs)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_whoever_builds_makes_others_wait_and_says_so(tmp_path):
    place, said, order = tmp_path / "target", [], []

    def second():
        with _alone(place, said.append):
            order.append("second")

    with _alone(place, said.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and said == [f"waiting for another process that builds {place}"]


@pytest.mark.slow
def test_of_two_processes_that_want_one_benchmark_one_builds_and_the_other_waits(tmp_path):
    processes = [build(tmp_path, 1) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    said = "".join(out for out, _ in answers)
    assert said.count("target trained") == 1 and said.count("waiting for another process") == 1
    (place,) = tmp_path.glob("embedded-*")
    assert said.count(f"cached in {place}") == 1
    assert {path.name for path in place.iterdir()} >= {"target", "reference", "settings.json"}
    assert not (place / "building.json").exists()


@pytest.mark.slow
def test_an_interrupted_build_leaves_no_process_and_is_begun_again(tmp_path):
    process = build(tmp_path, 10_000)
    wait = psutil.Process(process.pid)
    while len(wait.children()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    builders = wait.children()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr and not any(builder.is_running() for builder in builders)
    (place,) = tmp_path.glob("embedded-*")
    assert not (place / "settings.json").exists()
