"""The prefix attack on a real, tiny model: as a slow loop finds it, and it tells what is known from what is not."""

from __future__ import annotations

import copy

import pytest
import torch
from small import examples

from ray_unlearn.attacks import ATTACKS
from ray_unlearn.data.tokens import collate, encode
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.generation import decode
from ray_unlearn.metrics.generation import exact_match, rouge_l_recall
from ray_unlearn.records import Example

ATTACK = ATTACKS["prefix"]
STEPS = 30


@pytest.fixture(scope="module")
def rows(tiny):
    """Forget rows, and control rows that the model below never sees."""
    return examples(tiny.data.forget)[:7], examples(tiny.data.retain)[:6]


@pytest.fixture(scope="module")
def knowing(tiny, rows):
    """A copy of the tiny model that has learnt the forget rows, but not to the last token."""
    model = copy.deepcopy(tiny.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate([encode(tiny.tokenizer, row.input, row.output) for row in rows[0]], tiny.tokenizer.pad_token_id)
    for _ in range(STEPS):
        logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits[batch.document], batch.ids[:, 1:][batch.document]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def slow(model, tokenizer, row, share):
    """(ROUGE-L recall, exact match) of one row: a full forward pass for each token."""
    tokens = encode(tokenizer, row.input, row.output)
    answer = list(tokens.ids[tokens.prompt :])
    given = int(len(answer) * share / 100)
    ids, said = list(tokens.ids[: tokens.prompt]) + answer[:given], []
    while len(said) < len(answer) - given and tokenizer.eos_token_id not in said:
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    texts = decode(tokenizer, answer[given:]), decode(tokenizer, said)
    return rouge_l_recall(*texts), exact_match(*texts)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_findings_are_those_of_a_slow_loop(tiny, knowing, rows, batch_size):
    found = ATTACK.run(knowing, tiny.tokenizer, *rows, batch_size=batch_size)
    for findings, split in zip((found.forget, found.control), rows, strict=True):
        assert findings.rows == tuple(row.id for row in split)
        assert set(findings.values) == set(ATTACK.signals)
        for share in (25, 50):
            expected = [slow(knowing, tiny.tokenizer, row, share) for row in split]
            assert findings.values[f"rouge_l_recall_{share}"] == [recall for recall, _ in expected]
            assert findings.values[f"exact_match_{share}"] == [match for _, match in expected]
    assert found.settings == {"shares": [25, 50]}


def test_what_was_learnt_is_told_from_what_was_not(tiny, knowing, rows):
    found = ATTACK.run(knowing, tiny.tokenizer, *rows)
    known, unknown = found.forget.means(), found.control.means()
    assert known["rouge_l_recall_25"] > unknown["rouge_l_recall_25"] + 0.3
    assert len(set(found.forget.values["rouge_l_recall_50"])) > 1  # neither all known nor nothing
    before = ATTACK.run(tiny.model, tiny.tokenizer, *rows).forget.means()
    assert before["rouge_l_recall_50"] < 0.2 < known["rouge_l_recall_50"]


def test_an_answer_of_one_token_is_asked_for_whole(tiny, rows):
    (first, *_), _ = rows
    row = Example(id="x", input=first.input, output="a", task="t", kind="qa")
    assert len(encode(tiny.tokenizer, row.input, row.output).ids) == len(tiny.tokenizer(row.input)["input_ids"]) + 1
    found = ATTACK.run(tiny.model, tiny.tokenizer, [row], [row]).forget
    assert [found.values[f"exact_match_{share}"][0] for share in (25, 50)] == [
        slow(tiny.model, tiny.tokenizer, row, 0)[1]
    ] * 2


def test_the_model_is_left_as_it_was_and_rows_are_needed(tiny, rows):
    model = copy.deepcopy(tiny.model).train()
    ATTACK.run(model, tiny.tokenizer, rows[0][:1], rows[1][:1])
    assert model.training
    with pytest.raises(InputError, match="got 7 forget and 0 control rows"):
        ATTACK.run(model, tiny.tokenizer, rows[0], [])


def test_every_attack_says_what_it_finds_and_where_it_is_from():
    for name, attack in ATTACKS.items():
        assert attack.signals and attack.formula and attack.source, name
