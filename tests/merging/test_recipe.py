"""Recipes: numbers over depth, merges on factors, what survives a file, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.factors import Factors, concatenated, shared_start, ties_factors, truncated
from ray_unlearn.merging.recipe import at_depth, depth_of
from ray_unlearn.merging.recipe_file import read_merge_file


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_gradients_are_interpolated_over_the_layers_and_start_outside_of_them():
    assert [at_depth([0.0, 1.0, 3.0], depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert at_depth(0.3, 0.7) == 0.3 and at_depth([0.4], 0.7) == 0.4
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.3.x", "lm_head.weight"]
    assert [depth_of(name, 4) for name in names] == [0.0, 0.0, 1.0, 0.0]
    assert depth_of("model.layers.2.mlp.experts.7.w1.weight", 5) == 0.5 and depth_of("h.0.x", 1) == 1.0


def test_each_number_may_be_a_gradient():
    deltas = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])]
    recipe = MergeRecipe(
        method="task_arithmetic",
        members=["a", "b"],
        weights=[[0.0, 1.0], 1.0],
        densities=[1.0, 1.0],
        lambda_=[1.0, 3.0],
    )
    assert recipe.combine(deltas, tensor="layers.0.w", layers=3).equal(deltas[1])
    assert recipe.combine(deltas, tensor="layers.2.w", layers=3).equal(3 * (deltas[0] + deltas[1]))
    assert recipe.combine(deltas, tensor="layers.1.w", layers=3).equal(2 * (0.5 * deltas[0] + deltas[1]))
    thin = MergeRecipe(members=["a"], weights=[1.0], densities=[[1.0, 0.5]])
    assert thin.combine(deltas[:1], tensor="layers.1.w", layers=2).tolist() == [0.0, -2.0]


def test_adapters_of_one_start_are_told_from_adapters_of_two():
    start, other = ([torch.randn(4, 30, generator=generator(seed + i)) for i in range(3)] for seed in (0, 50))
    moved = [a + 0.1 * torch.randn(4, 30, generator=generator(99)) for a in start]
    assert shared_start(start, moved) > 0.9 and abs(shared_start(start, other)) < 0.3
    assert shared_start(start, [torch.randn(2, 30)] * 3) == 0.0


def test_ties_on_factors_needs_one_rank_and_is_not_ties_on_deltas():
    made = [Factors(torch.randn(6, r, generator=generator(r)), torch.randn(r, 5), 2.0) for r in (2, 3)]
    with pytest.raises(InputError, match=r"one rank, got ranks \[2, 3\]"):
        ties_factors(made, [1.0, 1.0], [1.0, 1.0])
    one = made[0]
    turned = Factors(-one.b, -one.a, one.scaling)  # the same delta
    same = ties_factors([one, one], [1.0, 1.0], [1.0, 1.0]).dense()
    torch.testing.assert_close(same, one.dense())
    assert not torch.allclose(ties_factors([one, turned], [1.0, 1.0], [1.0, 1.0]).dense(), same)


def test_a_sum_of_adapters_is_an_adapter_and_singular_values_cut_the_rest():
    made = [Factors(torch.randn(8, r, generator=generator(r)), torch.randn(r, 7), 0.5 * r) for r in (2, 3)]
    summed = 0.7 * (0.2 * made[0].dense() - 1.5 * made[1].dense())
    torch.testing.assert_close(concatenated(made, [0.2, -1.5], 0.7, False).dense(), summed, rtol=1e-5, atol=1e-5)
    whole, lost = truncated(summed, 5)
    torch.testing.assert_close(whole.dense(), summed, rtol=1e-4, atol=1e-4)
    assert lost < 1e-8
    cut, lost = truncated(summed, 2)
    assert math.isclose(lost, float((summed - cut.dense()).square().sum()), rel_tol=1e-3)


def test_recipes_survive_their_file_and_old_ones_still_load():
    inner = MergeRecipe(members=["a", "b"], weights=[1.0, 1.0], densities=[0.8, 0.8])
    recipe = MergeRecipe(
        method="della",
        members=["merge-0001", "c"],
        weights=[[0.2, 1.0], 1.0],
        densities=[0.5, 0.5],
        lambda_=[1.0, 0.5],
        normalize=False,
        options={"seed": 3, "epsilon": 0.1},
        merges={"merge-0001": inner},
    )
    assert MergeRecipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert list(recipe.to_json().items())[4:-1] == [
        ("lambda", [1.0, 0.5]), ("normalize", False), ("epsilon", 0.1), ("seed", 3),
    ]  # fmt: skip
    assert recipe.leaves() == ["a", "b", "c"]
    old = {"method": "ties", "members": ["a"], "weights": [1.0], "densities": [0.5], "lambda": 0.9}
    assert MergeRecipe.from_json(old).lambda_ == 0.9
    assert set(inner.to_json()) == {"method", "members", "weights", "densities", "lambda"}


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
        ({"weights": [[1.0, -3.0], 1.0]}, "ties merge must sum to more than 0"),
        ({"weights": [[], 1.0]}, "at least one anchor"),
        ({"weights": [float("inf"), 1.0]}, "must be finite"),
        ({"weights": [3.0, -1.0], "method": "slerp"}, "slerp merge must be at least 0"),
        ({"weights": [1.0] * 3, "densities": [1.0] * 3, "members": ["a", "b", "c"], "method": "slerp"}, "exactly 2"),
        (
            {"weights": [1.0], "densities": [1.0], "members": ["a"], "method": "model_stock"},
            "at least 2 members, got 1",
        ),
        ({"weights": [1.0, 2.0], "method": "model_stock"}, "uses no weights"),
        ({"densities": [0.9, 0.5], "method": "della"}, "density . epsilon below 1, got density 0.9"),
        ({"options": {"gamma": 1.0}, "method": "breadcrumbs"}, r"gamma must be in \[0, 1\), got 1.0"),
        ({"options": {"seed": 0.5}, "method": "dare_ties"}, "seed must be int, got 0.5"),
        ({"options": {"epsilon": 0.1}}, "unknown parameter of the merge method ties 'epsilon'"),
        ({"options": {"epsilom": 0.1}, "method": "della"}, "merge method della 'epsilom'. Did you mean 'epsilon'"),
    ],
)
def test_recipes_that_cannot_be_merged_are_refused(changes, message):
    good = {"members": ["a", "b"], "weights": [1.0, 1.0], "densities": [1.0, 1.0]}
    with pytest.raises(InputError, match=message):
        MergeRecipe(**{**good, **changes})


GOOD = {"method": "ties", "members": ["a", "b"], "weights": [1, 0.5], "densities": [1.0, [0.8, 1]], "lambda": 0.9}
UNREADABLE = {
    "a misspelled key": (GOOD | {"lamda": 0.5}, r"unknown key in .*x.yaml 'lamda'. Did you mean 'lambda'"),
    "a field's name": (GOOD | {"lambda_": 0.5}, "unknown key in .*x.yaml 'lambda_'. Did you mean 'lambda'"),
    "a key that is no text": (GOOD | {3: 1}, "unknown key in .*x.yaml 3"),
    "weights text": (GOOD | {"weights": "1 1"}, "x.yaml: weights must be a list, got '1 1'"),
    "weights words": (GOOD | {"weights": ["one", 1]}, r"x.yaml: weights\[0\] must be float, got 'one'"),
    "weights nested": (GOOD | {"weights": [[[1]], 1]}, r"x.yaml: weights\[0\] must be float"),
    "lambda text": (GOOD | {"lambda": "much"}, "x.yaml: lambda must be float, got 'much'"),
    "normalize text": (GOOD | {"normalize": "no"}, "x.yaml: normalize must be bool, got 'no'"),
    "seed a fraction": (GOOD | {"seed": 0.5}, "x.yaml: seed must be int, got 0.5"),
    "method a number": (GOOD | {"method": 3}, "x.yaml: method must be str, got 3"),
    "members numbers": (GOOD | {"members": [1, 2]}, r"x.yaml: members\[0\] must be str, got 1"),
    "members text": (GOOD | {"members": "ab"}, "x.yaml: members must be a list, got 'ab'"),
    "merges a list": (GOOD | {"merges": [1]}, r"x.yaml: merges must map names to recipes, got \[1\]"),
    "a merge a list": (
        GOOD | {"merges": {"a": [1]}},
        r"merges.a must be a mapping of keys to values, got \[1\]",
    ),
    "a merge misspelled": (GOOD | {"merges": {"a": GOOD | {"lamda": 1}}}, "unknown key in .*x.yaml: merges.a 'lamda'"),
    "base a number": (GOOD | {"base": 3}, "x.yaml: base must be str, got 3"),
    "folder a number": (GOOD | {"folder": 3}, "x.yaml: folder must be str, got 3"),
    "dtype unknown": (GOOD | {"dtype": "float8"}, "unknown value for dtype in .*x.yaml: 'float8'"),
    "a list": ([GOOD], "x.yaml holds no merge recipe"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_recipe_file_is_read_strictly(tmp_path, case):
    content, message = UNREADABLE[case]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        read_merge_file(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(GOOD))
    assert read_merge_file(tmp_path / "x.yaml").recipe.weights == [1.0, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: &a [*a]\nweights: [1]\ndensities: [1]\n", r"members\[0\] must be str"),
        ("members: [a]\nweights: &a [*a]\ndensities: [1]\n", r"weights\[0\] must be float"),
        ("&a\nmembers: [a]\nweights: [1]\ndensities: [1]\nmerges: {a: *a}\n", "merges.a.*contains itself"),
        (
            "members: [a]\nweights: [1]\ndensities: [1]\nmerges:\n  a: &a\n    members: [b]\n    weights: [1]\n"
            "    densities: [1]\n    merges: {b: *a}\n",
            "merges.a: merges.b contains itself",
        ),
        ("[" * 5000, "is neither JSON nor YAML"),
    ],
    ids=["members", "weights", "the whole", "a merge", "deep"],
)
def test_a_recipe_file_that_holds_itself_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_merge_file(tmp_path / "x.yaml")
