"""Merge methods against slow loops and their laws; written and resident merges of real files agree."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from ray_unlearn.config import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.merging.deltas import linear, task_arithmetic, ties, trim


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
    merged = ties(deltas, weights, densities, lambda_)
    torch.testing.assert_close(merged, slow_ties(deltas, weights, densities, lambda_), rtol=1e-5, atol=1e-6)
    assert all(a.equal(b) for a, b in zip(deltas, before, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_laws_of_ties(seed):
    deltas, weights, densities, lambda_ = drawn(seed)
    first = deltas[0]
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ties([first], [0.7], [1.0]), first, **close)
    torch.testing.assert_close(ties([first] * 3, [0.2, 1.0, 5.0], [0.5] * 3), trim(first, 0.5), **close)
    merged = ties(deltas, weights, densities, lambda_)
    order = random.Random(seed).sample(range(len(deltas)), len(deltas))
    shuffled = ([x[i] for i in order] for x in (deltas, weights, densities))
    torch.testing.assert_close(ties(*shuffled, lambda_), merged, rtol=0, atol=1e-6)
    torch.testing.assert_close(ties(deltas, [8 * w for w in weights], densities, lambda_), merged, **close)
    torch.testing.assert_close(ties(deltas, weights, densities, 2 * lambda_), 2 * merged, **close)
    torch.testing.assert_close(ties([-d for d in deltas], weights, densities, lambda_), -merged, **close)


def test_a_vote_of_exactly_zero_is_positive_and_where_nobody_agrees_the_result_is_zero():
    up, down = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0])
    assert ties([up, down], [1.0, 1.0], [1.0, 1.0]).tolist() == [1.0, 2.0, 0.0]
    assert ties([up, down], [1.0, 2.0], [1.0, 1.0]).tolist() == [-1.0, 2.0, 0.0]


def test_a_trimmed_entry_neither_votes_nor_thins_the_mean():
    big, small = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 6.0])
    assert ties([big, small], [1.0, 3.0], [0.5, 0.5]).tolist() == [4.0, 6.0]
    assert ties([big, small], [1.0, 3.0], [1.0, 1.0]).tolist() == [1.75, 4.75]


# -- linear and task arithmetic --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_linear_and_task_arithmetic_are_their_formulas(seed):
    deltas, weights, densities, lambda_ = drawn(seed)
    summed = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        summed = summed + weight * delta
    torch.testing.assert_close(task_arithmetic(deltas, weights, densities, lambda_), lambda_ * summed)
    torch.testing.assert_close(linear(deltas, weights, densities, lambda_), lambda_ * summed / sum(weights))


def test_a_recipe_passes_its_own_numbers_to_its_method():
    deltas = [torch.tensor([1.0, -3.0, 0.5, 2.0]), torch.tensor([2.0, 1.0, -0.25, 3.0])]
    common = {"members": ["a", "b"], "weights": [1.0, 3.0], "densities": [0.5, 0.75], "lambda_": 0.5}
    assert set(MERGES) == {"ties", "linear", "task_arithmetic"}
    for name, function in (("ties", ties), ("linear", linear), ("task_arithmetic", task_arithmetic)):
        merged = MergeRecipe(method=name, **common).combine(deltas)
        assert merged.equal(function(deltas, [1.0, 3.0], [0.5, 0.75], 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "tie"}, "unknown merge method 'tie'.*Did you mean 'ties'"),
        ({"members": [], "weights": [], "densities": []}, "at least one member"),
        ({"weights": [1.0]}, r"2 members needs 2 weights, got 1: \[1.0\]"),
        ({"densities": [1.0] * 3}, "2 members needs 2 densities, got 3"),
        ({"densities": [1.0, 0.0]}, "above 0 and at most 1, got 0.0"),
        ({"densities": [1.5, 1.0]}, "above 0 and at most 1, got 1.5"),
        ({"densities": [float("nan"), 1.0]}, "above 0 and at most 1, got nan"),
        ({"weights": [0.0, 0.0]}, "ties merge must sum to more than 0"),
        ({"weights": [1.0, -1.0], "method": "linear"}, "linear merge must sum to more than 0"),
    ],
)
def test_recipes_that_cannot_be_merged_are_refused(changes, message):
    good = {"members": ["a", "b"], "weights": [1.0, 1.0], "densities": [1.0, 1.0]}
    with pytest.raises(InputError, match=message):
        MergeRecipe(**{**good, **changes})


# -- real files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tiny):
    from ray_unlearn.scoring import EvalSettings
    from ray_unlearn.trial import Bench

    model = copy.deepcopy(tiny.model).requires_grad_(False)
    return Bench(
        model=model, tokenizer=tiny.tokenizer, forget=[], retain=[], eval_set=None, eval_settings=EvalSettings()
    )


@pytest.fixture(scope="module")
def members(bench):
    """Snapshot files by name: two adapters of unlike rank and targets, and one of full weights."""
    from ray_unlearn.tuning import Tuned

    made = {}
    for seed, (name, options) in enumerate(
        {
            "lora-a": {"lora_rank": 4},
            "lora-b": {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ["q_proj", "down_proj"]},
            "full": {"tuning": "full"},
        }.items()
    ):
        tuned = Tuned(bench.model, TrialConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for key, parameter in tuned.model.named_parameters():
            if key in tuned.trainable and not (name == "full" and "layers.1.mlp" in key):
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if key in tuned.trainable:
                weights[key] = parameter.detach().float().clone()
        made[name] = tuned.files(weights)
        tuned.release()
    return made


RECIPES = [
    MergeRecipe(
        method=method,
        members=["lora-a", "full", "lora-b"],
        weights=[0.4, 1.0, 0.7],
        densities=[0.5, 0.5, 0.8],
        lambda_=0.9,
    )
    for method in MERGES
]


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_the_written_merge_is_the_resident_merge_and_the_base_comes_back(bench, members, tmp_path, recipe):
    from transformers import AutoModelForCausalLM

    from ray_unlearn.merging.actor import Merger
    from ray_unlearn.merging.writer import write_merge
    from ray_unlearn.tuning import deltas, dense

    base = weights_of(bench.model)
    merger = Merger(bench, members)
    merger.merge(recipe)
    resident = weights_of(bench.model)
    merger.restore()
    assert all(tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items())

    found = [{k: dense(d) for k, d in deltas(members[name], bench.model, name).items()} for name in recipe.members]
    for name, tensor in base.items():
        if any(name in delta for delta in found):
            expected = tensor + recipe.combine([delta.get(name, torch.zeros_like(tensor)) for delta in found])
            agree = torch.isclose(resident[name], expected, rtol=0, atol=1e-5)
            assert agree.float().mean() > 0.995  # rounding moves the last kept entries of a near tie
        else:
            assert resident[name].equal(tensor)

    write_merge(recipe, bench.model, bench.tokenizer, members, tmp_path / "out")
    assert all(tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items())
    written = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert set(written) == set(resident)
    for name in resident:
        torch.testing.assert_close(written[name].float(), resident[name], rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert max((resident[name] - base[name]).abs().max().item() for name in base) > 0.01


def test_a_score_restores_the_base_even_when_it_fails(bench, members):
    from ray_unlearn.merging.actor import Merger

    base = weights_of(bench.model)
    merger = Merger(bench, members)
    seen = []

    def broken(eval_set=None):
        seen.append(any(not tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items()))
        raise RuntimeError("no scores")

    merger.score_model = broken
    with pytest.raises(RuntimeError, match="no scores"):
        merger.score(RECIPES[0])
    assert seen == [True]
    assert all(tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items())


def test_merging_one_member_whole_gives_that_member_and_nothing_lingers(bench, members):
    from ray_unlearn.merging.actor import Merger
    from ray_unlearn.tuning import deltas, dense

    merger = Merger(bench, members)
    merger.merge(RECIPES[0])  # an earlier merge must not show in the next
    merger.merge(MergeRecipe(members=["lora-b"], weights=[2.0], densities=[1.0]))
    merged = weights_of(bench.model)
    merger.restore()
    delta = {name: dense(d) for name, d in deltas(members["lora-b"], bench.model, "lora-b").items()}
    assert {name.split(".")[-2] for name in delta} == {"q_proj", "down_proj"}
    for name, tensor in weights_of(bench.model).items():
        expected = tensor + delta[name] if name in delta else tensor
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def test_an_adapters_delta_is_what_peft_itself_merges(bench, members, tmp_path):
    from peft import PeftModel

    from ray_unlearn.tuning import deltas, dense

    for name in ("lora-a", "lora-b"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in members[name].items():
            (folder / file).write_bytes(content)
        peft = PeftModel.from_pretrained(copy.deepcopy(bench.model), folder).merge_and_unload()
        delta = deltas(members[name], bench.model, name)
        for key, parameter in peft.named_parameters():
            expected = bench.model.get_parameter(key) + (dense(delta[key]) if key in delta else 0)
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)


def test_members_of_another_base_are_refused(bench, members, tiny):
    from ray_unlearn import benchmark
    from ray_unlearn.merging.actor import Merger

    settings = benchmark.EmbeddedSettings(hidden=16, layers=1)
    other = copy.copy(bench)
    other.model = benchmark.make_model(settings, len(tiny.tokenizer))
    for name in ("lora-a", "full"):
        with pytest.raises(InputError, match=f"{name} changes .* another base"):
            Merger(other, {name: members[name]})
