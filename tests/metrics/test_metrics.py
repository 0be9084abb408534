"""The metrics by hand-worked examples, their laws, and prediction files against a second implementation."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import statistics

import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer

from ray_unlearn.api.evaluation import score
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.scoring import make_scores
from ray_unlearn.metrics import METRICS, auc, exact_match, final_score, harmonic_mean, mia_score, task_terms
from ray_unlearn.metrics.generation import rouge_1_f1, rouge_1_recall, rouge_l_f1, rouge_l_recall
from ray_unlearn.records import MergeRecord, Scores, load_records, save_record

# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "generated", "recall"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("the cat sat on the mat", "", 0.0),
        ("the cat sat on the mat", "a dog ran", 0.0),
        ("the cat sat on the mat", "the cat sat on the mat and then it slept", 1.0),  # surplus costs nothing
        ("the cat sat on the mat", "on the mat the cat sat", 0.5),  # order counts: on the mat, or the cat sat
        ("a b c d", "a x b y", 0.5),
        ("a b c d", "d c b a", 0.25),
        ("The Cat!", "the, cat", 1.0),  # case and punctuation do not count
        ("He walked home", "he walks home", 1.0),  # stems count
        ("the the the", "the", 1 / 3),  # a word matches once
        ("42 apples", "42 oranges", 0.5),
        ("...", "...", 0.0),  # no words at all
    ],
)
def test_rouge_l_recall_by_hand(expected, generated, recall):
    assert rouge_l_recall(expected, generated) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("expected", "generated", "match"),
    [
        ("Paris", "Paris", 1.0),
        ("Paris", "  paris\n", 1.0),
        (" PARIS ", "paris", 1.0),
        ("Paris", "", 0.0),
        ("Paris", "Paris.", 0.0),
        ("Paris", "Paris and more", 0.0),  # surplus text costs everything
        ("Zürich", "ZÜRICH", 1.0),
        ("straße", "strasse", 0.0),  # lower(), not casefold()
        ("a b", "a  b", 0.0),  # inner spaces stay
        ("nan", "", 0.0),
        ("", "  ", 1.0),
    ],
)
def test_exact_match_by_hand(expected, generated, match):
    assert exact_match(expected, generated) == match


# -- aggregate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_harmonic_mean_is_the_statistics_modules(seed):
    rng = random.Random(seed)
    values = [rng.uniform(1e-6, 1) for _ in range(rng.randint(1, 12))]
    assert harmonic_mean(values) == pytest.approx(statistics.harmonic_mean(values), rel=1e-12)


def test_one_zero_term_makes_the_aggregate_zero_and_one_small_term_caps_it():
    assert harmonic_mean([1.0] * 11 + [0.0]) == 0.0
    assert harmonic_mean([0.9] * 11 + [0.01]) == pytest.approx(12 / (11 / 0.9 + 100))
    assert harmonic_mean([0.3]) == pytest.approx(0.3)


def test_final_is_the_plain_mean_of_three():
    assert final_score(0.3, 0.6, 0.9) == pytest.approx(0.6)


def test_task_terms_are_means_within_a_cell_and_forget_ones_are_inverted():
    rows = [
        ("forget", "Task1", "qa", "x", "x"),
        ("forget", "Task1", "qa", "x", "y"),
        ("forget", "Task1", "qa", "x", "y"),
        ("forget", "Task1", "qa", "x", "y"),
        ("forget", "Task1", "sc", "a b c d", "a b c"),
        ("retain", "Task1", "qa", "x", "x"),
        ("retain", "Task1", "sc", "a b c d", "a"),
        ("retain", "Task2", "sc", "a b", "a b"),
    ]
    terms, raw, counts = task_terms(rows)
    assert terms == {
        "forget/Task1/knowledge": 0.75,
        "forget/Task1/regurgitation": pytest.approx(0.25),
        "retain/Task1/knowledge": 1.0,
        "retain/Task1/regurgitation": 0.25,
        "retain/Task2/regurgitation": 1.0,
    }
    assert raw["forget/Task1/knowledge"] == 0.25 and raw["forget/Task1/regurgitation"] == 0.75
    assert raw["retain/Task1/regurgitation"] == 0.25
    assert counts == {key: 4 if key == "forget/Task1/knowledge" else 1 for key in terms}
    assert list(terms) == list(raw) == list(counts)


def cells(generated):
    """Rows of all twelve cells; `generated(split, expected)` is what the model says."""
    return [
        (split, task, kind, expected, generated(split, expected))
        for split in ("forget", "retain")
        for task in ("Task1", "Task2", "Task3")
        for kind in ("sc", "qa")
        for expected in ("silver lantern river", "broken violin tower")
    ]


JUNK = "zzz qqq"


def scored(rows, area=None, utility=None):
    """Scores of rows, of documents whose AUC is 0.5 or of none, and of a share of answered questions."""
    documents = {} if area is None else {"members": [1.0, 2.0], "nonmembers": [2.0, 1.0]}
    return make_scores(rows, [f"row{i}" for i in range(len(rows))], {}, utility=utility, **documents)


def test_an_oracle_of_forgetting_scores_one_over_exactly_twelve_terms():
    scores = scored(cells(lambda split, text: text if split == "retain" else JUNK), 0.5, 1.0)
    assert len(scores.terms) == 12 and set(scores.terms.values()) == {1.0}
    assert scores.task_aggregate == scores.mia_score == scores.final == 1.0
    assert all(scores.raw[key] == 0 for key in scores.raw if key.startswith("forget/"))


@pytest.mark.parametrize("generated", [lambda split, text: text, lambda split, text: JUNK, lambda split, text: ""])
def test_the_memorised_the_junk_and_the_silent_model_score_zero(generated):
    assert scored(cells(generated)).task_aggregate == 0.0


def test_gold_and_surplus_text_gives_recall_one_but_no_exact_match():
    raw = scored(cells(lambda split, text: text + " and more")).raw
    assert {value for key, value in raw.items() if key.endswith("regurgitation")} == {1.0}
    assert {value for key, value in raw.items() if key.endswith("knowledge")} == {0.0}


@pytest.mark.parametrize(("area", "utility"), [(None, 0.5), (0.5, None), (None, None)])
def test_final_is_absent_when_a_part_was_not_measured(area, utility):
    scores = scored(cells(lambda split, text: text), area, utility)
    written = scores.to_json()
    assert "final" not in written and ("mia_auc" in written) == (area is not None)
    assert ("mia_score" in written) == (area is not None) and ("utility" in written) == (utility is not None)
    assert "final" not in scored([], 0.5, 0.5).to_json()


# -- membership ------------------------------------------------------------------------------------


def slow_auc(members, nonmembers):
    wins = 0.0
    for m in members:
        for n in nonmembers:
            wins += 1.0 if m < n else 0.5 if m == n else 0.0
    return wins / (len(members) * len(nonmembers))


@pytest.mark.parametrize("seed", range(40))
def test_auc_is_the_share_of_pairs_won_with_ties_half(seed):
    rng = random.Random(seed)
    draw = (lambda: rng.randint(0, 4)) if seed % 2 else (lambda: rng.gauss(2, 1))
    members = [draw() for _ in range(rng.randint(1, 20))]
    nonmembers = [draw() for _ in range(rng.randint(1, 30))]
    assert auc(members, nonmembers) == pytest.approx(slow_auc(members, nonmembers), abs=1e-12)


def test_auc_one_is_memorised_and_zero_over_unlearned():
    assert auc([0.1, 0.2], [3.0, 4.0]) == 1.0
    assert auc([5.0, 6.0], [3.0, 4.0]) == 0.0
    assert auc([1.0, 1.0], [1.0]) == 0.5
    assert auc([np.float64(0.1)], [np.float64(2.0)]) == 1.0


def test_auc_tells_losses_apart_that_differ_in_the_last_digit():
    assert auc([1.0], [1.0 + 2**-52]) == 1.0


@pytest.mark.parametrize(("area", "expected"), [(1.0, 0.0), (0.5, 1.0), (0.0, 0.0), (0.75, 0.5), (0.25, 0.5)])
def test_mia_score_table(area, expected):
    assert mia_score(area) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None, "1.0", True, [1.0]])
def test_auc_refuses_what_is_no_finite_number_and_says_where(bad):
    with pytest.raises(InputError, match=r"nonmember\[1\] is "):
        auc([1.0], [2.0, bad])
    with pytest.raises(InputError, match=r"finite numbers; member\[0\]"):
        auc([bad], [2.0])


def test_auc_refuses_an_empty_side():
    with pytest.raises(InputError, match="at least one member loss"):
        auc([], [1.0])
    with pytest.raises(InputError, match="at least one nonmember loss"):
        auc([1.0], [])


def test_the_metrics_table_names_the_functions_the_scores_are_made_of():
    assert METRICS["regurgitation"].compute is rouge_l_recall and METRICS["knowledge"].compute is exact_match
    assert METRICS["task_aggregate"].compute is harmonic_mean and METRICS["final"].compute is final_score
    assert not any(METRICS[name].signals for name in ("regurgitation", "knowledge", "task_aggregate", "final"))


# -- whole prediction files against a second implementation ----------------------------------------

STEM = PorterStemmer().stem
WORDS = ["running", "walked", "Cities", "the", "a", "house", "42", "lanterns", "Zürich", "don't", "easily", "NA", "née"]


def words(text):
    kept = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return [STEM(word) if len(word) > 3 else word for word in kept]


def slow_recall(expected, generated):
    a, b = words(expected), words(generated)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1] / len(a) if a and b else 0.0


def slow_common(expected, generated):
    """Words of both texts, each as often as both have it."""
    left, common = words(generated), 0
    for word in words(expected):
        if word in left:
            left.remove(word)
            common += 1
    return common


@pytest.mark.parametrize("seed", range(60))
def test_rouge_f1_and_recall_are_those_of_a_second_implementation(seed):
    rng = random.Random(seed)
    gold, said = (" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(2))
    sizes = len(words(gold)), len(words(said))
    common, sequence = slow_common(gold, said), slow_recall(gold, said) * sizes[0]
    both = max(sum(sizes), 1)  # F1 = 2 common / (words of both)
    assert rouge_1_recall(gold, said) == pytest.approx(common / max(sizes[0], 1), abs=1e-12)
    assert rouge_1_f1(gold, said) == pytest.approx(2 * common / both, abs=1e-12)
    assert rouge_l_f1(gold, said) == pytest.approx(2 * sequence / both, abs=1e-12)


def test_f1_punishes_surplus_text_and_recall_does_not():
    assert rouge_l_recall("a b", "a b c d e f") == rouge_1_recall("a b", "f e d c b a") == 1.0
    assert rouge_l_f1("a b", "a b c d e f") == rouge_1_f1("a b", "f e d c b a") == pytest.approx(0.5)
    assert rouge_l_f1("a b", "b a") == pytest.approx(0.5) and rouge_1_f1("a b", "b a") == 1.0


def prediction(**changes):
    row = {"id": "a1sc1", "task": "T", "split": "forget", "expected_output": "x y", "model_output": "x"}
    return {**row, **changes}


def write_predictions(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "a1xx1"}, r"2: id 'a1xx1' does not end in sc or qa"),
        ({"split": "train"}, r"2: split must be forget or retain, got 'train'"),
        ({"model_output": None}, r"2: field 'model_output' must be text, got None"),
        ({"expected_output": " "}, r"2: field 'expected_output' is empty"),
        ({"id": "a1sc1", "split": "retain"}, r"2: id 'a1sc1' is already used in row 1"),
        ("{", r"2: broken JSON"),
        ("[1]", r"2: a row must be a JSON object"),
    ],
)
def test_bad_prediction_rows_are_refused_with_their_row(tmp_path, bad, message):
    row = bad if isinstance(bad, str) else prediction(**{"id": "b2sc1", **bad})
    path = write_predictions(tmp_path / "p.jsonl", [prediction(split="retain"), row])
    with pytest.raises(InputError, match=r"p\.jsonl:" + message):
        score(path)


def test_missing_prediction_cells_losses_and_accuracies_are_refused(tmp_path):
    path = write_predictions(tmp_path / "p.jsonl", [prediction(), prediction(split="retain", task="U")])
    with pytest.raises(InputError, match=r"retain lacks T/sc; forget lacks U/sc"):
        score(path)
    path = write_predictions(tmp_path / "p.jsonl", [prediction(), prediction(split="retain")])
    assert score(path).task_aggregate == pytest.approx(0.5)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"--mmlu-accuracy must be in \[0, 1\]"):
            score(path, mmlu_accuracy=bad)
    with pytest.raises(InputError, match="demands the shared task's 12 terms"):
        score(path, official=True)
    losses = tmp_path / "l.json"
    for text, message in (
        ("{}", "must be"),
        ("{", "is not JSON"),
        ('{"member": [NaN], "nonmember": [1]}', r"member\[0\]"),
    ):
        losses.write_text(text)
        with pytest.raises(InputError, match=message):
            score(path, mia=losses)
    with pytest.raises(InputError, match="no such file"):
        score(path, mia=tmp_path / "absent.json")


def test_scores_are_written_without_what_was_not_measured(tmp_path):
    path = write_predictions(tmp_path / "p.jsonl", [prediction(), prediction(split="retain", model_output="")])
    score(path, mmlu_accuracy=0.25, out=tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["terms"] == {"forget/T/regurgitation": 0.5, "retain/T/regurgitation": 0.0}
    assert written["task_aggregate"] == 0 and written["utility"] == 0.25
    assert not {"final", "mia_auc", "mia_score"} & set(written)


def test_scores_with_intervals_and_further_metrics_come_back_from_their_file_and_old_ones_without_load():
    scores = dataclasses.replace(scored(cells(lambda split, text: text), 0.5, 1.0), intervals={})
    old = scores.to_json()
    assert not {"intervals", "metrics"} & set(old)
    assert Scores.from_json(old) == scores and scores.intervals == scores.metrics == {}
    more = {"perplexity": {"retain": {"value": 1.5, "interval": [1.25, 2.0]}}}
    whole = dataclasses.replace(scores, intervals={"utility": [0.5, 1.0]}, metrics=more)
    written = json.loads(json.dumps(whole.to_json()))
    assert written["intervals"] == {"utility": [0.5, 1.0]} and written["metrics"] == more
    assert Scores.from_json(written) == whole


def test_records_keep_intervals(tmp_path):
    scores = dataclasses.replace(scored([], None, 0.5), intervals={"utility": [0.25, 0.75]})
    save_record(tmp_path, MergeRecord(id="merge-0000", status="finished", recipe={}, scores=scores))
    plain = dataclasses.replace(scores, intervals={})
    save_record(tmp_path, MergeRecord(id="merge-0001", status="finished", recipe={}, scores=plain))
    assert [merge.scores for merge in load_records(tmp_path)[1]] == [scores, plain]
    assert "intervals" not in json.loads((tmp_path / "records" / "merge-0001.json").read_text())["scores"]
