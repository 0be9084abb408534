"""What does not fit a model is refused before weights are loaded or Ray is started, all of it, with its place."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from architectures import small_model
from small import small_job

from ray_unlearn import run
from ray_unlearn.api import evaluation as api
from ray_unlearn.api import training
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import evaluator
from ray_unlearn.evaluation.mmlu import check_questions
from ray_unlearn.models.loading import save_model


@pytest.fixture
def place(tiny, tmp_path):
    """The tiny benchmark's data and model as files; the fourth and the last test question are too long."""
    benchmark.write(tiny.data, tmp_path)
    save_model(tiny.model, tiny.tokenizer, tmp_path / "model")
    file = tmp_path / "mmlu" / "test" / "towns_test.csv"
    with open(file, newline="") as text:
        rows = list(csv.reader(text))
    for number in (3, -1):
        rows[number][0] = "42 " * 300
    with open(file, "w", newline="") as text:
        csv.writer(text).writerows(rows)
    return tmp_path


@pytest.fixture
def nothing_starts(monkeypatch):
    for name in ("ray_unlearn.pipeline.run.cluster", "ray_unlearn.cluster.session.cluster"):
        monkeypatch.setattr(name, lambda *given: pytest.fail("a cluster was started"))
    monkeypatch.setattr(api, "workers_of", lambda *given: pytest.fail("workers were started"))
    monkeypatch.setattr(evaluator, "load_model", lambda *given: pytest.fail("the model was loaded"))


LONG = (
    r"2 MMLU questions cannot be asked:\n"
    r"  towns \(towns_test.csv, row 4\): \d+ tokens without any example, and the model's context is 512\n"
    r"  towns \(towns_test.csv, row \d+\): .*\nRemove the rows"
)


@pytest.mark.parametrize("mode", ["letters", "cloze"])
@pytest.mark.parametrize("workers", [1, 2])
def test_evaluate_refuses_all_questions_that_are_too_long(place, nothing_starts, mode, workers):
    with pytest.raises(InputError, match=LONG):
        api.evaluate(
            str(place / "model"), str(place), str(place), mmlu=str(place / "mmlu"), mmlu_mode=mode, workers=workers
        )


def job_of(place):
    names = ("forget", "retain", "mia_member", "mia_nonmember")
    files = {name: str(place / f"{name}.jsonl") for name in names}
    made = small_job(place / "cache") | {"model": {"path": str(place / "model")}}
    return made | {"data": files | {"mmlu": str(place / "mmlu")}, "target": {}}


def test_a_run_refuses_them_before_a_cluster_is_started(place, nothing_starts):
    with pytest.raises(InputError, match=LONG):
        run(job_of(place), out=place / "run")


def test_a_run_refuses_documents_that_only_the_final_scores_use(place, nothing_starts, tiny):
    job = job_of(place)
    benchmark.write(tiny.data, place)
    with open(place / "mia_nonmember.jsonl", "a") as file:
        for number in range(2):
            file.write(json.dumps({"id": f"x{number}", "document": "42 " * 400 if number else "short one"}) + "\n")
    with pytest.raises(InputError, match=r"MIA document \d+ has \d+ tokens, and the model's context is 512"):
        run(job, out=place / "run")


def test_a_trial_refuses_a_prompt_without_room_before_a_cluster_is_started(place, nothing_starts):
    shutil.copy(place / "forget.jsonl", place / "long.jsonl")
    with open(place / "long.jsonl", "a") as file:
        row = {"id": "f9sc1", "input": "42 " * 400, "output": "no room", "task": "Task1"}
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"row 'f9sc1': its prompt has \d+ tokens, and the model's context is 512"):
        training.train(
            model=str(place / "model"), forget=str(place / "long.jsonl"), retain=str(place), out=place / "out",
            recipe="baseline-npo",
        )  # fmt: skip


def test_a_model_without_a_limit_has_room_for_all(tiny, place):
    data = api.eval_set(str(place), str(place), mmlu=str(place / "mmlu"))
    check_questions(None, tiny.tokenizer, data.questions, "letters")
    check_questions(None, tiny.tokenizer, data.questions, "cloze")
    check_questions(512, tiny.tokenizer, [], "letters")


def test_an_encoder_is_refused_when_it_is_loaded(tiny, place):
    model = small_model("bert", is_decoder=False, vocab_size=len(tiny.tokenizer))
    save_model(model, tiny.tokenizer, place / "bert")
    with pytest.raises(InputError, match="BertLMHeadModel is no causal language model .*is_decoder: true"):
        evaluator.load_model(str(place / "bert"))
