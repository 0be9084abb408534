"""Tokens of rows, and batches with their masks."""

from __future__ import annotations

import random

import pytest
import torch

from ray_unlearn.data.tokens import Encoded, collate, cut, document_of, encode
from ray_unlearn.errors import InputError

TEXTS = [
    ("In Kanobe, Mira met", "Tosu at the river."),
    ("In Kanobe, Mira met ", "Tosu at the river."),
    ("In Kanobe, Mira met", " Tosu"),
    ("a", "b"),
    ("Née 42", "ça 7-8"),
    ("ends in newline\n", "x"),
    ("tab\t", "x"),
    ("wide\u3000", "\u3000x"),
]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(("input", "output"), TEXTS)
def test_the_prompts_tokens_are_those_of_the_prompt_alone_and_the_text_is_whole(tiny, input, output, eos):
    tokenizer = tiny.tokenizer
    encoded = encode(tokenizer, input, output, eos)
    assert list(encoded.ids[: encoded.prompt]) == tokenizer(input)["input_ids"]
    assert len(encoded.ids) > encoded.prompt
    body = encoded.ids[:-1] if eos else encoded.ids
    assert tokenizer.decode(body, clean_up_tokenization_spaces=False) == document_of(input, output)
    assert (encoded.ids[-1] == tokenizer.eos_token_id) is eos
    assert encoded.ids.count(tokenizer.eos_token_id) == eos


def test_every_benchmark_row_is_tokenised_as_generation_and_as_one_text(tiny):
    for given in [*tiny.data.forget, *tiny.data.retain]:
        encoded = encode(tiny.tokenizer, given["input"], given["output"])
        assert list(encoded.ids[: encoded.prompt]) == tiny.tokenizer(given["input"])["input_ids"]
        assert list(encoded.ids) == tiny.tokenizer(f"{given['input']} {given['output']}")["input_ids"]


def test_where_a_token_spans_the_seam_prompt_and_answer_are_tokenised_apart():
    class Merging:
        """One token for each letter, but `  ` is one token."""

        eos_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            start = [1] if add_special_tokens else []
            return {"input_ids": start + [ord(c) for c in text.replace("  ", "_")]}

    seam = encode(Merging(), "a ", " b", eos=True)
    assert seam == Encoded((1, ord("a"), ord(" "), ord(" "), ord("b"), 0), 3)
    assert encode(Merging(), "a", "b") == Encoded((1, ord("a"), ord(" "), ord("b")), 2)

    class Clinging(Merging):
        """A letter and the space after it are one token, so the joining space itself spans the seam."""

        def __call__(self, text, add_special_tokens=True):
            return super().__call__(text.replace("a b", "@b"), add_special_tokens)

    assert encode(Clinging(), "a", "b") == Encoded((1, ord("a"), ord(" "), ord("b")), 2)


def test_eos_without_an_eos_token_is_refused():
    class Endless:
        eos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [ord(c) for c in text]}

    with pytest.raises(InputError, match="no EOS token"):
        encode(Endless(), "a", "b", eos=True)


@pytest.mark.parametrize(
    ("input", "output", "joined"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb"), ("a ", " b", "a  b")],
)
def test_prompt_and_answer_are_joined_by_one_space_only_where_none_stands(input, output, joined):
    assert document_of(input, output) == joined


def test_cut_keeps_the_first_tokens_and_at_least_one_of_the_answer():
    encoded = Encoded((1, 2, 3, 4, 5), 3)
    assert cut(encoded, None) == cut(encoded, 5) == cut(encoded, 99) == encoded
    assert cut(encoded, 4) == Encoded((1, 2, 3, 4), 3)
    with pytest.raises(InputError, match="prompt alone has 3 tokens, and the limit is 3"):
        cut(encoded, 3)


@pytest.mark.parametrize("seed", range(10))
def test_collated_masks_say_which_next_tokens_count(seed):
    rng, pad = random.Random(seed), 3
    rows = []
    for _ in range(rng.randint(1, 5)):
        length = rng.randint(2, 9)
        rows.append(Encoded(tuple(rng.randrange(5) for _ in range(length)), rng.randint(1, length - 1)))
    batch = collate(rows, pad)
    width = max(len(encoded.ids) for encoded in rows)
    assert batch.ids.shape == batch.attention.shape == (len(rows), width)
    assert batch.answer.shape == batch.document.shape == (len(rows), width - 1)
    for b, encoded in enumerate(rows):
        n = len(encoded.ids)
        assert batch.ids[b].tolist() == [*encoded.ids, *[pad] * (width - n)]
        # A real token that equals the padding id is a token all the same.
        assert batch.attention[b].tolist() == [1] * n + [0] * (width - n)
        assert batch.document[b].tolist() == [t + 1 < n for t in range(width - 1)]
        assert batch.answer[b].tolist() == [encoded.prompt <= t + 1 < n for t in range(width - 1)]
    assert batch.mask("answer") is batch.answer and batch.mask("document") is batch.document
    assert batch.answer.dtype == batch.document.dtype == torch.bool


def test_the_answer_mask_of_an_encoded_row_covers_the_answer_and_its_end(tiny):
    encoded = encode(tiny.tokenizer, "Who came?", "Mira of Kanobe", eos=True)
    batch = collate([encoded, Encoded((5,) * 40, 1)], tiny.tokenizer.pad_token_id)
    masked = batch.ids[0, 1:][batch.answer[0]].tolist()
    assert tiny.tokenizer.decode(masked[:-1]) == " Mira of Kanobe" and masked[-1] == tiny.tokenizer.eos_token_id
