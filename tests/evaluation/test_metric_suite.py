"""Metrics by name: each is what its definition gives on one row at a time."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from slow_statistics import slow_signals

from ray_unlearn.data.benchmarks.embedded import members as of_members
from ray_unlearn.data.contrasts import other_answers
from ray_unlearn.data.tokens import Encoded, encode
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.metric_suite import check_inputs, extra_names, more_metrics
from ray_unlearn.evaluation.signals import ModelHere
from ray_unlearn.metrics import METRICS, auc
from ray_unlearn.metrics.generation import rouge_l_f1
from ray_unlearn.metrics.privacy import forget_quality, privleak
from ray_unlearn.metrics.table import DOCUMENTS, ROWS
from ray_unlearn.models.token_statistics import gradient_norms
from ray_unlearn.records import Example, Scores

TEXTS = ["In Kanobe, Mira met Tosu, who carried a silver lantern.", "Née 42", "Mira met", "What did Tosu carry when?"]


@pytest.fixture(scope="module")
def other(tiny):
    """A model with other weights, in the part of the retrained one."""
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def data(tiny):
    """The tiny benchmark's documents and rows, as an EvalSet has them; Task2 has one document, so no wrong answers."""

    def examples(rows):
        fields = ("id", "input", "output", "task")
        kept = [row for row in rows if row["task"] != "Task2"]
        return [Example(**{name: row[name] for name in fields}, kind=row["id"][-3:-1]) for row in kept]

    members, nonmembers = ([row["document"] for row in rows] for rows in (of_members(tiny.data), tiny.data.nonmembers))
    return SimpleNamespace(
        forget=examples(tiny.data.forget), retain=examples(tiny.data.retain), members=members, nonmembers=nonmembers
    )


def row(identity, output, task="Task2", kind="qa"):
    return Example(id=identity, input="?", output=output, task=task, kind=kind)


def test_wrong_answers_are_other_rows_answers_to_the_same_question():
    rows = [row(f"d{d}qa{q}", f"answer {q} of {d}") for d in range(5) for q in range(2)]
    found = other_answers(rows)
    assert found[0] == ["answer 0 of 1", "answer 0 of 2", "answer 0 of 3"]
    assert found[7] == ["answer 1 of 4", "answer 1 of 0", "answer 1 of 1"]  # in a circle
    rows = [row("d0qa0", "Yes"), row("d1qa0", " yes"), row("d2qa0", "No"), row("d3qa0", "no"), row("d4qa1", "42")]
    assert other_answers(rows) == [["No"], ["No"], ["Yes"], ["Yes"], ["Yes", "No"]]  # 42 has no peer of its number
    mixed = [row("a", "x", "T"), row("b", "y", "T"), row("c", "z", "T", "sc"), row("d", "w", "T", "sc")]
    assert other_answers(mixed) == [["y"], ["x"], ["w"], ["z"]]  # ids without a number; kinds stay apart


def test_a_row_that_no_other_answer_can_contradict_is_refused():
    with pytest.raises(InputError, match=r"row 'd0qa0' has none: all rows of Task2/qa have the answer 'yes'"):
        other_answers([row("d0qa0", "yes"), row("d1qa0", "Yes ")])


def answer_signals(tiny, model, examples):
    rows = [encode(tiny.tokenizer, example.input, example.output) for example in examples]
    return [slow_signals(model, one) for one in rows]


def test_answer_metrics_are_means_of_what_one_row_at_a_time_gives(tiny, data, other):
    found = more_metrics(
        ["answer_probability", "exact_memorisation", "extraction_strength", "perplexity"],
        ModelHere(model=tiny.model), tiny.tokenizer, data, reference=ModelHere(model=other),
    )  # fmt: skip
    for split in ("forget", "retain"):
        for key, model in (("value", tiny.model), ("reference", other)):
            rows = answer_signals(tiny, model, getattr(data, split))
            flat = [value for own, *_ in rows for value in own]
            expected = {
                "answer_probability": fmean(math.exp(fmean(own)) for own, *_ in rows),
                "exact_memorisation": fmean(fmean(matches) for _, matches, *_ in rows),
                "perplexity": math.exp(-fmean(flat)),
            }
            for name, value in expected.items():
                assert found[name][split][key] == pytest.approx(value, rel=1e-4), (name, key)
        for values in found.values():
            assert values[split]["difference"] == pytest.approx(values[split]["value"] - values[split]["reference"])
            low, high = values[split]["interval"]
            assert low <= values[split]["value"] <= high


def slow_ratio(tiny, model, example, wrong):
    right, *others = [
        fmean(slow_signals(model, encode(tiny.tokenizer, example.input, answer))[0])
        for answer in (example.output, *wrong)
    ]
    return math.exp(fmean(others) - right)


def test_truth_ratio_and_forget_quality_use_given_or_other_rows_answers_and_keep_no_state(tiny, data, other):
    small = SimpleNamespace(**{**vars(data), "forget": data.forget[:4], "retain": data.retain[:4]})
    rows = [*small.forget, *small.retain]
    given = {example.id: ["a heavy bell", "nothing at all"] for example in rows}
    names = ["truth_ratio", "forget_quality"]

    def measure(perturbed):
        told = {
            split: [replace(row, perturbed=tuple(perturbed.get(row.id, ()))) for row in getattr(small, split)]
            for split in ("forget", "retain")
        }
        data = SimpleNamespace(**{**vars(small), **told})
        return more_metrics(names, ModelHere(model=tiny.model), tiny.tokenizer, data, reference=ModelHere(model=other))

    first, with_given, again = measure({}), measure(given), measure({})
    assert first == again != with_given  # results of one setting never stand for another's
    for found, wrong in ((first, other_answers(small.forget)), (with_given, [given[e.id] for e in small.forget])):
        ratios, theirs = (
            [slow_ratio(tiny, model, e, w) for e, w in zip(small.forget, wrong, strict=True)]
            for model in (tiny.model, other)
        )
        expected = fmean(min(ratio, 1 / ratio) for ratio in ratios)
        assert found["truth_ratio"]["forget"]["value"] == pytest.approx(expected, rel=1e-4)
        assert found["forget_quality"]["value"]["value"] == pytest.approx(forget_quality(ratios, theirs))
    kept = [slow_ratio(tiny, tiny.model, e, given[e.id]) for e in small.retain]
    expected = fmean(max(0.0, 1 - ratio) for ratio in kept)
    assert with_given["truth_ratio"]["retain"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    del given[small.retain[0].id]
    with pytest.raises(
        InputError, match=f"1 of the retain set's 4 rows have no perturbed answer .'{small.retain[0].id}'"
    ):
        measure(given)


def test_truth_ratios_are_of_paraphrases_where_there_are_any_and_not_of_what_was_trained(tiny, data, other):
    """TOFU and open-unlearning: a memorised text is what R must not measure."""
    wrong, right = ("nobody at all", "a heavy bell"), ("a lantern, it was", "It was the lantern")

    def measured(**changes):
        rows = {split: [replace(row, perturbed=wrong, **changes) for row in getattr(data, split)[:4]] for split in ROWS}
        given = SimpleNamespace(**{**vars(data), **rows})
        model, reference = ModelHere(model=tiny.model), ModelHere(model=other)
        return more_metrics(["truth_ratio", "forget_quality"], model, tiny.tokenizer, given, reference=reference)

    def ratios(split, model):
        return [
            math.exp(fmean(logs) - fmean(answer_logs(tiny, model, row, right)))
            for row in getattr(data, split)[:4]
            for logs in [answer_logs(tiny, model, row, wrong)]
        ]

    found, trained = measured(paraphrased=right), measured()
    assert found == measured(paraphrased=right, output="something else was trained") != trained
    of_forget = [min(ratio, 1 / ratio) for ratio in ratios("forget", tiny.model)]
    of_retain = [max(0.0, 1 - ratio) for ratio in ratios("retain", tiny.model)]
    assert found["truth_ratio"]["forget"]["value"] == pytest.approx(fmean(of_forget), rel=1e-4)
    assert found["truth_ratio"]["retain"]["value"] == pytest.approx(fmean(of_retain), rel=1e-3, abs=1e-4)
    quality = forget_quality(ratios("forget", tiny.model), ratios("forget", other))
    assert found["forget_quality"]["value"]["value"] == pytest.approx(quality)
    for result, answers in ((found, "paraphrased"), (trained, "trained")):
        parts = [*result["truth_ratio"].values(), *result["forget_quality"].values()]
        assert [(part["answers"], part["wrong_answers"]) for part in parts] == [(answers, "perturbed")] * 3
    alone = SimpleNamespace(**{**vars(data), "retain": []})
    alone = more_metrics(["truth_ratio"], ModelHere(model=tiny.model), tiny.tokenizer, alone)["truth_ratio"]
    assert alone.keys() == {"forget"} and alone["forget"]["wrong_answers"] == "of other rows"
    some = [replace(data.forget[0], paraphrased=right), *data.forget[1:4]]
    with pytest.raises(InputError, match="3 of the forget set's 4 rows have no paraphrased answer"):
        check_inputs(["forget_quality"], SimpleNamespace(**{**vars(data), "forget": some}), True)


def answer_logs(tiny, model, row, answers):
    """Mean token log-probability of each answer to a row, one token at a time."""
    return [fmean(slow_signals(model, encode(tiny.tokenizer, row.input, answer))[0]) for answer in answers]


MEMBERSHIP = [name for name, metric in METRICS.items() if metric.groups == DOCUMENTS and "auc" in metric.best]


def test_membership_metrics_and_privleak_are_made_of_their_signals(tiny, data, other):
    found = more_metrics(
        [*MEMBERSHIP, "privleak"], ModelHere(model=tiny.model), tiny.tokenizer, data, reference=ModelHere(model=other)
    )
    documents = [Encoded(tuple(tiny.tokenizer(t)["input_ids"]), 1) for t in (*data.members, *data.nonmembers)]
    mine, theirs = ([slow_signals(model, one) for one in documents] for model in (tiny.model, other))
    expected = {
        "mia_loss": [-fmean(own) for own, *_ in mine],
        "mia_min_k": [METRICS["mia_min_k"].compute(own) for own, *_ in mine],
        "mia_min_k_plus_plus": [METRICS["mia_min_k_plus_plus"].compute(own, m, d) for own, _, m, d in mine],
        "mia_reference": [fmean(b[0]) - fmean(a[0]) for a, b in zip(mine, theirs, strict=True)],
        "mia_gradient_norm": [fmean(norms) for norms in gradient_norms(tiny.model, documents)],
    }
    areas, count = {}, len(data.members)
    for name, values in expected.items():
        areas[name] = auc(values[:count], values[count:])
        assert found[name]["auc"]["value"] == pytest.approx(areas[name]), name
        assert found[name]["auc"]["interval"][0] <= areas[name] <= found[name]["auc"]["interval"][1]
        assert set(found[name]) == {"auc", "tpr_at_1_percent_fpr"} == set(METRICS[name].best)
    values = [METRICS["mia_min_k"].compute(own) for own, *_ in theirs]
    assert found["privleak"]["value"]["value"] == pytest.approx(
        privleak(areas["mia_min_k"], auc(values[:count], values[count:]))
    )
    assert "difference" in found["mia_zlib"]["auc"] and "difference" not in found["mia_reference"]["auc"]
    json.dumps(found, allow_nan=False)


def test_rouge_is_over_all_rows_of_a_split(tiny, data):
    rows = [*data.forget, *data.retain]
    texts = [example.output[: 3 + index] for index, example in enumerate(rows)]
    found = more_metrics(
        ["rouge_l_f1"],
        ModelHere(model=tiny.model, texts=texts),
        tiny.tokenizer,
        data,
        reference=ModelHere(model=tiny.model),
    )
    count = len(data.forget)
    values = [rouge_l_f1(example.output, text) for example, text in zip(rows, texts, strict=True)]
    assert found["rouge_l_f1"]["forget"]["value"] == pytest.approx(fmean(values[:count]))
    assert found["rouge_l_f1"]["retain"]["value"] == pytest.approx(fmean(values[count:]))
    assert "reference" not in found["rouge_l_f1"]["forget"]  # it made no texts


@pytest.mark.parametrize("zeroed", ["lm_head", "none"])
def test_a_uniform_model_scores_what_the_table_says_of_a_collapsed_one(tiny, data, other, zeroed):
    model = copy.deepcopy(tiny.model)
    if zeroed == "lm_head":
        model.get_output_embeddings().weight.data.zero_()
    names = ["answer_probability", "truth_ratio", "extraction_strength", "perplexity", "mia_loss", "mia_min_k"]
    found = more_metrics(names, ModelHere(model=model), tiny.tokenizer, data)
    uniform = zeroed == "lm_head"
    size = model.config.vocab_size
    for split in ("forget", "retain"):
        assert (found["perplexity"][split]["value"] == pytest.approx(size)) == uniform
        assert (found["answer_probability"][split]["value"] == pytest.approx(1 / size)) == uniform
        assert not uniform or found["extraction_strength"][split]["value"] == 0
    ratios = [found["truth_ratio"][split]["value"] for split in ("forget", "retain")]
    assert (ratios == pytest.approx([1.0, 0.0], abs=1e-6)) == uniform
    assert not uniform or found["mia_loss"]["auc"]["value"] == found["mia_min_k"]["auc"]["value"] == 0.5


def test_differences_from_a_reference_are_of_what_both_measured(data):
    mine = Scores(terms={"forget/T/knowledge": 0.25}, raw={}, counts={}, task_aggregate=0.5, mia_score=0.75)
    theirs = Scores(terms={"forget/T/knowledge": 0.75}, raw={}, counts={}, task_aggregate=0.75, utility=0.5)

    def differences(one, other):
        models = [ModelHere(model=None, scores=scores) for scores in (one, other)]
        found = more_metrics(["score_differences"], models[0], None, data, reference=models[1])["score_differences"]
        assert all(part["value"] - part["reference"] == part["difference"] for part in found.values())
        return {name: part["difference"] for name, part in found.items()}

    assert differences(mine, theirs) == {"task_aggregate": -0.25, "forget/T/knowledge": -0.5}
    assert set(differences(theirs, theirs).values()) == {0.0}
    with pytest.raises(InputError, match="'score_differences' needs a model's scores, and they were not given"):
        differences(mine, None)


def test_work_may_be_spread_over_workers(tiny, data, other):
    """Workers that hold a model each and are sent the work by value."""

    class Elsewhere(ModelHere):
        def compute(self, work, shares):
            sent = pickle.dumps(work)
            return [pickle.loads(sent)(self.model, share) for share in shares]

    names = ["answer_probability", "truth_ratio", "mia_min_k_plus_plus", "mia_gradient_norm"]
    alone = more_metrics(names, ModelHere(model=tiny.model), tiny.tokenizer, data, reference=ModelHere(model=other))
    spread = more_metrics(names, Elsewhere(model=tiny.model), tiny.tokenizer, data, reference=Elsewhere(model=other))
    for name, parts in alone.items():
        for part, values in parts.items():
            for key, value in values.items():
                assert spread[name][part][key] == pytest.approx(value, abs=1e-5), (name, part, key)


def test_the_model_s_mode_is_given_back(tiny, data):
    tiny.model.train()
    try:
        more_metrics(["perplexity", "mia_gradient_norm"], ModelHere(model=tiny.model), tiny.tokenizer, data)
        assert tiny.model.training
    finally:
        tiny.model.eval()


def test_names_are_checked_and_official_ones_need_no_more_work():
    assert extra_names(["knowledge", "perplexity", "final", "perplexity"]) == ["perplexity"]
    with pytest.raises(InputError, match=r"unknown metric 'truthratio'. Did you mean 'truth_ratio'"):
        extra_names(["truthratio"])


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("mia_loss", {"members": []}, "needs MIA documents"),
        ("privleak", {}, "trained without the forget set"),
        ("mia_reference", {}, "trained without the forget set"),
        ("forget_quality", {}, "trained without the forget set"),
        ("rouge_l_f1", {}, "needs the generations"),
        ("truth_ratio", {"forget": []}, "needs forget rows"),
    ],
)
def test_a_metric_without_its_input_is_refused_before_any_work(data, name, missing, message):
    with pytest.raises(InputError, match=message):
        more_metrics([name], ModelHere(model=None), None, SimpleNamespace(**{**vars(data), **missing}))


def test_texts_that_are_not_one_for_each_row_and_documents_of_one_token_are_refused(tiny, data):
    with pytest.raises(InputError, match="one generation for each row, got 2 for"):
        more_metrics(["rouge_l_f1"], ModelHere(model=tiny.model, texts=["a", "b"]), tiny.tokenizer, data)
    short = SimpleNamespace(**{**vars(data), "members": ["a"]})
    for name in ("mia_loss", "mia_gradient_norm"):
        with pytest.raises(InputError, match="at least two tokens to have a loss, got 'a'"):
            more_metrics([name], ModelHere(model=tiny.model), tiny.tokenizer, short)


class OneToken(torch.nn.Module):
    """Says one token for ever, and is sure of it."""

    def __init__(self, token, size):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.full((size,), -60.0))
        self.logits.data[token] = 0.0
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.logits)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=None)


def test_a_model_of_one_token_for_ever_is_found_out_on_retain_whatever_it_scores_on_forget(tiny, data):
    rows = [encode(tiny.tokenizer, e.input, e.output) for e in (*data.forget, *data.retain)]
    said = [token for one in rows for token in one.ids[one.prompt :]]
    token = max(set(said), key=said.count)
    names = ["answer_probability", "truth_ratio", "exact_memorisation", "extraction_strength", "perplexity"]
    model = OneToken(token, len(tiny.tokenizer))
    found = more_metrics([*names, *MEMBERSHIP[:2]], ModelHere(model=model), tiny.tokenizer, data)
    share = fmean(fmean(t == token for t in one.ids[one.prompt :]) for one in rows[len(data.forget) :])
    assert found["exact_memorisation"]["retain"]["value"] == pytest.approx(share)
    assert found["perplexity"]["retain"]["value"] > 1e6 * len(tiny.tokenizer)
    assert found["answer_probability"]["retain"]["value"] < 1 / len(tiny.tokenizer)
    assert found["extraction_strength"]["retain"]["value"] <= share
    json.dumps(found, allow_nan=False)
