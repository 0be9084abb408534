"""Options: the rule in words, what breaks it, fields that declare theirs, and what a search draws from."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ray_unlearn.errors import InputError
from ray_unlearn.schema import Option, Range, check_fields, checked, declared, from_dict, option, suggest

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = option(0.5, above=0, at_most=1)
    names: list[str] = option(["a"], choices=("a", "b"), if_empty="name one")
    limits: dict[str, int] | int | None = option(None, at_least=1)
    plain: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = field(default_factory=Part)
    count: int | None = option(2, at_least=1)

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    ("bounds", "rule"),
    [
        ({"above": 0}, "above 0"),
        ({"at_least": 1}, "at least 1"),
        ({"below": 2.5}, "below 2.5"),
        ({"at_most": 2}, "at most 2"),
        ({"above": 0, "at_most": 1}, "in (0, 1]"),
        ({"at_least": 0, "below": 1}, "in [0, 1)"),
        ({"above": 0, "below": 1}, "in (0, 1)"),
        ({"at_least": 0, "at_most": 3}, "from 0 to 3"),
    ],
)
def test_the_rule_is_said_in_words_and_holds_at_its_ends(bounds, rule):
    row = Option(hint=float, default=None, **bounds)
    assert row.rule == rule
    good = [bounds[name] for name in ("at_least", "at_most") if name in bounds] or [0.5]
    bad = [bounds[name] for name in ("above", "below") if name in bounds]
    bad += [bounds["at_least"] - 1] if "at_least" in bounds else []
    bad += [bounds["at_most"] + 1] if "at_most" in bounds else []
    for value in good:
        row.check("x", value)
    for value in bad:
        with pytest.raises(InputError) as caught:
            row.check("x", value)
        assert str(caught.value) == f"x must be {rule}, got {value}."
    for value in (NAN, INF, -INF):
        with pytest.raises(InputError) as caught:
            row.check("x", value)
        assert str(caught.value) == f"x must be finite and {rule}, got {value}."


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (Option(hint=int, default=1, at_least=1), 1.5, "x must be int, got 1.5"),
        (Option(hint=int | None, default=1, at_least=1), 0, "x must be at least 1 or null, got 0"),
        (Option(hint=str, default="sum", choices=("sum", "mean")), "maen", "for x: 'maen'. Did you mean 'mean'"),
        (Option(hint=float, default=0.5, never={1: "there it is KL"}), 1, "x must not be 1.0, there it is KL"),
        (Option(hint=list[int], default=[], at_least=0), [2, -1], r"x\[1\] must be at least 0, got -1"),
        (Option(hint=dict[str, int], default={}, at_least=1), {"a": 0}, "x.a must be at least 1, got 0"),
        (Option(hint=dict[str, int], default={}, at_least=1), {"a": "z"}, "x.a must be int, got 'z'"),
        (Option(hint=str, default="", if_empty="say all"), "", "x is empty: say all"),
    ],
)
def test_a_value_is_refused_by_name_rule_and_value(row, value, message):
    with pytest.raises(InputError, match=message):
        checked(row, value, "x")


def test_flags_null_and_good_values_pass():
    assert checked(Option(hint=float | None, default=1.0, above=0), None, "x") is None
    assert checked(Option(hint=bool, default=False, at_least=1), False, "x") is False
    assert checked(Option(hint=float, default=0.5, above=0), "1e-4", "x") == 1e-4


def test_fields_declare_their_options_and_each_instance_has_its_own_default():
    assert list(declared(Part)) == ["rate", "names", "limits", "plain"] and declared(Part)["plain"].rule == ""
    assert declared(Part)["limits"].hint == dict[str, int] | int | None
    assert Part().names == ["a"] and Part().names is not Part().names
    assert (Part().rate, Part().limits, Part().plain) == (0.5, None, 3.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": {"rate": 0}}, r"whole.part.rate must be in \(0, 1\], got 0.0"),
        ({"part": {"names": []}}, "whole.part.names is empty: name one"),
        ({"part": {"names": ["a", "c"]}}, r"unknown value for whole.part.names\[1\]: 'c'"),
        ({"part": {"limits": {"Task1": 0}}}, "whole.part.limits.Task1 must be at least 1"),
        ({"count": 0}, "whole.count must be at least 1 or null, got 0"),
    ],
)
def test_a_mapping_is_checked_with_the_whole_path(data, message):
    with pytest.raises(InputError, match=message):
        from_dict(Whole, data, "whole")


def test_what_is_built_directly_is_checked_too_dataclasses_within_included():
    with pytest.raises(InputError, match="^count must be at least 1 or null, got 0"):
        Whole(count=0)
    with pytest.raises(InputError, match=r"^part.rate must be in \(0, 1\], got 2"):
        Whole(part=Part(rate=2.0))
    assert Whole(count=None, part=Part(plain=NAN)).count is None  # a plain field has no rule


def test_a_search_asks_a_real_trial_for_what_the_range_says():
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    trial = optuna.create_study().ask()
    asked = {
        "whole": (Range(1, 3), IntDistribution(1, 3)),
        "coarse": (Range(2, 10, step=4), IntDistribution(2, 10, step=4)),
        "steps": (Range(1, 64, log=True), IntDistribution(1, 64, log=True)),
        "real": (Range(0.5, 2.0), FloatDistribution(0.5, 2.0)),
        "rate": (Range(1e-6, 1e-2, log=True), FloatDistribution(1e-6, 1e-2, log=True)),
        "grid": (Range(0.2, 1.0, step=0.2), FloatDistribution(0.2, 1.0, step=0.2)),
        "choice": (("full", "lora"), CategoricalDistribution(("full", "lora"))),
    }
    for name, (search, distribution) in asked.items():
        value = suggest(search, trial, name)
        assert trial.distributions[name] == distribution and distribution._contains(
            distribution.to_internal_repr(value)
        )
