"""Merge methods against slow loops and their laws; the edge cases that peers get wrong."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ray_unlearn.merging import MERGES, MergeRecipe, merge_options
from ray_unlearn.merging.sparsify import (
    Cut,
    apply_cut,
    breadcrumbs,
    count_magnitudes,
    drop_and_rescale,
    find_cut,
    magprune,
    magprune_probabilities,
    trim,
)


def merged(method, deltas, weights, densities, lambda_=1.0, base=None, **options):
    """The merged delta; of the options, a method gets what it reads."""
    names = [str(place) for place in range(len(deltas))]
    own = {name: options.pop(name) for name in merge_options() if name in options}
    recipe = MergeRecipe(
        method=method,
        members=names,
        weights=weights,
        densities=densities,
        lambda_=lambda_,
        options={name: value for name, value in own.items() if name in MERGES[method].options},
        **options,
    )
    return recipe.combine(deltas, base)


def ties(deltas, weights, densities, lambda_=1.0):
    return merged("ties", deltas, weights, densities, lambda_)


def drawn(seed, coarse=False):
    """A random case: deltas of one shape, weights, densities, lambda."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count, shape = rng.randint(1, 4), rng.choice([(1,), (5,), (3, 4), (7, 3), (2, 3, 2)])
    deltas = [torch.randn(shape, generator=generator) for _ in range(count)]
    if coarse:  # many equal magnitudes and zeros
        deltas = [(2 * delta).round() / 2 for delta in deltas]
    weights = [rng.uniform(0.1, 3) for _ in range(count)]
    densities = [rng.choice([0.05, 0.2, 0.5, 0.77, 1.0]) for _ in range(count)]
    return deltas, weights, densities, rng.choice([0.5, 1.0, 1.4])


# -- trim ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.2, 0.29, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_trim_keeps_exactly_the_stated_number_of_the_largest(seed, density):
    delta = torch.randn(random.Random(seed).randint(1, 40), generator=torch.Generator().manual_seed(seed)) + 0.01
    keep = max(1, int(density * len(delta)))
    kept = trim(delta, density)
    assert int((kept != 0).sum()) == keep
    largest = sorted(range(len(delta)), key=lambda i: -abs(delta[i].item()))[:keep]
    expected = [delta[i].item() if i in largest else 0.0 for i in range(len(delta))]
    assert kept.tolist() == expected


def test_trim_of_equal_magnitudes_keeps_the_number_and_the_first():
    delta = torch.tensor([[1.0, -1.0, 2.0], [1.0, -1.0, 0.5]])
    assert trim(delta, 0.5).tolist() == [[1.0, -1.0, 2.0], [0, 0, 0]]
    assert trim(torch.full((10,), -3.0), 0.3).tolist() == [-3.0] * 3 + [0.0] * 7
    assert trim(delta, 1.0).equal(delta) and delta[1, 1] == -1  # the argument is left alone


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_cuts_keep_the_largest_over_all_magnitudes(seed, coarse):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(3000, generator=generator) * 10 ** (4 * torch.randn(3000, generator=generator))
    if coarse:
        delta = delta.sign() * 2.0 ** delta.abs().log2().round()
        delta[::7] = 0
    keeps = [1, 2, 10, 500, 1499, 1500, 2600, 2999, 3000]
    order = sorted(range(3000), key=lambda i: (-abs(delta[i].item()), i))
    known = count_magnitudes(delta)
    for keep in keeps:
        stays = set(order[:keep])
        expected = torch.tensor([delta[i].item() if i in stays else 0.0 for i in range(3000)])
        assert apply_cut(delta, find_cut(delta, keep, known)).equal(expected)
    zeros = torch.zeros(5)
    assert find_cut(zeros, 2, count_magnitudes(zeros)) == Cut(0.0)


# -- ties ------------------------------------------------------------------------------------------


def slow_ties(deltas, weights, densities, lambda_):
    """TIES entry by entry in Python floats."""
    flat = [trim(delta, density).flatten().tolist() for delta, density in zip(deltas, densities, strict=True)]
    merged = []
    for entries in zip(*flat, strict=True):
        vote = sum(weight * entry for weight, entry in zip(weights, entries, strict=True))
        positive = vote >= 0
        top = bottom = 0.0
        for weight, entry in zip(weights, entries, strict=True):
            if (entry > 0) if positive else (entry < 0):
                top += weight * entry
                bottom += weight
        merged.append(lambda_ * top / bottom if bottom else 0.0)
    return torch.tensor(merged).reshape(deltas[0].shape)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_ties_equals_the_slow_loop(seed, coarse):
    deltas, weights, densities, lambda_ = drawn(seed, coarse)
    if coarse:
        weights = [round(2 * weight) / 2 + 0.5 for weight in weights]  # exact sums, hence votes of exactly zero
    before = [delta.clone() for delta in deltas]
    result = ties(deltas, weights, densities, lambda_)
    torch.testing.assert_close(result, slow_ties(deltas, weights, densities, lambda_), rtol=1e-5, atol=1e-6)
    assert all(a.equal(b) for a, b in zip(deltas, before, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_laws_of_ties(seed):
    deltas, weights, densities, lambda_ = drawn(seed)
    first = deltas[0]
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ties([first], [0.7], [1.0]), first, **close)
    torch.testing.assert_close(ties([first] * 3, [0.2, 1.0, 5.0], [0.5] * 3), trim(first, 0.5), **close)
    result = ties(deltas, weights, densities, lambda_)
    order = random.Random(seed).sample(range(len(deltas)), len(deltas))
    shuffled = ([x[i] for i in order] for x in (deltas, weights, densities))
    torch.testing.assert_close(ties(*shuffled, lambda_), result, rtol=0, atol=1e-6)
    torch.testing.assert_close(ties(deltas, [8 * w for w in weights], densities, lambda_), result, **close)
    torch.testing.assert_close(ties(deltas, weights, densities, 2 * lambda_), 2 * result, **close)
    torch.testing.assert_close(ties([-d for d in deltas], weights, densities, lambda_), -result, **close)


def test_a_vote_of_exactly_zero_is_positive_and_where_nobody_agrees_the_result_is_zero():
    up, down = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0])
    assert ties([up, down], [1.0, 1.0], [1.0, 1.0]).tolist() == [1.0, 2.0, 0.0]
    assert ties([up, down], [1.0, 2.0], [1.0, 1.0]).tolist() == [-1.0, 2.0, 0.0]


def test_a_trimmed_entry_neither_votes_nor_thins_the_mean():
    big, small = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 6.0])
    assert ties([big, small], [1.0, 3.0], [0.5, 0.5]).tolist() == [4.0, 6.0]
    assert ties([big, small], [1.0, 3.0], [1.0, 1.0]).tolist() == [1.75, 4.75]


# -- the other rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_linear_and_task_arithmetic_are_their_formulas(seed):
    deltas, weights, densities, lambda_ = drawn(seed)
    summed = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        summed = summed + weight * delta
    torch.testing.assert_close(merged("task_arithmetic", deltas, weights, densities, lambda_), lambda_ * summed)
    mean = lambda_ * summed / sum(weights)
    torch.testing.assert_close(merged("linear", deltas, weights, densities, lambda_), mean)
    torch.testing.assert_close(merged("task_arithmetic", deltas, weights, densities, lambda_, normalize=True), mean)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_breadcrumbs_drops_both_ends_by_magnitude(seed, gamma):
    count = random.Random(seed).randint(1, 60)
    delta = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    for density in (0.05, 0.5, 0.85, 0.999):
        keep = max(1, int(density * count))
        ranked = sorted(range(count), key=lambda i: -abs(delta[i].item()))
        over = min(int(gamma * count), count - keep)
        stays = set(ranked[over : over + keep])
        expected = [delta[i].item() if i in stays else 0.0 for i in range(count)]
        assert breadcrumbs(delta, density, gamma).tolist() == expected


def test_breadcrumbs_without_outliers_is_trim_and_never_drops_everything():
    delta = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert breadcrumbs(delta, 0.5, 0.0).equal(trim(delta, 0.5))
    assert breadcrumbs(delta, 0.5, 0.01).equal(trim(delta, 0.5))  # 1 % of 64 entries is none


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_random_masks_follow_density_and_seed_and_restore_the_sum_of_magnitudes():
    delta = torch.randn(100, 100, generator=generator(0))
    kept = drop_and_rescale(delta, 0.3, False, generator(1))
    assert kept.equal(drop_and_rescale(delta, 0.3, False, generator(1)))
    assert not kept.equal(drop_and_rescale(delta, 0.3, False, generator(2)))
    assert 0.27 < (kept != 0).float().mean() < 0.33
    assert ((kept == 0) | (kept == delta)).all()
    for scaled in (drop_and_rescale(delta, 0.3, True, generator(1)), magprune(delta, 0.3, 0.1, True, generator(1))):
        torch.testing.assert_close(scaled.abs().sum(), delta.abs().sum())


def test_magprune_keeps_by_rank_within_the_row():
    delta = torch.randn(7, 50, generator=generator(0))
    chances = magprune_probabilities(delta, 0.5, 0.2)
    for row, chance in zip(delta.abs().tolist(), chances.tolist(), strict=True):
        order = sorted(range(50), key=lambda i: row[i])
        for rank, place in enumerate(order):
            assert chance[place] == pytest.approx(0.3 + 0.4 * rank / 49, abs=1e-6)
    many = [magprune(delta, 0.5, 0.2, False, generator(seed)) != 0 for seed in range(400)]
    assert (torch.stack(many).float().mean(0) - chances).abs().max() < 0.12
    assert magprune_probabilities(torch.ones(3, 1), 0.5, 0.2).tolist() == [[0.5]] * 3


def test_a_random_merge_depends_on_its_seed_alone():
    deltas, weights, densities, _ = drawn(2)
    deltas = [torch.randn(20, 20, generator=generator(i)) for i in range(len(deltas))]
    for name in ("dare_ties", "dare_linear"):
        half = [0.5] * len(deltas)
        first = merged(name, deltas, weights, half)
        assert first.equal(merged(name, deltas, weights, half)) and not first.equal(
            merged(name, deltas, weights, half, seed=1)
        )


@pytest.mark.parametrize("seed", range(5))
def test_slerp_and_karcher_of_two_equal_weights_meet_and_keep_ends(seed):
    base = torch.randn(6, 5, generator=generator(seed))
    deltas = [torch.randn(6, 5, generator=generator(seed + 100 * i)) for i in (1, 2)]
    ones = [1.0, 1.0]
    middle = merged("slerp", deltas, ones, ones, base=base)
    # A Karcher mean of two directions is the middle of their arc; lengths are averaged in both ways only along it.
    first, second = (base + delta for delta in deltas)
    unit = (first / first.norm() + second / second.norm()) / 2
    expected = unit / unit.norm() * (first.norm() + second.norm()) / 2
    torch.testing.assert_close(base + merged("karcher", deltas, ones, ones, base=base), expected, rtol=0, atol=1e-5)
    angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
    half = math.sin(angle / 2) / math.sin(angle)
    torch.testing.assert_close(base + middle, half * (first + second), rtol=0, atol=1e-5)
    end = merged("slerp", deltas, [0.0, 1.0], ones, base=base)
    torch.testing.assert_close(end, deltas[1], rtol=0, atol=1e-5)
    back = merged("slerp", deltas[::-1], [3.0, 1.0], ones, base=base)
    torch.testing.assert_close(merged("slerp", deltas, [1.0, 3.0], ones, base=base), back, rtol=0, atol=1e-5)


def test_spherical_means_of_parallel_and_of_zero_weights_are_finite():
    base = torch.zeros(4)
    line = torch.tensor([1.0, 2.0, 0.0, -1.0])
    ones = [1.0, 1.0]
    torch.testing.assert_close(merged("slerp", [line, 3 * line], ones, ones, base=base), 2 * line)
    torch.testing.assert_close(merged("karcher", [line, 3 * line], ones, ones, base=base), 2 * line)
    assert merged("slerp", [line, -line], ones, ones, base=base).isfinite().all()
    assert merged("karcher", [line, -line], ones, ones, base=base).isfinite().all()
    for name in ("slerp", "karcher"):
        assert not merged(name, [0 * line, 0 * line], ones, ones, base=base).any()


def test_model_stock_by_hand():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    cosine = 1 / math.sqrt(2)
    expected = 2 * cosine / (1 + cosine) * torch.tensor([1.0, 0.5])
    ones = [1.0, 1.0]
    torch.testing.assert_close(merged("model_stock", [first, second], ones, ones), expected)
    assert not merged("model_stock", [first, -first], ones, ones).any()  # the estimate is singular: the base stays
    torch.testing.assert_close(merged("model_stock", [first, first], ones, ones), first)


# -- laws of all rows ------------------------------------------------------------------------------

WHOLE = [name for name, method in MERGES.items() if not method.on_factors]


def drawn_for(name, seed, count=3):
    method = MERGES[name]
    count = method.most or max(count, method.fewest)
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(12, 9, generator=generator) for _ in range(count)]
    weights = [0.5 + place for place in range(count)] if method.uses_weights else [1.0] * count
    densities = [0.6, 0.8, 0.7][:count] if method.uses_density else [1.0] * count
    return torch.randn(12, 9, generator=generator), deltas, weights, densities


@pytest.mark.parametrize("name", WHOLE)
def test_no_row_changes_its_arguments_and_lambda_scales_all(name):
    base, deltas, weights, densities = drawn_for(name, 0)
    before = [delta.clone() for delta in [base, *deltas]]
    result = merged(name, deltas, weights, densities, base=base)
    assert all(a.equal(b) for a, b in zip([base, *deltas], before, strict=True))
    assert result.shape == base.shape and result.any()
    torch.testing.assert_close(merged(name, deltas, weights, densities, 0.5, base=base), 0.5 * result)


@pytest.mark.parametrize("name", [name for name in WHOLE if not MERGES[name].random])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_members_changes_nothing_but_rounding(name, seed):
    base, deltas, weights, densities = drawn_for(name, seed)
    order = list(reversed(range(len(deltas))))
    turned = [[values[i] for i in order] for values in (deltas, weights, densities)]
    there, back = merged(name, deltas, weights, densities, base=base), merged(name, *turned, base=base)
    torch.testing.assert_close(there, back, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_identical_members_kept_whole_are_that_member(name):
    base, deltas, weights, _ = drawn_for(name, 3)
    count = len(deltas)
    weights = [weight / sum(weights) for weight in weights]  # for the sums that are not normalised
    result = merged(name, [deltas[0]] * count, weights, [1.0] * count, base=base)
    torch.testing.assert_close(result, deltas[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in WHOLE if MERGES[name].fewest == 1])
def test_one_member_kept_whole_is_that_member(name):
    base, deltas, _, _ = drawn_for(name, 4)
    torch.testing.assert_close(merged(name, deltas[:1], [1.0], [1.0], base=base), deltas[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in WHOLE if MERGES[name].uses_weights and name != "slerp"])
def test_a_weight_of_zero_takes_the_member_out(name):
    base, deltas, _, densities = drawn_for(name, 5)
    with_it = merged(name, deltas, [1.0, 2.0, 0.0], densities, base=base)
    without = merged(name, deltas[:2], [1.0, 2.0], densities[:2], base=base)
    torch.testing.assert_close(with_it, without, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["ties", "linear", "task_arithmetic"])
def test_a_negative_weight_subtracts(name):
    delta, other = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])
    result = merged(name, [delta, other], [-1.0, 2.0], [1.0, 1.0])
    expected = {"ties": [-1.0, 2.0, 4.0], "linear": [-1.0, 2.0, 8.0], "task_arithmetic": [-1.0, 2.0, 8.0]}
    assert result.tolist() == expected[name]


@pytest.mark.parametrize("name", [name for name in WHOLE if MERGES[name].sparsify])
@pytest.mark.parametrize("density", [1e-6, 0.2])
def test_a_density_that_keeps_nothing_keeps_the_largest_entry_and_says_so(name, density):
    delta = torch.tensor([0.5, -3.0, 1.0])
    options = {"epsilon": density / 2, "rescale": False}
    if MERGES[name].random:
        results = [merged(name, [delta], [1.0], [density], seed=seed, **options) for seed in range(20)]
        assert all(result.any() for result in results)
    else:
        with pytest.warns(UserWarning, match="keeps nothing of a tensor of 3 entries; the largest one is kept"):
            assert merged(name, [delta], [1.0], [density], **options).tolist() == [0.0, -3.0, 0.0]


# -- numbers over depth ----------------------------------------------------------------------------


# -- factors ---------------------------------------------------------------------------------------


# -- recipes ---------------------------------------------------------------------------------------
