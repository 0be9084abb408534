"""Scoring a real, tiny model: answers, losses and choices are those of one row at a time, whoever computes which."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from slow_scores import plain_cloze, questions

from ray_unlearn.data.tokens import collate, encode
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import generation, work_units
from ray_unlearn.evaluation.generation import certain, clean_up, continuations, decode
from ray_unlearn.evaluation.scoring import evaluate_model, score_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import Shard, document_losses, split_work
from ray_unlearn.models import likelihood
from ray_unlearn.models.decoding import greedy
from ray_unlearn.models.likelihood import row_losses
from ray_unlearn.records import Example

PROMPTS = [
    "In Kanobe, Mira met Tosu, who carried a silver lantern to the river.",
    "a",
    "What did Tosu carry when Mira met them?",
    "Née 42-17",
    "Mira",
]


def by_generate(tiny, prompt, length, model=None):
    """transformers' own greedy continuation of one prompt, as text."""
    model = tiny.model if model is None else model
    ids = torch.tensor([tiny.tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=1
    )
    return clean_up(tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def example(prompt, output="x", kind="sc", name="a1sc1"):
    return Example(id=name, input=prompt, output=output, task="Task1", kind=kind)


# -- generations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64])
def test_generated_texts_come_in_the_order_of_the_rows_whatever_is_expected(tiny, size):
    expected = [by_generate(tiny, prompt, 9) for prompt in PROMPTS]
    for outputs in (expected, [text[:7] for text in expected], ["x"] * 5, ["  " + text.upper() for text in expected]):
        rows = [example(prompt, output or "x") for prompt, output in zip(PROMPTS, outputs, strict=True)]
        assert continuations(tiny.model, tiny.tokenizer, rows, 9, size) == expected


def test_a_question_is_certainly_wrong_once_its_text_is_no_beginning_of_the_answer(tiny):
    row = example("q", " A Silver\tlantern ", "qa")

    def answers(text):
        return certain(tiny.tokenizer, row, tiny.tokenizer(text)["input_ids"])

    assert not any(answers(text) for text in ("", " ", " a", "A sil", "\n a  SILVER lantern", "a silver lantern "))
    assert all(answers(text) for text in ("b", " a gold", "a silver lantern x", "a silver lantern."))
    accents = example("q", "né ΟΔΟΣ", "qa")
    ids = tiny.tokenizer("Né οδος")["input_ids"]
    assert not any(certain(tiny.tokenizer, accents, ids[:k]) for k in range(len(ids) + 1))  # halves of letters too


PIECES = ["a", "b", "A", " ", " ", "\n", ".", " .", "'", " '", "n't", " n't", "s", "é", "Σ", "ς", "7", ",", " 've", "�"]


def test_what_is_certain_is_certain_for_every_continuation(tiny):
    rng = random.Random(11)
    tokenize = tiny.tokenizer
    seen = {"qa": 0, "sc": 0}
    for _ in range(1500):
        kind = rng.choice(["qa", "sc"])
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 40)))
        start = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 3)))
        output = start + text[: rng.randint(0, len(text))] + rng.choice(["", "b", " "])
        row = example("q", output if output.strip() else "a", kind)
        ids = tokenize(start + text)["input_ids"]
        final = decode(tokenize, ids)
        metric = (
            generation.rouge_l_recall if kind == "sc" else lambda a, b: float(a.strip().lower() == b.strip().lower())
        )
        for k in range(len(ids)):
            if certain(tokenize, row, ids[:k]):
                seen[kind] += 1
                assert metric(row.output, final) == metric(row.output, decode(tokenize, ids[:k])) == (kind == "sc")
    assert min(seen.values()) > 20


def test_scores_alone_are_those_of_the_whole_texts_for_less(tiny, monkeypatch):
    data, settings = eval_set(tiny), EvalSettings(max_new_tokens=48, batch_size=4)
    asked = [*data.forget, *data.retain]
    # some rows whose answers the model gives, so that not all scores are 0
    texts = [by_generate(tiny, row.input, 48) for row in asked]
    known = [
        Example(id=r.id, input=r.input, output=(t if i % 2 else t[:5]) or "x", task=r.task, kind=r.kind)
        for i, (r, t) in enumerate(zip(asked, texts, strict=True))
    ]
    data = EvalSet(forget=known[:4], retain=known[4:])
    made = []
    monkeypatch.setattr(generation, "greedy", lambda *a, **k: made.append(greedy(*a, **k)) or made[-1])
    scores, found = evaluate_model(tiny.model, tiny.tokenizer, data, settings)
    alone = score_model(tiny.model, tiny.tokenizer, data, settings)
    assert found == texts and alone == scores and 0 < sum(scores.raw.values()) < len(scores.raw)
    whole, short = (sum(map(len, ids)) for ids in made)
    assert short < whole


def test_clean_up_removes_the_spaces_of_tokenisation():
    assert clean_up("Well , I do n't know . Is it Mira 's ? We 've , you 're , I 'm !") == (
        "Well, I don't know. Is it Mira's? We've, you're, I'm!"
    )
    assert clean_up(" plain  text\n") == " plain  text\n"


# -- losses ----------------------------------------------------------------------------------------


def plain_loss(tiny, ids, prompt=1):
    labels = torch.tensor([ids])
    labels[0, :prompt] = -100
    return tiny.model(input_ids=torch.tensor([ids]), labels=labels).loss.item()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_document_losses_are_those_of_each_document_alone(tiny, size):
    documents = [row["document"] for row in tiny.data.nonmembers] + PROMPTS[:1] + PROMPTS[2:4]
    losses = document_losses(tiny.model, tiny.tokenizer, documents, EvalSettings(batch_size=size))
    assert losses == pytest.approx(
        [plain_loss(tiny, tiny.tokenizer(text)["input_ids"]) for text in documents], abs=1e-5
    )


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_losses_are_the_same_when_a_row_is_read_in_pieces(tiny, monkeypatch, positions):
    rows = [encode(tiny.tokenizer, row["input"], row["output"]) for row in tiny.data.forget[:6]]
    monkeypatch.setattr(likelihood, "MAX_LOGITS", positions * len(tiny.tokenizer))
    monkeypatch.setattr(likelihood, "SLICE", 5)
    model, formed = copy.deepcopy(tiny.model), []
    model.lm_head.register_forward_hook(lambda module, given, out: formed.append(out.numel()))
    for on in ("answer", "document"):
        losses = row_losses(model, 1, rows, 4, on)
        expected = [plain_loss(tiny, row.ids, row.prompt if on == "answer" else 1) for row in rows]
        assert losses == pytest.approx(expected, abs=1e-5)
    assert max(formed) <= positions * len(tiny.tokenizer)


def test_documents_without_a_loss_beyond_the_context_or_of_a_broken_model_are_refused(tiny):
    settings = EvalSettings()
    with pytest.raises(InputError, match="document 2 has fewer"):
        document_losses(tiny.model, tiny.tokenizer, [PROMPTS[0], "a"], settings)
    with pytest.raises(InputError, match=r"MIA document 1 has \d+ tokens, and the model's context is 512"):
        document_losses(tiny.model, tiny.tokenizer, ["42 " * 600], settings)
    model = copy.deepcopy(tiny.model)
    next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="loss of MIA document 1 is nan"):
        document_losses(model, tiny.tokenizer, PROMPTS[:1], settings)


# -- MMLU ------------------------------------------------------------------------------------------


# -- shards ----------------------------------------------------------------------------------------


class _Handed(Exception):
    """What a rank hands over."""


def in_shards(world, work):
    """Results of `work(shard)` on each of `world` pretended ranks; the gather joins what all of them hand over."""

    def hand_over(items):
        raise _Handed(list(items))

    handed = []
    for rank in range(world):
        with pytest.raises(_Handed) as gathered:
            work(Shard(rank, world, hand_over))
        handed += gathered.value.args[0]
    return [work(Shard(rank, world, lambda items: handed)) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 10])
def test_joined_shares_are_the_whole_in_order_whatever_the_ranks(total, world):
    items = list(range(total))
    shares = [Shard(rank, world).take(items) for rank in range(world)]
    together = [item for share in shares for item in share]
    assert sorted(together) == items and max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank in range(world):
        assert Shard(rank, world, lambda mine: together).join(shares[rank], total) == items


@pytest.mark.parametrize("mode", ["cloze", "letters"])
def test_three_ranks_score_to_the_bit_what_one_does(tiny, mode, monkeypatch):
    monkeypatch.setattr(work_units, "BATCHES_IN_UNIT", 4)
    data, settings = eval_set(tiny), EvalSettings(max_new_tokens=4, batch_size=1, mmlu_mode=mode)
    assert len(split_work(data, settings)) > 3
    whole = evaluate_model(tiny.model, tiny.tokenizer, data, settings)
    for found in in_shards(3, lambda shard: evaluate_model(tiny.model, tiny.tokenizer, data, settings, shard)):
        assert found == whole


def test_units_are_each_row_once_and_few_subjects_are_split(tiny):
    data = eval_set(tiny)
    for size in (1, 2, 3, 100):
        units = split_work(data, EvalSettings(batch_size=size))
        for part, total in (("texts", 8), ("losses", 6), ("choices", 6)):
            mine = [unit.rows for unit in units if unit.part == part]
            assert sorted(i for rows in mine for i in rows) == list(range(total))
            assert all(len(rows) <= work_units.BATCHES_IN_UNIT * size for rows in mine)


# -- the whole -------------------------------------------------------------------------------------


def eval_set(tiny):
    forget, retain = (
        [
            Example(id=r["id"], input=r["input"], output=r["output"], task=r["task"], kind=r["id"][:-1][-2:])
            for r in rows[:4]
        ]
        for rows in (tiny.data.forget, tiny.data.retain)
    )
    documents = [row["document"] for row in tiny.data.nonmembers]
    return EvalSet(
        forget=forget, retain=retain, members=documents[:2], nonmembers=documents[2:], questions=questions(tiny, 6)
    )


def test_an_evaluation_states_its_settings_leaves_the_model_as_it_was_and_measures_all_parts(tiny):
    data, settings = eval_set(tiny), EvalSettings(max_new_tokens=3, batch_size=4, mmlu_mode="cloze")
    model = copy.deepcopy(tiny.model).train()
    scores, texts = evaluate_model(model, tiny.tokenizer, data, settings)
    assert model.training
    assert texts == [by_generate(tiny, r.input, 3) for r in [*data.forget, *data.retain]]
    losses = document_losses(tiny.model, tiny.tokenizer, [*data.members, *data.nonmembers], settings)
    wins = sum((m < n) + 0.5 * (m == n) for m in losses[:2] for n in losses[2:])
    assert scores.mia_auc == pytest.approx(wins / (2 * (len(losses) - 2)))
    assert scores.utility == sum(plain_cloze(tiny, q) == q.answer for q in data.questions) / len(data.questions)
    assert scores.final == pytest.approx((scores.task_aggregate + scores.mia_score + scores.utility) / 3)
    assert set(scores.counts) == set(scores.terms) == set(scores.raw) and sum(scores.counts.values()) == 8
    stated = {"max_new_tokens": 3, "dtype": "float32", "mmlu_mode": "cloze", "mmlu_shots": 0}
    assert scores.settings.items() >= {**stated, "members": 2, "nonmembers": 4, "questions": 6}.items()


def test_parts_without_data_are_not_measured(tiny):
    data = eval_set(tiny)
    scores, _ = evaluate_model(
        tiny.model, tiny.tokenizer, EvalSet(forget=data.forget, retain=data.retain), EvalSettings(max_new_tokens=1)
    )
    assert scores.mia_auc is scores.mia_score is scores.utility is scores.final is None
    assert scores.task_aggregate is not None


def test_a_failing_evaluation_gives_the_training_mode_back(tiny):
    model = copy.deepcopy(tiny.model).train()
    broken = SimpleNamespace(pad_token_id=1, eos_token_id=0)
    with pytest.raises(TypeError):
        evaluate_model(model, broken, EvalSet(questions=questions(tiny, 2)), EvalSettings(max_new_tokens=1))
    assert model.training


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_leaves_little_room_is_named(tiny):
    lines, little = [], "42 " * 160
    size = len(tiny.tokenizer(little)["input_ids"])
    assert 450 < size < 512
    rows = [example("a"), example(little, name="b7sc1")]
    data = EvalSet(forget=rows, retain=rows)
    _, texts = evaluate_model(tiny.model, tiny.tokenizer, data, EvalSettings(max_new_tokens=256), log=lines.append)
    assert lines[0] == (
        f"row 'b7sc1': its prompt has {size} tokens; its generation ends with the context after {512 - size}"
    )
    assert texts[1] == by_generate(tiny, little, 512 - size)
    data = EvalSet(forget=[example("42 " * 400, name="c1sc1")], retain=rows)
    with pytest.raises(InputError, match=r"row 'c1sc1': its prompt has \d+ tokens, and the model's context is 512"):
        evaluate_model(tiny.model, tiny.tokenizer, data, EvalSettings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmlu_mode": "words"}, "mmlu_mode: 'words'. Known: cloze, letters"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"mmlu_shots": -1}, "mmlu_shots must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EvalSettings(**options)


def test_a_batch_beside_longer_rows_scores_as_it_does_alone(tiny):
    """Padding on the right may not reach a row's logits."""
    row, longer = (encode(tiny.tokenizer, text, "x") for text in (PROMPTS[4], PROMPTS[0]))
    batch = collate([row, longer], tiny.tokenizer.pad_token_id)
    together = tiny.model(input_ids=batch.ids, attention_mask=batch.attention).logits[0, : len(row.ids)]
    alone = tiny.model(input_ids=torch.tensor([row.ids])).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
