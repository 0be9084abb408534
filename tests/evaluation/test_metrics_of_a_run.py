"""Further metrics of every candidate of a run: the same as `evaluate` finds, on any number of ranks, or refused."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from ray_unlearn.config.job import Job
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.metric_suite import check_in_run, more_metrics
from ray_unlearn.evaluation.scoring import evaluate_model, score_model
from ray_unlearn.evaluation.signals import ModelHere
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import Shard
from ray_unlearn.metrics import METRICS, Metric
from ray_unlearn.records import Example
from ray_unlearn.schema import from_dict

NAMES = ("rouge_l_f1", "answer_probability", "mia_min_k")
WORDS = {"formula": "f", "range": (0, 1), "best": {"forget": 0.0}, "collapsed": "0", "source": "s"}


@pytest.fixture(scope="module")
def data(tiny):
    splits = (
        [Example(id=r["id"], input=r["input"], output=r["output"], task=r["task"], kind=r["id"][-3:-1]) for r in rows]
        for rows in (tiny.data.forget, tiny.data.retain)
    )
    forget, retain = splits
    texts = [row["document"] for row in tiny.data.nonmembers]
    return EvalSet(forget=forget, retain=retain, members=texts[:3], nonmembers=texts[3:])


def settings(*metrics):
    return EvalSettings(max_new_tokens=6, batch_size=2, metrics=metrics)


@pytest.fixture(scope="module")
def alone(tiny, data):
    return score_model(tiny.model, tiny.tokenizer, data, settings(*NAMES))


def test_a_candidates_metrics_are_what_an_evaluation_finds(tiny, data, alone):
    scores, texts = evaluate_model(tiny.model, tiny.tokenizer, data, settings())
    assert scores.metrics == {}
    here = ModelHere(model=tiny.model, texts=texts, scores=scores)
    assert alone.metrics == more_metrics(NAMES, here, tiny.tokenizer, data, batch_size=2)
    assert (alone.terms, alone.mia_auc) == (scores.terms, scores.mia_auc)


def test_two_ranks_find_what_one_does(tiny, data, alone):
    context = multiprocessing.get_context("fork")
    ends = context.Pipe()

    def rank(number):
        def gather(mine):
            ends[number].send(mine)
            parts = mine, ends[number].recv()
            return [item for part in (parts if number == 0 else reversed(parts)) for item in part]

        return score_model(tiny.model, tiny.tokenizer, data, settings(*NAMES), Shard(number, 2, gather))

    other = context.Process(target=lambda: ends[1].send(rank(1)), daemon=True)
    other.start()
    assert [rank(0), ends[0].recv()] == [alone, alone]
    other.join(60)


def test_a_part_that_is_no_finite_number_is_left_out(tiny, data, monkeypatch):
    endless = Metric(compute=lambda split: float("inf") if split == "forget" else 1.0, signals=("split",), **WORDS)
    monkeypatch.setitem(METRICS, "endless", endless)
    with np.errstate(invalid="ignore"):  # its interval is none either
        found = score_model(tiny.model, tiny.tokenizer, data, settings("endless")).metrics["endless"]
    assert set(found) == {"retain"} and found["retain"]["value"] == 1.0


def test_what_cannot_be_measured_in_a_run_is_refused_before_it(data):
    with pytest.raises(InputError, match="evaluation.metrics.0.: 'rouge_l_f2'. Did you mean 'rouge_l_f1'"):
        from_dict(Job, {"target": {"benchmark": "embedded"}, "evaluation": {"metrics": ["rouge_l_f2"]}})
    with pytest.raises(InputError, match="'privleak' compares with a model trained without the forget set"):
        check_in_run(["privleak"], data)
    with pytest.raises(InputError, match="'mia_gradient_norm' needs gradients of all weights"):
        check_in_run(["mia_gradient_norm"], data)
    check_in_run(NAMES, data)
