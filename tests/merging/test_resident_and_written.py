"""Merges of real files: resident, written as a model, written as an adapter; members that do not fit are refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from made_merges import NESTED, RECIPES, deltas_of, weights_of, written_by

from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.resident import Merger


@pytest.mark.parametrize("recipe", [*RECIPES, NESTED], ids=lambda recipe: recipe.method + "+" * len(recipe.merges))
def test_the_written_merge_is_the_resident_merge_and_the_base_comes_back(bench, members, base_path, tmp_path, recipe):
    from transformers import AutoModelForCausalLM

    from ray_unlearn.merging.writer import write_merge

    base = weights_of(bench.model)
    merger = Merger(bench.model, members, base_path)
    assert not merger._copies  # the files hold the base
    merger.merge(recipe)
    resident = weights_of(bench.model)
    merger.restore()
    assert all(tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items())
    without_files = Merger(bench.model, members)
    without_files.merge(recipe)
    assert all(tensor.equal(resident[name]) for name, tensor in weights_of(bench.model).items())
    without_files.restore()

    for out in ("out", "again"):
        write_merge(recipe, base_path, members, tmp_path / out)
    written = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert set(written) == set(resident)
    assert all(written[name].equal(resident[name]) for name in resident)
    first, second = (sorted((tmp_path / out).iterdir()) for out in ("out", "again"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
    assert max((resident[name] - base[name]).abs().max().item() for name in base) > 0.001


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic", "breadcrumbs", "karcher"])
def test_the_resident_merge_is_the_recipe_applied_to_each_tensor(bench, members, method):
    recipe = written_by(method)
    base = weights_of(bench.model)
    merger = Merger(bench.model, members)
    merger.merge(recipe)
    resident = weights_of(bench.model)
    merger.restore()
    for name, tensor in base.items():
        found = deltas_of(recipe, bench, members, name)
        if not any(delta.any() for delta in found):
            assert resident[name].equal(tensor)
            continue
        expected = tensor + recipe.combine(found, tensor, name, layers=2)
        agree = torch.isclose(resident[name], expected, rtol=0, atol=1e-5)
        assert agree.float().mean() > 0.99  # rounding moves the last kept entries of a near tie


def test_a_merge_of_a_merge_is_the_merge_of_its_written_weights(bench, members, base_path, tmp_path):
    from ray_unlearn.merging.writer import write_merge

    inner = NESTED.merges["merge-0000"]
    write_merge(inner, base_path, members, tmp_path / "inner")
    options = {"weights": [1.0, 1.0], "densities": [0.5, 0.9], "method": "ties"}
    merger = Merger(bench.model, {**members, "written": tmp_path / "inner"})
    merger.merge(MergeRecipe(members=["merge-0000", "lora-b"], merges={"merge-0000": inner}, **options))
    nested = weights_of(bench.model)
    merger.merge(MergeRecipe(members=["written", "lora-b"], **options))
    flat = weights_of(bench.model)
    merger.restore()
    assert all(nested[name].equal(flat[name]) for name in nested)


def test_a_random_mask_follows_the_members_content_not_its_name_or_place(bench, members):
    merger = Merger(bench.model, {**members, "renamed": members["lora-a"]})
    results = []
    for names in (["lora-a", "full"], ["full", "lora-a"], ["renamed", "full"]):
        merger.merge(MergeRecipe(method="dare_linear", members=names, weights=[1.0] * 2, densities=[0.5] * 2))
        results.append(weights_of(bench.model))
    merger.restore()
    for other in results[1:]:
        assert all(other[name].equal(results[0][name]) for name in other)


def test_magnitudes_are_counted_once_for_each_member_and_tensor_and_cuts_once_for_each_density(
    bench, members, monkeypatch
):
    from ray_unlearn.merging import combine

    calls = Counter()
    for name in ("count_magnitudes", "find_cut"):
        original = getattr(combine, name)
        monkeypatch.setattr(combine, name, lambda *a, n=name, f=original: calls.update([n]) or f(*a))
    merger = Merger(bench.model, {name: members[name] for name in ("lora-a", "full")})
    for weights, densities in (([1.0, 1.0], [0.5, 0.8]), ([1.0, 2.0], [0.5, 0.8]), ([3.0, 1.0], [0.8, 0.5])):
        recipe = MergeRecipe(members=["lora-a", "full"], weights=weights, densities=densities)
        merger.merge(recipe)
    seen = 2 * len(merger.combiner.touched(recipe))
    assert calls == {"count_magnitudes": seen, "find_cut": 2 * seen}
    merger.restore()


def test_the_base_comes_back_even_when_scoring_the_merged_model_fails(bench, members):
    base = weights_of(bench.model)
    merger = Merger(bench.model, members)
    with pytest.raises(RuntimeError, match="no scores"), merger.merged(RECIPES[0]) as model:
        assert any(not tensor.equal(base[name]) for name, tensor in weights_of(model).items())
        raise RuntimeError("no scores")
    assert all(tensor.equal(base[name]) for name, tensor in weights_of(bench.model).items())


def test_merging_one_member_whole_gives_that_member_and_nothing_lingers(bench, members):
    merger = Merger(bench.model, members)
    merger.merge(RECIPES[0])  # an earlier merge must not show in the next
    recipe = MergeRecipe(members=["lora-b"], weights=[2.0], densities=[1.0])
    merger.merge(recipe)
    merged = weights_of(bench.model)
    merger.restore()
    touched = merger.combiner.touched(recipe)
    assert {name.split(".")[-2] for name in touched} == {"q_proj", "down_proj"}
    for name, tensor in weights_of(bench.model).items():
        (delta,) = deltas_of(recipe, bench, members, name)
        torch.testing.assert_close(merged[name], tensor + delta, rtol=0, atol=1e-6)


# -- members ---------------------------------------------------------------------------------------


# -- adapters --------------------------------------------------------------------------------------
