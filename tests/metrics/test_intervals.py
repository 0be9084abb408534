"""Bootstrap intervals: the resamples by slow loops over the same draws, and how often the intervals hold the truth."""

from __future__ import annotations

import random
import time
from collections import Counter
from statistics import NormalDist, fmean
from statistics import harmonic_mean as slow_harmonic_mean

import numpy as np
import pytest

from ray_unlearn.errors import InputError
from ray_unlearn.metrics import (
    bootstrap,
    cell_terms,
    harmonic_mean,
    intervals,
    membership,
    objective_intervals,
    row_values,
    with_documents,
)
from ray_unlearn.metrics.bootstrap import limits, ratio_interval, resample
from ray_unlearn.metrics.intervals import RowValue, aggregate_resamples, mean_of_parts, mia_score_interval
from ray_unlearn.metrics.membership import membership_resamples
from ray_unlearn.records import document_id


@pytest.mark.parametrize(
    ("row", "document"),
    [("f1000sc1", "f1000"), ("f1000qa4", "f1000"), ('"6ee"sc1', '"6ee"'), ("row-17", "row-17"), ("qa", "qa")],
)
def test_the_document_is_the_id_without_kind_and_number(row, document):
    assert document_id(row) == document


def test_resamples_draw_as_many_units_as_there_are_each_equally_often():
    drawn = resample(7, 4000, np.random.default_rng(0))
    assert drawn.shape == (4000, 7) and set(drawn.sum(1)) == {7.0}
    np.testing.assert_allclose(drawn.mean(0), 1, atol=0.06)
    np.testing.assert_allclose(drawn.var(0), 6 / 7, atol=0.08)  # binomial(7, 1/7)


def made_rows(rng, documents=5, exact=False):
    """Rows of two tasks; documents with both kinds, several questions, or one kind alone."""
    rows = []
    for split in ("forget", "retain"):
        for task in ("Task1", "Task2"):
            for number in range(documents):
                kinds = [("sc", "qa"), ("sc", "qa", "qa"), ("qa",), ("sc",)][rng.randint(0, 3) if number > 1 else 0]
                for kind in kinds:
                    value = float(rng.random() < 0.6) if kind == "qa" or exact else rng.random()
                    rows.append(RowValue(f"{split}/{task}/{kind}", f"{task}-{number}", value))
    rng.shuffle(rows)
    return rows


@pytest.fixture
def draws(monkeypatch):
    """What `resample` drew, in order."""
    kept = []

    def recording(units, resamples, rng):
        kept.append(resample(units, resamples, rng))
        return kept[-1]

    for user in (bootstrap, intervals, membership):
        monkeypatch.setattr(user, "resample", recording)
    return kept


def slow_aggregate(rows):
    cells = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row.value)
    terms = [1 - fmean(v) if cell.startswith("forget/") else fmean(v) for cell, v in cells.items()]
    return slow_harmonic_mean([max(term, 0) for term in terms])


def documents_of(rows):
    """(split, document) -> its rows, and strata of documents with equal sets of cells, in order of first rows."""
    documents, strata = {}, {}
    for row in rows:
        documents.setdefault((row.cell.split("/")[0], row.document), []).append(row)
    for name, own in documents.items():
        strata.setdefault(frozenset(row.cell for row in own), []).append(name)
    return documents, list(strata.values())


@pytest.mark.parametrize("seed", range(8))
def test_aggregate_resamples_are_those_of_a_loop_that_copies_whole_documents(seed, draws):
    rows = made_rows(random.Random(seed), 12, exact=seed % 2 == 0)
    found = aggregate_resamples(rows, 40, seed)
    documents, strata = documents_of(rows)
    assert [d.shape[1] for d in draws] == [len(stratum) for stratum in strata]
    for index in range(40):
        copied = []
        for stratum, drawn in zip(strata, draws, strict=True):
            for name, times in zip(stratum, drawn[index], strict=True):
                copied += documents[name] * int(times)
        assert {row.cell for row in copied} == {row.cell for row in rows}  # no cell is ever empty
        assert found[index] == pytest.approx(slow_aggregate(copied), abs=1e-9)
    assert len(set(found)) > 3


def slow_auc_and_tpr(members, nonmembers, rate):
    wins = sum(1.0 if m < n else 0.5 if m == n else 0.0 for m in members for n in nonmembers)
    tpr = max(
        [
            sum(m <= t for m in members) / len(members)
            for t in members
            if sum(n <= t for n in nonmembers) <= rate * len(nonmembers) + 1e-9
        ],
        default=0.0,
    )
    return wins / len(members) / len(nonmembers), tpr


@pytest.mark.parametrize("rate", [0.01, 0.2])
@pytest.mark.parametrize("seed", range(8))
def test_membership_resamples_are_those_of_loops_over_pairs_and_thresholds_ties_included(seed, rate, draws):
    rng = random.Random(seed)
    draw = (lambda: float(rng.randint(0, 4))) if seed % 2 else (lambda: rng.gauss(0, 1))
    members, nonmembers = [draw() for _ in range(rng.randint(1, 12))], [draw() for _ in range(rng.randint(1, 15))]
    areas, rates = membership_resamples(members, nonmembers, false_positives=rate, resamples=30, seed=seed)
    for index in range(30):
        mine = [m for m, times in zip(members, draws[0][index], strict=True) for _ in range(int(times))]
        others = [n for n, times in zip(nonmembers, draws[1][index], strict=True) for _ in range(int(times))]
        assert (areas[index], rates[index]) == pytest.approx(slow_auc_and_tpr(mine, others, rate), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_ratio_interval_is_that_of_a_loop(seed, draws):
    rng = random.Random(seed)
    totals, sizes = [rng.random() for _ in range(20)], [float(rng.randint(1, 9)) for _ in range(20)]
    documents = [rng.choice("abcdefg") for _ in range(20)]
    found = ratio_interval(totals, sizes, documents, resamples=60, seed=seed)
    names = list(dict.fromkeys(documents))
    values = []
    for drawn in draws[0]:
        picked = [i for name, times in zip(names, drawn, strict=True) for _ in range(int(times))
                  for i in range(20) if documents[i] == name]  # fmt: skip
        values.append(sum(totals[i] for i in picked) / sum(sizes[i] for i in picked))
    assert found == pytest.approx(limits(values, sum(totals) / sum(sizes)))


# -- limits ----------------------------------------------------------------------------------------


def test_limits_of_unbiased_resamples_are_their_percentiles():
    values = np.random.default_rng(0).normal(0.5, 0.1, 20_001)
    low, high = limits(values, float(np.median(values)))
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.1, 0.5 + 1.96 * 0.1), abs=0.006)
    assert limits(values, float(np.median(values)), 0.5) == pytest.approx([0.5 - 0.0674, 0.5 + 0.0674], abs=0.004)


def test_limits_move_against_the_bias_by_efron_s_formula():
    values = [float(value) for value in range(1001)]
    normal = NormalDist()
    shift = normal.inv_cdf(600.5 / 1001)  # 600 below the estimate, and half of the one that equals it
    expected = [1000 * normal.cdf(2 * shift + end) for end in (-1.959964, 1.959964)]
    assert limits(values, 600.0) == pytest.approx(expected, abs=0.01)
    assert limits(values, 600.0)[0] > limits(values, 500.0)[0]


@pytest.mark.parametrize("estimate", [-3.0, 0.0, 0.4, 1.0, 7.0])
def test_limits_hold_the_estimate_and_have_no_width_where_all_agree(estimate):
    low, high = limits([0.2, 0.3, 0.9], estimate)
    assert low <= estimate <= high
    assert limits([0.25] * 50, 0.25) == [0.25, 0.25]


def share_held(truth, draw, find, count=200):
    return sum(low <= truth <= high for low, high in (find(draw(seed), seed) for seed in range(count))) / count


def test_ninety_five_percent_intervals_of_the_aggregate_hold_the_truth_about_as_often():
    chances = [0.45, 0.6, 0.8, 0.9]

    def draw(seed):
        rng = random.Random(seed)
        rows = []
        for task, chance in enumerate(chances):
            for number in range(16):
                kept = float(rng.random() < chance)  # of the whole document: its rows go together
                rows += [RowValue(f"retain/T{task}/{kind}", f"d{number}", kept) for kind in ("sc", "qa")]
        return rows

    def find(rows, seed):
        return limits(aggregate_resamples(rows, 300, seed), slow_aggregate(rows))

    assert 0.89 <= share_held(slow_harmonic_mean(chances), draw, find) <= 0.99


def test_rows_of_one_document_count_once():
    rng = random.Random(0)
    single = [(f"d{n}", rng.random()) for n in range(30)]
    alone = ratio_interval([v for _, v in single], [1.0] * 30, [d for d, _ in single])
    five = [pair for pair in single for _ in range(5)]
    together = ratio_interval([v for _, v in five], [1.0] * 150, [d for d, _ in five])
    apart = ratio_interval([v for _, v in five], [1.0] * 150, list(range(150)))
    assert together == pytest.approx(alone)
    assert apart[1] - apart[0] < 0.6 * (together[1] - together[0])


def test_intervals_of_the_auc_hold_the_truth_about_as_often():
    shift = 0.8
    truth = NormalDist().cdf(shift / 2**0.5)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return rng.normal(0, 1, 30), rng.normal(shift, 1, 40)

    def find(signals, seed):
        return limits(membership_resamples(*signals, resamples=300, seed=seed)[0], membership.auc(*map(list, signals)))

    assert 0.89 <= share_held(truth, draw, find) <= 0.99


# -- objectives ------------------------------------------------------------------------------------


def test_the_mia_score_s_interval_is_that_of_all_aucs_between_the_ends():
    for low, high in ((0.2, 0.4), (0.6, 0.9), (0.3, 0.6), (0.45, 0.9), (0.5, 0.5), (0.0, 1.0), (1.0, 1.0)):
        scores = [1 - 2 * abs(low + (high - low) * i / 10_000 - 0.5) for i in range(10_001)]
        assert mia_score_interval([low, high]) == pytest.approx([min(scores), max(scores)], abs=1e-3)
    assert mia_score_interval([0.44, 0.57])[1] == 1.0  # perfect forgetting is not ruled out by noise


def test_the_mean_of_parts_adds_the_distances_in_squares():
    assert mean_of_parts([0.5, 0.5, 0.5], [[0.2, 0.5], [0.1, 0.9], [0.5, 0.5]]) == pytest.approx(
        [0.5 - 0.5 / 3, 0.5 + 0.4 / 3]
    )
    assert mean_of_parts([0.3], [[0.1, 0.4]]) == pytest.approx([0.1, 0.4])


def test_the_final_s_interval_is_near_that_of_resampling_its_parts_together():
    rows = made_rows(random.Random(3), 40)
    rng = np.random.default_rng(1)
    members, nonmembers, right = (
        rng.normal(0, 1, 80).tolist(),
        rng.normal(1, 1, 90).tolist(),
        [True] * 30 + [False] * 50,
    )
    found = objective_intervals(rows, members=members, nonmembers=nonmembers, right=right)
    together = (
        aggregate_resamples(rows, 4000, 1)
        + (1 - 2 * np.abs(membership_resamples(members, nonmembers, resamples=4000, seed=2)[0] - 0.5))
        + rng.binomial(80, 30 / 80, 4000) / 80
    ) / 3
    estimate = (slow_aggregate(rows) + 1 - 2 * abs(membership.auc(members, nonmembers) - 0.5) + 30 / 80) / 3
    assert found["final"] == pytest.approx(limits(together, estimate), abs=0.012)


def test_the_final_s_interval_is_the_image_of_the_parts_where_one_part_alone_is_uncertain():
    sure = [0.5, 0.5]
    assert intervals.final_interval((0.5, 0.6, 0.5), (sure, [0.55, 0.7], sure)) == pytest.approx([1.6 / 3, 1.9 / 3])
    assert intervals.final_interval((0.5, 0.4, 0.5), (sure, [0.3, 0.45], sure)) == pytest.approx([1.6 / 3, 1.9 / 3])
    assert intervals.final_interval((0.5, 0.55, 0.5), (sure, [0.45, 0.6], sure)) == pytest.approx([1.8 / 3, 2 / 3])
    assert intervals.final_interval((0.5, 0.5, 0.5), (sure, [0.5, 0.5], [0.4, 0.7])) == pytest.approx(
        [1.9 / 3, 2.2 / 3]
    )
    assert intervals.final_interval((1.0, 0.5, 1.0), ([1.0, 1.0], [0.3, 0.8], [1.0, 1.0]))[1] == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.9])
def test_intervals_of_the_final_hold_the_truth_about_as_often_where_the_mia_cannot_tell_and_where_it_can(shift):
    area = NormalDist().cdf(shift / 2**0.5)
    truth = (0.8 + 1 - 2 * abs(area - 0.5) + 0.5) / 3

    def draw(seed):
        rng = np.random.default_rng(seed)
        rows = [RowValue(f"retain/T/{kind}", f"d{n}", float(rng.random() < 0.8)) for kind in "abc" for n in range(30)]
        losses = {"members": rng.normal(0, 1, 40).tolist(), "nonmembers": rng.normal(shift, 1, 60).tolist()}
        return rows, losses, (rng.random(80) < 0.5).tolist()

    def find(drawn, seed):
        rows, losses, right = drawn
        return objective_intervals(rows, **losses, right=right, resamples=300, seed=seed)["final"]

    assert 0.89 <= share_held(truth, draw, find) <= 0.995


def test_objectives_have_intervals_where_they_were_measured():
    rows = made_rows(random.Random(0))
    assert objective_intervals() == {}
    assert list(objective_intervals(rows)) == ["task_aggregate"]
    assert list(objective_intervals(members=[1.0, 2.0], nonmembers=[2.0])) == ["mia_auc", "mia_score"]
    whole = objective_intervals(rows, members=[1.0, 2.0], nonmembers=[2.0, 3.0], right=[True, False])
    assert list(whole) == ["task_aggregate", "mia_auc", "mia_score", "utility", "final"]
    assert whole == objective_intervals(rows, members=[1.0, 2.0], nonmembers=[2.0, 3.0], right=[True, False])
    assert whole != objective_intervals(rows, members=[1.0, 2.0], nonmembers=[2.0, 3.0], right=[True, False], seed=1)
    assert all(type(end) is float for interval in whole.values() for end in interval)


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_a_membership_test_with_an_empty_or_broken_side_is_refused(sides):
    with pytest.raises(InputError, match="MIA"):
        objective_intervals(members=sides[0], nonmembers=sides[1])
    with pytest.raises(InputError, match="MIA"):
        membership_resamples(*sides)


def test_rows_as_a_model_is_scored_on_go_into_the_interval_by_their_documents():
    rows = [
        (split, "T", kind, "a b", text)
        for split in ("forget", "retain")
        for text in ("a b", "a c", "d e")
        for kind in ("sc", "qa")
    ]
    ids = [f"{split}{n}{kind}{k}" for split in "fr" for n in range(3) for k, kind in enumerate(("sc", "qa"))]
    units = with_documents(row_values(rows), ids)
    assert units[2] == RowValue("forget/T/regurgitation", "f1", 0.5)
    value = harmonic_mean(list(cell_terms(row_values(rows))[0].values()))
    low, high = objective_intervals(units)["task_aggregate"]
    assert 0 <= low < value < high <= 1


def test_an_interval_of_no_rows_is_refused():
    with pytest.raises(InputError, match="at least one row"):
        ratio_interval([], [], [])


def test_a_model_that_gives_nothing_away_and_one_that_answers_nothing_have_intervals_without_width():
    def all_alike(value):
        return [RowValue(f"{s}/T/{k}", f"d{n}", value) for s in ("forget", "retain") for k in "ab" for n in range(4)]

    assert objective_intervals(all_alike(1.0))["task_aggregate"] == [0.0, 0.0]
    perfect = [RowValue(row.cell, row.document, float(row.cell[0] == "r")) for row in all_alike(1.0)]
    assert objective_intervals(perfect, right=[True] * 5) == {"task_aggregate": [1.0, 1.0], "utility": [1.0, 1.0]}
    assert objective_intervals(members=[0.1, 0.2], nonmembers=[3.0])["mia_score"] == [0.0, 0.0]


def test_one_document_alone_and_one_row_a_cell():
    rows = [RowValue("forget/T/sc", "a", 0.25), RowValue("retain/T/sc", "a", 0.75)]  # one name, two splits
    assert objective_intervals(rows)["task_aggregate"] == [0.75, 0.75]


def test_a_thousand_resamples_of_three_hundred_rows_are_quick():
    rng = random.Random(0)
    rows = [
        RowValue(f"{split}/Task{task}/{kind}", f"{task}-{n}", rng.random())
        for split in ("forget", "retain") for task in range(3) for kind in ("sc", "qa") for n in range(25)
    ]  # fmt: skip
    assert len(rows) == 300 and len(Counter(row.cell for row in rows)) == 12
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        assert len(aggregate_resamples(rows, 1000)) == 1000
        best = min(best, time.perf_counter() - began)
    assert best < 0.05


def test_a_rounding_error_is_a_tie():
    values = [0.1] * 40 + [0.3] * 20 + [0.5] * 40
    for estimate in (0.3 - 1e-15, 0.3, 0.3 + 1e-15):
        assert limits(values, estimate, 0.5) == pytest.approx([0.1, 0.5])
