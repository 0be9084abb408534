"""Memorisation, membership and privacy metrics by slow references, known values, and defects seen elsewhere."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from statistics import fmean

import pytest

from ray_unlearn.errors import InputError
from ray_unlearn.metrics import METRICS, auc
from ray_unlearn.metrics.membership import (
    gradient_norm_signal,
    loss_signal,
    min_k,
    min_k_plus_plus,
    reference_signal,
    tpr_at_fpr,
    zlib_signal,
)
from ray_unlearn.metrics.memorisation import (
    answer_probability,
    exact_memorisation,
    extraction_strength,
    log_truth_ratio,
    mean_log_prob,
    perplexity,
    truth_ratio,
)
from ray_unlearn.metrics.privacy import forget_quality, privleak, score_differences

SEEDS = range(25)


def drawn_log_probs(rng, least=1):
    return [-rng.expovariate(0.7) for _ in range(rng.randint(least, 12))]


# -- memorisation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_probability_and_perplexity_are_the_geometric_mean_and_its_inverse(seed):
    values = drawn_log_probs(random.Random(seed))
    product = math.prod(math.exp(value) for value in values)
    assert answer_probability(values) == pytest.approx(product ** (1 / len(values)))
    assert perplexity(values) == pytest.approx(1 / answer_probability(values))


def test_probability_and_perplexity_at_their_ends():
    assert answer_probability([0.0, 0.0]) == perplexity([0.0]) == 1.0
    assert answer_probability([-1e4]) == 0.0
    assert math.isfinite(perplexity([-1e4])) and perplexity([-1e4]) > 1e300
    assert perplexity([-math.log(50)] * 7) == pytest.approx(50)  # a uniform model over 50 tokens


def slow_strength(matches):
    return next(1 - k / len(matches) for k in range(len(matches) + 1) if all(matches[k:]))


@pytest.mark.parametrize("matches", itertools.product([False, True], repeat=5))
def test_extraction_strength_and_exact_memorisation_of_every_answer_of_five_tokens(matches):
    assert extraction_strength(matches) == pytest.approx(slow_strength(matches))
    assert exact_memorisation(matches) == pytest.approx(sum(matches) / 5)


@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_extraction_strength_of_nothing_extracted_is_zero_and_not_one_over_the_length(length):
    assert extraction_strength([False] * length) == 0.0
    assert extraction_strength([True] * (length - 1) + [False]) == 0.0
    assert extraction_strength([True] * length) == 1.0


@pytest.mark.parametrize("metric", [answer_probability, exact_memorisation, extraction_strength, perplexity])
def test_an_answer_without_tokens_is_refused(metric):
    with pytest.raises(InputError, match="at least one token"):
        metric([])


@pytest.mark.parametrize("seed", SEEDS)
def test_truth_ratio_is_tofu_s(seed):
    rng = random.Random(seed)
    right, wrong = drawn_log_probs(rng), [drawn_log_probs(rng) for _ in range(rng.randint(1, 5))]
    geometric = math.prod(answer_probability(one) for one in wrong) ** (1 / len(wrong))
    ratio = geometric / answer_probability(right)
    log_ratio = log_truth_ratio([mean_log_prob(right)], [mean_log_prob(one) for one in wrong])
    assert math.exp(log_ratio) == pytest.approx(ratio)
    assert truth_ratio(log_ratio, "forget") == pytest.approx(min(ratio, 1 / ratio))
    assert truth_ratio(log_ratio, "retain") == pytest.approx(max(0.0, 1 - ratio), abs=1e-12)


def test_truth_ratio_at_its_ends():
    assert truth_ratio(0.0, "forget") == 1.0 and truth_ratio(0.0, "retain") == 0.0  # as a model that knows nothing
    assert truth_ratio(5e4, "forget") == truth_ratio(-5e4, "forget") == 0.0  # no overflow
    assert truth_ratio(-5e4, "retain") == 1.0 and truth_ratio(5e4, "retain") == 0.0
    assert (
        truth_ratio(log_truth_ratio([-40.0], [-40.0, -40.0]), "forget") == 1.0
    )  # p = 4e-18, as improbable as the others
    with pytest.raises(InputError, match="at least one right and one wrong answer, got 1 and 0"):
        log_truth_ratio([-1.0], [])


# -- membership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 1.0])
def test_min_k_averages_the_least_probable_tokens(seed, share):
    values = drawn_log_probs(random.Random(seed))
    left, picked = list(values), []
    for _ in range(max(1, math.floor(share * len(values)))):
        picked.append(min(left))
        left.remove(min(left))
    assert min_k(values, share) == pytest.approx(-fmean(picked))
    assert min_k(values, 1.0) == pytest.approx(loss_signal(values))


@pytest.mark.parametrize("seed", SEEDS)
def test_min_k_plus_plus_standardises_over_the_vocabulary(seed):
    rng = random.Random(seed)
    scores, own, means, deviations = [], [], [], []
    for _ in range(rng.randint(1, 9)):
        weights = [rng.expovariate(1) for _ in range(6)]
        probs = [weight / sum(weights) for weight in weights]
        mean = sum(p * math.log(p) for p in probs)
        deviation = math.sqrt(sum(p * (math.log(p) - mean) ** 2 for p in probs))
        own.append(math.log(rng.choice(probs)))
        means.append(mean)
        deviations.append(deviation)
        scores.append((own[-1] - mean) / deviation)
    lowest = sorted(scores)[: max(1, int(0.4 * len(scores)))]
    assert min_k_plus_plus(own, means, deviations) == pytest.approx(-fmean(lowest))


def test_min_k_plus_plus_of_a_model_that_is_certain_is_finite():
    assert min_k_plus_plus([0.0], [0.0], [0.0]) == 0.0
    assert math.isfinite(min_k_plus_plus([-80.0], [0.0], [0.0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_min_k_plus_plus_has_the_floor_of_open_unlearning(seed):
    """There the variance is at least 1e-6, whatever the distribution."""
    rng = random.Random(seed)
    tokens = [(-rng.expovariate(1), -rng.expovariate(1), 10 ** rng.uniform(-6, 0)) for _ in range(5)]
    scores = sorted((own - mean) / math.sqrt(max(deviation**2, 1e-6)) for own, mean, deviation in tokens)
    assert min_k_plus_plus(*zip(*tokens, strict=True)) == pytest.approx(-fmean(scores[:2]))


def test_signals_by_hand():
    text = "the lantern " * 20
    assert loss_signal([-1.0, -3.0]) == 2.0
    assert zlib_signal([-1.0, -3.0], text) == 2.0 / len(zlib.compress(text.encode()))
    assert zlib_signal([-2.0], "née") > 0
    assert reference_signal([-1.0, -3.0], [-4.0, -6.0]) == -3.0
    assert gradient_norm_signal([1.0, 3.0]) == 2.0
    with pytest.raises(InputError, match="at least two tokens"):
        loss_signal([])


def slow_tpr(members, nonmembers, rate):
    best = 0.0
    for threshold in [-math.inf, *members, *nonmembers]:
        false = sum(signal <= threshold for signal in nonmembers) / len(nonmembers)
        if false <= rate + 1e-12:
            best = max(best, sum(signal <= threshold for signal in members) / len(members))
    return best


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_tpr_at_fpr_is_the_best_of_all_thresholds(seed, rate):
    rng = random.Random(seed)
    draw = (lambda: rng.randint(0, 5)) if seed % 2 else (lambda: rng.gauss(0, 1))
    members, nonmembers = ([draw() for _ in range(rng.randint(1, 25))] for _ in range(2))
    assert tpr_at_fpr(members, nonmembers, rate) == pytest.approx(slow_tpr(members, nonmembers, rate))


def test_tpr_at_one_percent_counts_the_hundredth_non_member():
    others = [float(n) for n in range(100)]
    assert tpr_at_fpr([0.5], others) == 1.0  # one of a hundred is at or below
    assert tpr_at_fpr([1.0], others) == 0.0  # two are
    assert tpr_at_fpr([0.5], others[:99]) == 0.0  # one of ninety-nine is more than 1 %
    for members, nonmembers, name in (([], [1.0], "member"), ([1.0], [], "nonmember")):
        with pytest.raises(InputError, match=f"at least one {name} "):
            tpr_at_fpr(members, nonmembers)


# -- privacy ---------------------------------------------------------------------------------------


def test_privleak_is_zero_for_the_reference_itself_and_signed_by_the_side():
    assert privleak(0.53, 0.53) == 0.0
    assert privleak(1.0, 0.5) == -100.0  # memorised
    assert privleak(0.0, 0.5) == 100.0  # driven out
    unlearned, retrained = 0.2, 0.6
    assert privleak(unlearned, retrained) == pytest.approx(100 * ((1 - unlearned) - (1 - retrained)) / (1 - retrained))
    with pytest.raises(InputError, match="it knows the members"):
        privleak(0.5, 1.0)


def distance(left, right):
    return max(
        abs(sum(x <= at for x in left) / len(left) - sum(x <= at for x in right) / len(right)) for at in left + right
    )


@pytest.mark.parametrize("seed", range(12))
def test_forget_quality_is_the_share_of_splits_at_least_as_far_apart(seed):
    rng = random.Random(seed)
    left, right = [rng.gauss(0, 1) for _ in range(4)], [rng.gauss(seed / 6, 1) for _ in range(5)]
    pooled, found = left + right, distance(left, right)
    splits = list(itertools.combinations(range(9), 4))
    far = sum(
        distance([pooled[i] for i in split], [pooled[i] for i in range(9) if i not in split]) >= found - 1e-12
        for split in splits
    )
    assert forget_quality(left, right) == pytest.approx(far / len(splits))


def test_forget_quality_at_its_ends():
    ratios = [random.Random(1).gauss(0, 1) for _ in range(80)]
    assert forget_quality(ratios, ratios) == 1.0
    assert forget_quality([ratio + 9 for ratio in ratios], ratios) < 1e-20
    assert forget_quality([math.exp(r) for r in ratios[:40]], [math.exp(r) for r in ratios[40:]]) == forget_quality(
        ratios[:40], ratios[40:]
    )  # the order alone counts, so R and log R agree
    with pytest.raises(InputError, match="truth ratios of both models, got 0 and 80"):
        forget_quality([], ratios)


def test_score_differences_are_of_what_both_have():
    assert score_differences({"a": 1.0, "b": 2.0}, {"b": 0.5, "c": 9.0}) == {"b": 1.5}


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is_and_which_way_is_better(name):
    metric = METRICS[name]
    low, high = metric.range
    assert metric.formula and metric.source and metric.collapsed and low < high
    assert metric.best and all(low <= value <= high for value in metric.best.values())


def test_a_memorised_model_is_at_the_worst_end_of_the_forget_metrics():
    known, silent = [-1e-4] * 6, [True] * 6
    assert answer_probability(known) > 0.999 and exact_memorisation(silent) == extraction_strength(silent) == 1.0
    assert {METRICS[n].best["forget"] for n in ("answer_probability", "exact_memorisation", "extraction_strength")} == {
        0.0
    }
    members, others = [loss_signal(known)] * 5, [2.0] * 5
    assert auc(members, others) == tpr_at_fpr(members, others) == 1.0 and METRICS["mia_loss"].best["auc"] == 0.5
