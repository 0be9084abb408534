"""`evaluate` from files: finished parts are read again, shares are put together, and what it writes scores the same."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import contextmanager

import pytest

from ray_unlearn import files
from ray_unlearn.api import evaluation as api
from ray_unlearn.cluster import evaluators
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import cache as score_cache
from ray_unlearn.evaluation import evaluator as evaluation
from ray_unlearn.evaluation import spec
from ray_unlearn.evaluation.spec import EvalSettings
from ray_unlearn.evaluation.work_units import WorkUnit, split_work
from ray_unlearn.models.loading import save_model

METRICS = ["answer_probability", "rouge_l_f1", "mia_reference", "mia_gradient_norm", "score_differences"]


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """The tiny benchmark's data and model as files."""
    folder = tmp_path_factory.mktemp("files")
    benchmark.write(tiny.data, folder)
    save_model(tiny.model, tiny.tokenizer, folder / "model")
    return folder


def options(place, **changes):
    given = {
        "model": str(place / "model"),
        "forget": str(place),
        "retain": str(place),
        "mia_member": str(place / "mia_member.jsonl"),
        "mia_nonmember": str(place / "mia_nonmember.jsonl"),
        "mmlu": str(place / "mmlu"),
        "mmlu_mode": "cloze",
        "max_new_tokens": 6,
        "batch_size": 2,
    }
    return given | changes


def test_what_is_written_scores_the_same_by_itself(place, tmp_path):
    files = api.Outputs(scores=tmp_path / "out", predictions=tmp_path / "p.jsonl", losses=tmp_path / "losses")
    scores = api.evaluate(**options(place), out=files)
    again = api.score(
        files.predictions,
        mia=files.losses,
        mmlu_accuracy=scores.utility,
        forget=str(place),
        retain=str(place),
    )
    stated = json.loads(files.scores.read_text())
    assert stated == scores.to_json() and stated["final"] == again.final
    assert (again.terms, again.raw, again.counts, again.mia_auc) == (
        scores.terms, scores.raw, scores.counts, scores.mia_auc,
    )  # fmt: skip


class Killed(Exception):
    """An evaluation that is killed in its middle."""


def computing(monkeypatch, limit=10**6):
    """A list of the units that are computed; after `limit` of them the evaluation is killed."""
    seen, whole = [], evaluation.Scorer.compute

    def compute(self, unit):
        if len(seen) == limit:
            raise Killed
        seen.append(unit)
        return whole(self, unit)

    monkeypatch.setattr(evaluation.Scorer, "compute", compute)
    return seen


def test_a_killed_evaluation_goes_on_and_a_finished_one_loads_no_model(place, tmp_path, monkeypatch):
    expected = api.evaluate(**options(place))
    cache = tmp_path / "cache"
    with pytest.raises(Killed):
        computing(monkeypatch, limit=3)
        api.evaluate(**options(place), out=api.Outputs(cache=cache))
    (folder,) = cache.iterdir()
    assert len(list(folder.iterdir())) == 3
    (folder / "unit-0001.json").write_text('{"part": "te')  # half a file is none
    monkeypatch.undo()
    rest = computing(monkeypatch)
    assert api.evaluate(**options(place), out=api.Outputs(cache=cache)) == expected
    everything = len(list(folder.iterdir()))
    assert len(rest) == everything - 2
    monkeypatch.setattr(evaluation, "load_model", lambda *given: pytest.fail("the model was loaded"))
    assert api.evaluate(**options(place), out=api.Outputs(cache=cache)) == expected


def test_other_weights_data_or_settings_are_other_scores(place, tmp_path, monkeypatch):
    cache, seen = tmp_path / "cache", computing(monkeypatch)

    def computed(**changes):
        seen.clear()
        api.evaluate(**options(place, **changes), out=api.Outputs(cache=cache))
        return len(seen)

    assert computed() > 0 and computed() == 0
    assert computed(max_new_tokens=5) > 0 and computed(mmlu_mode="letters") > 0
    moved = tmp_path / "moved"
    shutil.copytree(place, moved)
    (moved / "model" / "README.md").write_text("a card changes nothing")
    assert computed(**{key: str(value) for key, value in options(moved).items() if "/" in str(value)}) == 0
    lines = (moved / "forget.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    (moved / "forget.jsonl").write_text("\n".join([json.dumps(row | {"output": "else"}), *lines[1:]]) + "\n")
    assert computed(forget=str(moved)) > 0
    weights = moved / "model" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    assert computed(model=str(moved / "model")) > 0


def test_a_model_that_is_not_here_is_not_cached(tmp_path):
    assert files.weights_digest("owner/name") is None
    lines = []
    work = evaluation.Evaluation(
        model="owner/name", adapter=None, dtype="float32", data=spec.EvalSet(), settings=EvalSettings()
    )
    with evaluators.workers(evaluators.WorkerPool(count=2), lines.append) as workers:  # nothing to do: no actor starts
        assert evaluation.Evaluated(work, workers, tmp_path, lines.append).texts == []
    assert "owner/name is no local model: its scores are not cached" in lines and not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", [1, -1])
def test_parts_from_actors_are_the_same_in_whatever_order_they_come(place, monkeypatch, order):
    expected = api.evaluate(**options(place), metrics=METRICS, reference=str(place / "model"))
    found = expected.metrics["score_differences"]
    assert found["final"]["value"] == expected.final and {part["difference"] for part in found.values()} == {0.0}
    assert expected.metrics["rouge_l_f1"]["forget"]["difference"] == 0.0
    alone = api.evaluate(**options(place), reference=str(place / "model"))
    assert alone.metrics == {"score_differences": found}

    class Three:
        def compute(self, job, work, shares):
            scorers = [evaluation.Scorer(job, "cpu") for _ in range(3)]
            for index in range(len(shares))[::order]:
                yield index, pickle.loads(pickle.dumps(work))(scorers[index % 3], shares[index])

    @contextmanager
    def three(pool, log):
        assert pool.count == 3
        yield Three()

    monkeypatch.setattr(api, "workers_of", three)
    assert api.evaluate(**options(place), workers=3, metrics=METRICS, reference=str(place / "model")) == expected


@pytest.mark.ray
def test_ray_actors_give_what_one_process_gives(place, tmp_path):
    more = {"metrics": METRICS, "reference": str(place / "model")}
    expected = api.evaluate(**options(place), **more)
    assert api.evaluate(**options(place), workers=2, out=api.Outputs(cache=tmp_path), **more) == expected
    with pytest.raises(InputError, match="its prompt has"):
        api.evaluate(**options(place, forget=str(too_long(place, tmp_path))), workers=2)


def test_metrics_without_their_inputs_are_refused_before_any_work(place, monkeypatch):
    seen = computing(monkeypatch)
    for given, message in (
        ({"metrics": ["privleak"]}, "'privleak' compares with a model trained without the forget set"),
        ({"metrics": ["rouge"]}, "unknown metric 'rouge'"),
        ({"metrics": ["mia_loss"], "mia_member": None, "mia_nonmember": None}, "'mia_loss' needs MIA documents"),
    ):
        with pytest.raises(InputError, match=message):
            api.evaluate(**options(place, **given))
    assert not seen


def too_long(place, folder):
    """The forget file with a prompt that fills the model's context."""
    rows = [json.loads(line) for line in (place / "forget.jsonl").read_text().splitlines()]
    rows[0]["input"] = "42 " * 400
    (folder / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "forget.jsonl"


def test_official_fixes_the_settings_and_demands_terms_and_examples(place, tmp_path):
    with pytest.raises(InputError, match="5 examples of each subject; towns has 2"):
        api.evaluate(**options(place), official=True)
    dev = place / "mmlu" / "dev" / "towns_dev.csv"
    folder = tmp_path / "mmlu"
    shutil.copytree(place / "mmlu", folder)
    (folder / "dev" / "towns_dev.csv").write_text(dev.read_text() * 3)
    scores = api.evaluate(**options(place, mmlu=str(folder), batch_size=32), official=True)
    stated = {"max_new_tokens": 256, "mmlu_mode": "letters", "mmlu_shots": 5}
    assert scores.settings.items() >= stated.items() and len(scores.terms) == 12
    (folder / "dev" / "towns_dev.csv").unlink()
    with pytest.raises(InputError, match=r"has no dev file: .*towns_dev.csv is missing"):
        api.evaluate(**options(place, mmlu=str(folder)), official=True)


def test_a_row_beyond_the_context_and_no_workers_are_refused(place, tmp_path):
    with pytest.raises(InputError, match=r"row 'f1000sc1': its prompt has \d+ tokens, and the model's context is 512"):
        api.evaluate(**options(place, forget=str(too_long(place, tmp_path))))
    with pytest.raises(InputError, match="--losses are those of the MIA's documents"):
        api.evaluate(
            **options(place, mia_member=None, mia_nonmember=None), out=api.Outputs(losses=tmp_path / "losses.json")
        )
    with pytest.raises(InputError, match="--workers must be at least 1, got 0"):
        api.evaluate(**options(place), workers=0)
    with pytest.raises(InputError, match="unknown key in settings 'max_tokens'. Did you mean 'max_new_tokens'"):
        api.evaluate(**options(place), max_tokens=4)


def test_finished_units_of_another_plan_are_not_taken(tmp_path):
    finished = score_cache.FinishedUnits(tmp_path)
    finished.save(0, WorkUnit("texts", (0, 2)), ["a", "b"])
    finished.save(1, WorkUnit("losses", (0,)), [0.1])
    units = [WorkUnit("texts", (0, 2)), WorkUnit("losses", (1,))]
    assert finished.load(units) == {0: ["a", "b"]}
    assert split_work(spec.EvalSet(), EvalSettings()) == []
