"""Scoring a real, tiny model: batched decoding and losses equal those of one row at a time; shards keep the order."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from ray_unlearn.data import Question, collate, encode
from ray_unlearn.decoding import greedy
from ray_unlearn.errors import InputError
from ray_unlearn.records import Example
from ray_unlearn.scoring import (
    EvalSet,
    EvalSettings,
    Shard,
    clean_up,
    document_losses,
    evaluate_model,
    generate,
    mmlu_accuracy,
    mmlu_prompt,
    sequence_losses,
)

PROMPTS = [
    "In Kanobe, Mira met Tosu, who carried a silver lantern to the river.",
    "a",
    "What did Tosu carry when Mira met them?",
    "Née 42-17",
    "Mira",
]


def tokens_of(tiny, texts):
    return [tiny.tokenizer(text)["input_ids"] for text in texts]


def by_generate(tiny, prompt, length, model=None):
    """transformers' own greedy continuation of one prompt, without padding."""
    model = tiny.model if model is None else model
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=1
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_in_a_padded_batch_is_generate_row_by_row(tiny):
    prompts = tokens_of(tiny, PROMPTS)
    assert len({len(prompt) for prompt in prompts}) > 3
    new = greedy(tiny.model, prompts, 12, tiny.tokenizer)
    assert new == [by_generate(tiny, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in new}) > 1  # the prompts matter


def ending_model(tiny, token):
    """The model with another token as EOS, so that rows end at different steps."""
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = token
    return model


def test_rows_that_end_stop_at_their_eos_while_others_go_on(tiny):
    prompts = tokens_of(tiny, PROMPTS)
    free = [by_generate(tiny, prompt, 12) for prompt in prompts]
    # a token that some row makes in its middle and some other row never makes
    token = next(
        t for row in free for t in row[1:8] if sum(t in other for other in free) < len(free) and row.index(t) > 0
    )
    model = ending_model(tiny, token)
    new = greedy(model, prompts, 12, tiny.tokenizer)
    assert new == [by_generate(tiny, prompt, 12, model) for prompt in prompts]
    assert min(map(len, new)) < 12 == max(map(len, new))
    assert all(token not in row[:-1] for row in new)
    assert (
        greedy(ending_model(tiny, [token, 2]), prompts, 12, tiny.tokenizer) == new
    )  # a list of them, as models state it


def test_greedy_stops_early_when_all_rows_have_ended(tiny):
    prompt = tokens_of(tiny, PROMPTS)[2]
    first = greedy(tiny.model, [prompt], 1, tiny.tokenizer)[0]
    model, calls = ending_model(tiny, first[0]), []
    model.register_forward_hook(lambda *args: calls.append(1))
    assert greedy(model, [prompt, prompt], 50, tiny.tokenizer) == [first, first]
    assert len(calls) == 1


@pytest.mark.parametrize("size", [1, 2, 64])
def test_generated_texts_come_in_the_order_of_the_prompts_at_any_batch_size(tiny, size):
    settings = EvalSettings(max_new_tokens=6, batch_size=size)
    expected = [
        clean_up(tiny.tokenizer.decode(by_generate(tiny, prompt, 6), skip_special_tokens=True))
        for prompt in tokens_of(tiny, PROMPTS)
    ]
    assert generate(tiny.model, tiny.tokenizer, PROMPTS, settings) == expected


def test_clean_up_removes_the_spaces_of_tokenisation():
    assert clean_up("Well , I do n't know . Is it Mira 's ? We 've , you 're , I 'm !") == (
        "Well, I don't know. Is it Mira's? We've, you're, I'm!"
    )
    assert clean_up(" plain  text\n") == " plain  text\n"


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 64])
def test_document_losses_are_those_of_each_document_alone(tiny, size):
    documents = [row["document"] for row in tiny.data.nonmembers] + PROMPTS[:1] + PROMPTS[2:4]
    losses = document_losses(tiny.model, tiny.tokenizer, documents, EvalSettings(batch_size=size))
    assert len(losses) == len(documents)
    for document, loss in zip(documents, losses, strict=True):
        ids = torch.tensor([tiny.tokenizer(document)["input_ids"]])
        assert loss == pytest.approx(tiny.model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_answer_losses_leave_the_prompt_out(tiny):
    pairs = [(row["input"], row["output"]) for row in tiny.data.forget[:6]]
    rows = [encode(tiny.tokenizer, *pair) for pair in pairs]
    losses = sequence_losses(tiny.model, tiny.tokenizer, rows, EvalSettings(batch_size=4), "answer")
    for row, loss in zip(rows, losses, strict=True):
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[0, : row.prompt] = -100
        assert loss == pytest.approx(tiny.model(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


# -- MMLU ------------------------------------------------------------------------------------------


def questions(tiny, count=12):
    rng = random.Random(5)
    made = []
    for i in range(count):
        question, options, _ = rng.choice(tiny.data.facts)
        options = tuple(f"{option} {'of old ' * rng.randint(0, 2)}{i}" for option in options)
        made.append(Question(rng.choice(["towns", "far_places"]), question, options, rng.randrange(4)))
    return made


def plain_cloze(tiny, question):
    """Lowest mean token loss of the option's tokens after the bare question."""
    means = []
    for option in question.options:
        prompt = tiny.tokenizer(question.question)["input_ids"]
        ids = tiny.tokenizer(f"{question.question} {option}")["input_ids"]
        logps = tiny.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values = [-logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        means.append(sum(values) / len(values))
    return means.index(min(means))


def plain_letters(tiny, question, dev, shots):
    """Most probable of the four letters' tokens after the few-shot prompt, its text spelled out here."""

    def block(q):
        a, b, c, d = q.options
        return f"{q.question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"

    text = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    for shot in dev[question.subject][:shots]:
        text += f"{block(shot)} {'ABCD'[shot.answer]}\n\n"
    ids = tiny.tokenizer(text + block(question))["input_ids"]
    last = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
    values = [last[tiny.tokenizer(f" {letter}")["input_ids"][-1]].item() for letter in "ABCD"]
    return values.index(max(values))


@pytest.mark.parametrize("mode", ["cloze", "letters"])
def test_mmlu_accuracy_is_that_of_a_loop_over_questions(tiny, mode):
    asked = questions(tiny)
    dev = {"towns": asked[:3], "far_places": []}
    settings = EvalSettings(mmlu_mode=mode, mmlu_shots=2, batch_size=5)
    chosen = [plain_cloze(tiny, q) if mode == "cloze" else plain_letters(tiny, q, dev, 2) for q in asked]
    # One question at a time, so that a right count from wrong choices cannot pass.
    for index, question in enumerate(asked):
        accuracy = mmlu_accuracy(tiny.model, tiny.tokenizer, EvalSet(questions=[question], dev=dev), settings)
        assert accuracy == (chosen[index] == question.answer)
    answers = [
        Question(q.subject, q.question, q.options, choice if i % 3 else (choice + 1) % 4)
        for i, (q, choice) in enumerate(zip(asked, chosen, strict=True))
    ]
    data = EvalSet(questions=answers, dev=dev)
    assert mmlu_accuracy(tiny.model, tiny.tokenizer, data, settings) == pytest.approx(8 / 12)


def test_shots_are_dropped_from_the_end_until_the_prompt_fits(tiny):
    asked = questions(tiny, 4)
    full = mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer)
    bare = mmlu_prompt(asked[0], asked[1:], 0, tiny.tokenizer)
    size = len(tiny.tokenizer(full)["input_ids"])
    assert mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=size) == full
    fewer = mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=size - 1)
    assert fewer == mmlu_prompt(asked[0], asked[1:], 2, tiny.tokenizer) != full
    assert mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=1) == bare  # the question itself always stays
    assert bare.startswith("The following are multiple choice questions (with answers) about ")
    assert bare.endswith("\nAnswer:")


# -- shards ----------------------------------------------------------------------------------------


def in_shards(world, work):
    """Results of `work(shard)` on each of `world` pretended ranks; the gather joins what all of them hand over."""
    handed = []
    for rank in range(world):
        mine = []
        work(Shard(rank, world, lambda items, mine=mine: mine.append(list(items)) or [None] * 100))
        handed.append(mine[0])
    together = [item for items in handed for item in items]
    return [work(Shard(rank, world, lambda items: together)) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 10])
def test_joined_shares_are_the_whole_in_order_whatever_the_ranks(total, world):
    items = list(range(total))
    shares = [Shard(rank, world).take(items) for rank in range(world)]
    together = [item for share in shares for item in share]
    assert sorted(together) == items and max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank in range(world):
        assert Shard(rank, world, lambda mine: together).join(shares[rank], total) == items


def test_three_ranks_generate_and_lose_what_one_does(tiny):
    settings = EvalSettings(max_new_tokens=4, batch_size=2)
    texts = generate(tiny.model, tiny.tokenizer, PROMPTS, settings)
    for found in in_shards(3, lambda shard: generate(tiny.model, tiny.tokenizer, PROMPTS, settings, shard)):
        assert found == texts
    documents = [row["document"] for row in tiny.data.nonmembers[:5]]
    losses = document_losses(tiny.model, tiny.tokenizer, documents, settings)
    for found in in_shards(3, lambda shard: document_losses(tiny.model, tiny.tokenizer, documents, settings, shard)):
        assert found == pytest.approx(losses, abs=1e-5)


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
    assert texts == generate(tiny.model, tiny.tokenizer, [r.input for r in [*data.forget, *data.retain]], settings)
    losses = document_losses(tiny.model, tiny.tokenizer, [*data.members, *data.nonmembers], settings)
    wins = sum((m < n) + 0.5 * (m == n) for m in losses[:2] for n in losses[2:])
    assert scores.mia_auc == pytest.approx(wins / (2 * (len(losses) - 2)))
    assert scores.utility == mmlu_accuracy(tiny.model, tiny.tokenizer, data, settings)
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
        evaluate_model(model, broken, eval_set(tiny), EvalSettings(max_new_tokens=1))
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmlu_mode": "words"}, r"mmlu.mode \(--mmlu-mode\) must be letters or cloze, got 'words'"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"mmlu_shots": -1}, "mmlu.shots at least 0"),
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
