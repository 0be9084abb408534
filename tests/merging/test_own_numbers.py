"""A merge method with a number of its own: its row says it, and recipe, file, command line, list and search know it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from small import Walk

from ray_unlearn import cli
from ray_unlearn.merging import MERGES, MergeMethod, MergeRecipe, merge_options
from ray_unlearn.schema import Option, Range
from ray_unlearn.search.merge_space import MergeSpace
from ray_unlearn.tables import additions, take_back

GOOD = {"members": ["a", "b"], "weights": [1.0, 1.0], "densities": [0.5, 0.5]}


def powered(base, deltas, settings):
    raised = [delta.sign() * delta.abs() ** settings.options["power"] for delta in deltas]
    return sum(weight * delta for weight, delta in zip(settings.weights, raised, strict=True))


@pytest.fixture
def power():
    """A method `power`, with a number of its own that is searched and one that is not."""
    mark = additions()
    own = {
        "power": Option(hint=float, default=1.0, above=0, meaning="exponent", search=Range(0.5, 2.0)),
        "rounds": Option(hint=int, default=1, at_least=1, meaning="times"),
    }
    MERGES.add("power", MergeMethod(consensus=powered, options=own, formula="f", source="s"))
    yield
    take_back(mark)


def test_the_recipe_reads_checks_applies_and_writes_it(power):
    recipe = MergeRecipe.from_json({**GOOD, "method": "power", "power": "2"})
    assert recipe.options == {"power": 2.0, "rounds": 1}
    assert recipe.to_json() == {**GOOD, "method": "power", "lambda": 1.0, "power": 2.0}
    assert recipe.combine([torch.tensor([3.0]), torch.tensor([-2.0])]).tolist() == [5.0]
    with pytest.raises(ValueError, match="recipe: power must be above 0, got 0.0"):
        MergeRecipe.from_json({**GOOD, "method": "power", "power": 0})
    with pytest.raises(ValueError, match="unknown key in recipe 'powr'. Did you mean 'power'"):
        MergeRecipe.from_json({**GOOD, "method": "power", "powr": 2})


def test_the_search_asks_for_it_alone_where_it_has_a_range(power):
    space = MergeSpace(snapshots=["a", "b"], aucs=[0.4, 0.6], methods=["power", "della"], max_members=2)
    asked = {}
    for method in space.methods:
        walk = Walk(method=method)
        recipe = space.suggest(walk)
        asked[method] = walk.asked[4:]
    assert asked["power"] == ["lambda: float 0.6 to 1.4", "power: float 0.5 to 2.0"]
    assert asked["della"] == ["della_density: float 0.2 to 0.8 step 0.05", "lambda: float 0.6 to 1.4"]
    assert recipe.options == {"epsilon": 0.15, "seed": 0}


def test_the_command_line_has_a_flag_for_it_and_the_list_names_it(power, capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    assert "--power X" in (shown := capsys.readouterr().out) and "exponent (default 1.0; power)" in shown
    assert cli.main(["merge-methods", "--json"]) == 0
    rows = {row["name"]: row["parameters"] for row in json.loads(capsys.readouterr().out)}
    assert rows["power"] == {"weight": 1.0, "lambda": 1.0, "power": 1.0, "rounds": 1}


def test_a_flag_and_an_option_reach_the_recipe_and_what_is_not_read_is_left_out(power, monkeypatch, capsys):
    from ray_unlearn.api import merging

    made = []
    monkeypatch.setattr(merging, "merge_by_recipe", lambda recipe, *rest, **more: made.append(recipe))
    argv = ["merge", "--base", "m", "--adapters", "a", "b", "--out", "o", "--method"]
    assert cli.main([*argv, "power", "--power", "0.5", "--option", "rounds=3", "--seed", "4"]) == 0
    assert made[0].options == {"power": 0.5, "rounds": 3}
    assert "power reads no seed: it is left out" in "".join(capsys.readouterr())
    assert cli.main([*argv, "della", "--density", "0.5", "--epsilon", "0.2", "--seed", "4"]) == 0
    assert made[1].options == {"epsilon": 0.2, "seed": 4}
    for wrong, message in [
        (["--option", "rounds"], "--option takes NAME=VALUE, got 'rounds'"),
        (["--option", "round=3"], "unknown parameter of a merge 'round'. Did you mean 'rounds'"),
        (["--power", "0"], "power must be above 0, got 0.0"),
    ]:
        assert cli.main([*argv, "power", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert len(made) == 2


def test_only_the_merge_command_loads_the_table():
    import subprocess

    code = "import sys; from ray_unlearn import cli; parser = cli.build_parser(); print('torch' in sys.modules)"
    code += "\nparser.parse_args(['merge', '--out', 'o', '--epsilon', '0.1']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_files_with_numbers_that_the_method_does_not_read_still_load():
    old = {**GOOD, "method": "ties", "lambda": 0.9, "seed": 3, "gamma": 0.2}
    assert MergeRecipe.from_json(old).to_json() == {**GOOD, "method": "ties", "lambda": 0.9}
    assert MergeRecipe.from_json(old | {"method": "breadcrumbs"}).options == {"gamma": 0.2}
    with pytest.raises(ValueError, match="recipe: seed must be int, got 0.5"):
        MergeRecipe.from_json(old | {"seed": 0.5})


def test_every_number_of_a_methods_own_has_one_meaning_for_all_methods():
    for name, option in merge_options().items():
        assert all(row.options.get(name, option) == option for row in MERGES.values())
        assert option.meaning and isinstance(option.hint, type)
