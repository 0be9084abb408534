"""Plain spaces: what the shipped ones ask, in which order, from which distributions; what a row adds by itself."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path

import pytest
from small import Walk

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.losses import LOSSES, METHODS, OPTIONS, Loss, Method, Option
from ray_unlearn.schema import option, to_dict
from ray_unlearn.search import plain as plain_module
from ray_unlearn.search.plain import Range, plain, searched
from ray_unlearn.search.spaces import known_spaces, load_space, trial_config
from ray_unlearn.tables import additions, take_back

PINNED = json.loads((Path(__file__).parent / "spaces.json").read_text())
"""Of each shipped space: fields that it gives, and what it asks, in order. A line that changes here changes what a
seeded search draws."""


def expected(lines, **chosen):
    """The lines of PINNED that hold under these choices, without their conditions."""
    found = []
    for line in lines:
        asked, _, condition = line.partition(", where ")
        if not condition or chosen[condition.split()[0]] == condition.split()[1]:
            found.append(asked)
    return found


def test_every_pinned_space_is_shipped():
    """A new one is pinned when it is released: until then nobody's search hangs on it."""
    assert set(PINNED) <= set(known_spaces())


@pytest.mark.parametrize("name", PINNED)
def test_a_shipped_space_asks_what_it_always_asked_in_the_same_order(name):
    space, _ = load_space([name], {})
    pinned = PINNED[name]
    for tuning, schedule in product(("full", "lora"), ("paired", "two_phase", "sugd")):
        walk = Walk(tuning=tuning, schedule=schedule)
        config = to_dict(trial_config(space(walk)))
        tuning = config["tuning"]  # some give it
        assert walk.asked == expected(pinned["asked"], tuning=tuning, schedule=schedule)
        asked = {line.partition(":")[0] for line in walk.asked} | {"method", "options"}
        default = to_dict(TrialConfig(method=name))
        given = {key: value for key, value in config.items() if key not in asked and value != default[key]}
        assert given == pinned["given"]


def test_an_option_with_a_search_range_is_asked_without_a_word_elsewhere():
    mark = additions()
    try:
        OPTIONS.add("softness", Option(hint=float, default=1.0, above=0, meaning="", search=Range(0.5, 2.0)))
        OPTIONS.add("quiet", Option(hint=float, default=1.0, above=0, meaning=""))
        mine = Loss(compute=abs, tensors=("logps",), options={"softness": "softness", "quiet": "quiet"})
        LOSSES.add("mine", mine)
        METHODS.add("mine", Method(forget="mine", retain=("cross_entropy",), formula="f", source="s"))
        asked = searched("mine")
        own = ["forget_on", "softness", "forget_weight", "retain_weight"]
        assert asked[2 : 2 + len(own)] == own and "quiet" not in asked
    finally:
        take_back(mark)


def test_a_trial_field_with_a_search_range_is_asked_last_and_only_where_it_matters(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(TrialConfig):
        sharpness: float = option(0.1, search=Range(0.1, 0.2), searched_if=("tuning", "full"))

    monkeypatch.setattr(plain_module, "TrialConfig", Longer)
    assert searched("npo")[-1] == "sharpness"
    assert "sharpness" in plain(Walk(tuning="full"), "npo") and "sharpness" not in plain(Walk(tuning="lora"), "npo")


def test_what_is_special_to_a_space_is_a_range_choices_or_a_value():
    walk = Walk()
    made = plain(
        walk, "npo_ce", first=("npo_beta",), epochs=Range(3, 4), npo_ratio=("mean",), tuning="full", warmup=0.1
    )
    names = [line.partition(":")[0] for line in walk.asked]
    assert names[:3] == ["schedule", "npo_beta", "forget_on"] and "tuning" not in names and "lora_rank" not in names
    assert "npo_ratio: one of ['mean']" in walk.asked and "epochs: int 3 to 4" in walk.asked
    assert (made["tuning"], made["warmup"], made["method"]) == ("full", 0.1, "npo_ce")
    trial_config(made)


def test_a_space_needs_no_import(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def space(trial):\n    return {'method': 'npo', 'epochs': trial.suggest_int('epochs', 1, 3)}\n")
    space, _ = load_space([str(path)], {})
    walk = Walk()
    assert trial_config(space(walk)).epochs == 1 and walk.asked == ["epochs: int 1 to 3"]
