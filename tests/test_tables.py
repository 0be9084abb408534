"""A table refuses what could not be looked up or could not work, and gives back what was added."""

from __future__ import annotations

import pickle

import pytest

from ray_unlearn.errors import InputError
from ray_unlearn.losses import LOSSES, METHODS, Loss, Method
from ray_unlearn.metrics import METRICS
from ray_unlearn.tables import Table, additions, take_back


@pytest.fixture
def mark():
    """Where the tables stood; what a test adds is taken back."""
    before = additions()
    yield before
    take_back(before)


def sizes(n: int) -> Table[int]:
    return Table("size", int, {f"s{i}": i for i in range(n)})


def test_a_name_is_found_or_refused_with_the_nearest():
    assert sizes(3).find("s2") == 2
    with pytest.raises(InputError, match="unknown size 's22'. Did you mean 's2'"):
        sizes(3).find("s22")


def test_a_taken_name_and_what_is_no_row_are_refused(mark):
    table = sizes(1)
    with pytest.raises(InputError, match="there is a size 's0' already"):
        table.add("s0", 7)
    with pytest.raises(InputError, match="the size 's1' must be a int, got 'seven'"):
        table.add("s1", "seven")
    assert dict(table) == {"s0": 0}


def test_additions_are_taken_back_to_a_mark_and_no_further(mark):
    table = sizes(1)
    table.add("first", 1)
    middle = additions()
    table.add("second", 2)
    take_back(middle)
    assert list(table) == ["s0", "first"]
    table.add("second", 3)
    assert table["second"] == 3


def test_a_table_can_travel():
    assert pickle.loads(pickle.dumps(METRICS)).keys() == METRICS.keys()


def test_a_loss_or_method_that_names_what_is_not_there_is_refused(mark):
    words = {"formula": "f", "source": "s"}
    with pytest.raises(InputError, match="unknown loss 'npoo'. Did you mean 'npo'"):
        METHODS.add("mine", Method(forget="npoo", **words))
    with pytest.raises(InputError, match="unknown loss 'cross_entropi'"):
        METHODS.add("mine", Method(forget="npo", retain=("cross_entropi",), **words))
    with pytest.raises(InputError, match="unknown option 'npo_bta'. Did you mean 'npo_beta'"):
        LOSSES.add("mine", Loss(compute=abs, tensors=("logps",), options={"beta": "npo_bta"}))
    with pytest.raises(InputError, match="unknown tensor of a loss 'log_probs'"):
        Loss(compute=abs, tensors=("log_probs",))
    assert "mine" not in METHODS and "mine" not in LOSSES
