"""Greedy decoding of a real, tiny model: whatever the drafts, the batch and the ends, it says what `generate` says."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from ray_unlearn.errors import InputError
from ray_unlearn.models import decoding, forward
from ray_unlearn.models.cached_passes import decodes_in_slots, reach
from ray_unlearn.models.decoding import greedy

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


def ending_model(tiny, token):
    """The model with another token as EOS, so that rows end at different steps."""
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = token
    return model


def counting(tiny):
    """A copy of the model, and the shapes of the ids that it was given, pass by pass; it has shown what it can do."""
    model, calls = copy.deepcopy(tiny.model), []
    assert decodes_in_slots(model, 512)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return model, calls


def test_a_padded_batch_says_what_generate_says_row_by_row(tiny):
    prompts = tokens_of(tiny, PROMPTS)
    assert len({len(prompt) for prompt in prompts}) > 3
    new = greedy(tiny.model, prompts, 12, tiny.tokenizer)
    assert new == [by_generate(tiny, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in new}) > 1  # the prompts matter


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
    # a list of them, as models state it
    assert greedy(ending_model(tiny, [token, 2]), prompts, 12, tiny.tokenizer) == new


def drafts_of(rng, free, vocabulary):
    """Continuations that agree with the model's for a while: none, some, all of it, more than it, or nonsense."""
    made = []
    for row in free:
        kind = rng.randrange(5)
        if kind == 0:
            made.append([])
        elif kind == 1:
            made.append([rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))])
        elif kind == 2:
            made.append(row[:-1])
        elif kind == 3:
            made.append([*row, *[rng.randrange(vocabulary) for _ in range(4)]])
        else:
            cut = rng.randrange(len(row))
            made.append([*row[:cut], (row[cut] + 1) % vocabulary, *row[cut + 1 :]])
    return made


@pytest.mark.parametrize("seed", range(6))
def test_drafts_change_nothing_at_any_batch_size_and_with_any_ends(tiny, seed, monkeypatch):
    rng = random.Random(seed)
    texts = [row["input"] for row in tiny.data.forget] + PROMPTS
    prompts = tokens_of(tiny, rng.sample(texts, 14))
    free = [by_generate(tiny, prompt, 24) for prompt in prompts]
    model = ending_model(tiny, [rng.choice(row[3:]) for row in free[:4]])
    expected = [by_generate(tiny, prompt, 24, model) for prompt in prompts]
    assert len({len(row) for row in expected}) > 2
    for size, room in ((1, 1), (3, 1), (5, 2**30), (64, 1)):
        monkeypatch.setattr(decoding, "CACHE_BYTES", room)
        drafts = drafts_of(rng, expected, len(tiny.tokenizer))
        assert greedy(model, prompts, 24, tiny.tokenizer, drafts, batch_size=size) == expected


def test_rows_that_say_their_drafts_cost_one_pass(tiny):
    prompts = tokens_of(tiny, PROMPTS)
    first = by_generate(tiny, prompts[0], 20)
    model, calls = counting(tiny)
    model.generation_config.eos_token_id = first[10]
    expected = first[: first.index(first[10]) + 1]
    assert greedy(model, [prompts[0]], 20, tiny.tokenizer, [expected[:-1]]) == [expected]
    assert calls == [(1, len(prompts[0]) + len(expected) - 1)]  # the end itself is verified
    calls.clear()
    assert greedy(model, [prompts[0]], 20, tiny.tokenizer, [expected[:-2]]) == [expected]
    assert len(calls) == 2
    calls.clear()
    limit = len(expected) - 1
    assert greedy(model, [prompts[0]], limit, tiny.tokenizer, [expected]) == [expected[:limit]]
    assert len(calls) == 1


def test_rows_that_end_leave_the_batch_and_others_take_their_place(tiny, monkeypatch):
    prompts = tokens_of(tiny, [row["input"] for row in tiny.data.forget])[:12]
    model, calls = counting(tiny)
    expected = [by_generate(tiny, prompt, 6) for prompt in prompts]
    assert greedy(model, prompts, 6, tiny.tokenizer, batch_size=4) == expected
    assert sum(columns == 1 for _, columns in calls) == 5 and calls[-1][0] == 12
    assert all(rows <= 4 for rows, columns in calls if columns > 1)  # memory for all of them: steps take them together
    calls.clear()
    monkeypatch.setattr(decoding, "CACHE_BYTES", 1)
    drafts = [row[: i % 5] for i, row in enumerate(expected)]
    assert greedy(model, prompts, 6, tiny.tokenizer, drafts, batch_size=4) == expected
    assert max(rows for rows, _ in calls) == 4
    calls.clear()
    ended = greedy(
        model, prompts, 40, tiny.tokenizer, stop_early=lambda index, new: len(new) >= (30 if index == 3 else 2)
    )
    free = [by_generate(tiny, prompt, 40) for prompt in prompts]
    assert ended == [row[: 30 if i == 3 else 2] for i, row in enumerate(free)]
    assert [rows for rows, columns in calls if columns == 1] == [12] + [1] * 28


def test_a_model_with_processors_or_windows_is_left_to_generate(tiny):
    prompts = tokens_of(tiny, PROMPTS)
    model = copy.deepcopy(tiny.model)
    model.generation_config.repetition_penalty = 1.7
    new = greedy(model, prompts, 12, tiny.tokenizer, [[5, 6]] * len(prompts))
    assert new == [by_generate(tiny, prompt, 12, model) for prompt in prompts]
    assert new != greedy(tiny.model, prompts, 12, tiny.tokenizer)
    assert reach(tiny.model) == math.inf
    model.config.sliding_window = 16
    assert reach(model) == 16
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert reach(model) == 0


@pytest.mark.parametrize("window", [4, 12])
def test_sliding_windows_decode_as_generate_does(window):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=90, num_key_value_heads=2, sliding_window=window, max_position_embeddings=64, **sizes
    )
    model = MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = 89
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 89})
    prompts = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        plain = [
            model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=8, pad_token_id=0)[0, len(p) :].tolist()
            for p in prompts
        ]
        assert greedy(model, prompts, 8, tokenizer, [row[:3] for row in plain]) == plain
        assert greedy(model, prompts, 3, tokenizer) == [row[:3] for row in plain]


def test_grouped_heads_soft_caps_and_both_kinds_of_layers_decode_as_generate_does():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64, max_position_embeddings=64, final_logit_softcapping=2.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = 89
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 89})
    prompts = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        plain = [
            model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(p) :].tolist()
            for p in prompts
        ]
        assert greedy(model, prompts, 12, tokenizer, [plain[0], plain[1][:4], []]) == plain
        ids, rows, columns = torch.tensor([[5, 6, 7, 8]]), torch.tensor([0, 0]), torch.tensor([1, 3])
        picked = forward.picked_logits(model, rows, columns, input_ids=ids)
        torch.testing.assert_close(picked, model(input_ids=ids).logits[0, [1, 3]])
        assert picked.abs().max() <= 2.0


def test_a_model_with_adapters_decodes_as_generate_does(tiny):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    prompts = tokens_of(tiny, PROMPTS)
    plain = [by_generate(tiny, prompt, 10, model) for prompt in prompts]
    assert plain != [by_generate(tiny, prompt, 10) for prompt in prompts]
    with torch.no_grad():
        assert greedy(model, prompts, 10, tiny.tokenizer, [row[:5] for row in plain]) == plain


def test_the_contexts_end_is_an_end_and_a_prompt_that_fills_it_is_refused(tiny):
    context = tiny.model.config.max_position_embeddings
    prompt = [5 + i % 200 for i in range(context - 3)]
    assert len(greedy(tiny.model, [prompt], 12, tiny.tokenizer)[0]) <= 3
    with pytest.raises(InputError, match=f"row 2's prompt has {context} tokens; the model's context is {context}"):
        greedy(tiny.model, [prompt, [5] * context], 12, tiny.tokenizer)


def test_nan_logits_and_a_text_that_nothing_could_end_are_refused(tiny):
    model = copy.deepcopy(tiny.model)
    next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="logits are NaN"):
        greedy(model, tokens_of(tiny, PROMPTS), 3, tiny.tokenizer)
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.eos_token = None
    model = ending_model(tiny, None)
    with pytest.raises(InputError, match="nothing would end"):
        greedy(model, tokens_of(tiny, PROMPTS), 3, tokenizer)


def test_a_pass_takes_no_more_tokens_and_logits_than_there_is_room_for(tiny, monkeypatch):
    prompts = tokens_of(tiny, [row["input"] for row in tiny.data.forget])[:10]
    expected = greedy(tiny.model, prompts, 8, tiny.tokenizer)
    model, calls = counting(tiny)
    monkeypatch.setattr(forward.share_a_pass, "__defaults__", (60,))
    assert greedy(model, prompts, 8, tiny.tokenizer) == expected
    first = [shape for shape in calls if shape[1] > 1]
    assert len(first) > 1 and all(rows * columns <= 60 or rows == 1 for rows, columns in first)
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "MAX_LOGITS", 3 * len(tiny.tokenizer))
    assert greedy(model, prompts, 8, tiny.tokenizer, [[7]] * 10) == greedy(tiny.model, prompts, 8, tiny.tokenizer)
    assert {rows for rows, columns in calls if columns > 1} == {1}


def test_rows_share_a_pass_while_padding_is_little():
    assert forward.share_a_pass([10, 90, 85]) == 3  # a small pass takes any
    assert forward.share_a_pass([100] * 30) == 30
    assert forward.share_a_pass([100] * 30, 2000) == 20
    assert forward.share_a_pass([100, 105, 110, 112, 300]) == 4
    assert forward.share_a_pass([9000, 9000]) == 1
    rng = random.Random(2)
    lengths = [rng.randint(1, 600) for _ in range(200)]
    groups = forward.batches(lengths, 32, 4096)
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert [lengths[i] for group in groups for i in group] == sorted(lengths)
    padded = [len(group) * max(lengths[i] for i in group) for group in groups]
    assert max(map(len, groups)) <= 32 and max(padded) <= 4096
    assert sum(padded) <= 1.2 * sum(lengths)
