"""What a model says, loses and chooses one row at a time, and that the package's batches give the same."""

from __future__ import annotations

import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from architectures import EOS, PAD, VOCABULARY

from ray_unlearn.data.questions import Question
from ray_unlearn.data.tokens import Encoded
from ray_unlearn.evaluation import mmlu
from ray_unlearn.models import likelihood
from ray_unlearn.models.decoding import greedy
from ray_unlearn.models.forward import check_causal, scoring_mode
from ray_unlearn.models.likelihood import row_losses
from ray_unlearn.models.token_statistics import token_statistics

NEW = 6
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)


def rows(seed, *lengths):
    rng = random.Random(seed)
    return [[rng.randrange(6, VOCABULARY) for _ in range(length)] for length in lengths]


def by_generate(model, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=PAD
    )
    return out[0, len(prompt) :].tolist()


def log_probs(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def loss(model, ids, prompt=1):
    found = log_probs(model, ids)[prompt - 1 : -1]
    return -found.gather(1, torch.tensor(ids[prompt:])[:, None]).mean().item()


def says_what_generate_says(model):
    prompts = rows(1, 2, 21, 13)
    expected = [by_generate(model, prompt) for prompt in prompts]
    drafts = [expected[0][:3], [7, 8, 9], [*expected[2][:2], 7, *expected[2][3:]]]
    assert greedy(model, prompts, NEW, TOKENIZER, batch_size=2) == expected
    assert greedy(model, prompts, NEW, TOKENIZER, drafts) == expected


def loses_what_a_plain_pass_loses(model, monkeypatch):
    documents = rows(2, 2, 27, 16)
    expected = [loss(model, document) for document in documents]
    encoded = [Encoded(tuple(document), 1) for document in documents]
    for most in (2**27, VOCABULARY * 11):
        monkeypatch.setattr(likelihood, "MAX_LOGITS", most)
        assert row_losses(model, PAD, encoded, 3, "document") == pytest.approx(expected, abs=1e-4)
    monkeypatch.undo()
    found = token_statistics(model, encoded, tokenizer=TOKENIZER)
    assert [-row.log_probs.mean() for row in found] == pytest.approx(expected, abs=1e-4)


class Words:
    """A tokenizer whose tokens are words."""

    pad_token_id, eos_token_id = PAD, EOS

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [6 + zlib.crc32(word.encode()) % (VOCABULARY - 6) for word in text.split()]}


def words(rng, count):
    return " ".join(rng.choice("river lantern bell tower far old who where carried met".split()) for _ in range(count))


def chooses_as_plain_passes_do(model):
    rng, encode = random.Random(3), Words()
    asked = [
        Question("towns", words(rng, n), tuple(words(rng, rng.randint(1, 9)) for _ in range(4)), 0) for n in (1, 17, 6)
    ]
    for question, found in zip(asked, mmlu.cloze_losses(model, encode, asked, 32), strict=True):
        prompt = encode(question.question)["input_ids"]
        options = [prompt + encode(option)["input_ids"] for option in question.options]
        assert found == pytest.approx([loss(model, ids, len(prompt)) for ids in options], abs=1e-4)
    dev = {"towns": [Question("towns", "Who met", ("old", "far", "bell", "tower"), 1)]}
    letters = [encode(letter)["input_ids"][0] for letter in "ABCD"]
    for question, found in zip(asked, mmlu.letter_logits(model, encode, asked, dev, 1, 32), strict=True):
        ids = encode(mmlu.mmlu_prompt(question, dev["towns"], 1, encode, 2048))["input_ids"]
        expected = log_probs(model, ids)[-1, letters]
        assert found == pytest.approx((expected - expected[0] + found[0]).tolist(), abs=1e-3)


def check_model(model, monkeypatch):
    """All of it, on rows of 2 to 27 tokens."""
    check_causal(model)
    with scoring_mode(model):
        says_what_generate_says(model)
        loses_what_a_plain_pass_loses(model, monkeypatch)
        chooses_as_plain_passes_do(model)
