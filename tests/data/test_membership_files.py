"""Files of the membership test: unseen documents are unseen, and no side is empty."""

from __future__ import annotations

import json

import pytest

from ray_unlearn.data.rows import load_membership
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.predictions import read_losses


def test_documents_on_both_sides_of_the_membership_test_are_refused(tmp_path):
    for name, texts in (("m", ["a b", "c d"]), ("n", ["e f", "c d"])):
        lines = [json.dumps({"id": f"{name}{i}", "document": text}) for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    m, n = tmp_path / "m.jsonl", tmp_path / "n.jsonl"
    with pytest.raises(InputError, match="1 documents of .*n.jsonl are in .*m.jsonl too, the first is document 2"):
        load_membership(m, n)
    with pytest.raises(InputError, match="2 documents"):
        load_membership(m, m)


def test_an_empty_side_of_losses_is_refused(tmp_path):
    (tmp_path / "losses.json").write_text('{"member": [1.0], "nonmember": []}')
    with pytest.raises(InputError, match="'nonmember' is empty"):
        read_losses(tmp_path / "losses.json")
