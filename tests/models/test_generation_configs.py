"""A model's own generation config: what in it changes greedy decoding is left to `generate`, and where a text ends."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import EOS, small_model
from row_by_row import TOKENIZER, by_generate, rows
from transformers import GenerationConfig, WatermarkingConfig

from ray_unlearn.errors import InputError
from ray_unlearn.models import decoding
from ray_unlearn.models.decoding import PROCESSORS, greedy

NEUTRAL = {
    "sampling": """do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
        renormalize_logits""",
    "beams, which num_beams turns on": "early_stopping length_penalty num_return_sequences low_memory",
    "length, which max_new_tokens decides": "max_length max_new_tokens",
    "speed": "use_cache max_cache_len prefill_chunk_size compile_config disable_compile continuous_batching_config",
    "drafts, which are verified": """use_mtp num_assistant_tokens num_assistant_tokens_schedule prompt_lookup_num_tokens
        max_matching_ngram_size assistant_confidence_threshold assistant_early_exit assistant_lookbehind
        target_lookbehind assistant_ensemble_weight speculation_type""",
    "what is returned": "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate",
    "tokens that greedy reads itself": "pad_token_id bos_token_id eos_token_id decoder_start_token_id",
    "looked at by name": "cache_implementation",
    "about the file": "_from_model_config transformers_version",
}
"""Fields that leave a greedy text as it is, by why they do."""


def test_every_field_of_the_installed_generation_config_is_known():
    neutral = {name for names in NEUTRAL.values() for name in names.split()}
    assert neutral | set(PROCESSORS) == set(vars(GenerationConfig()))
    assert not neutral & set(PROCESSORS)


def configured(**settings):
    model = small_model("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def prompts():
    return rows(1, 3, 9, 14)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.1, "top_k": 3, "top_p": 0.2, "min_p": 0.5, "do_sample": True},
        {"renormalize_logits": True, "length_penalty": 3.0, "low_memory": True, "max_length": 17},
        {"prompt_lookup_num_tokens": 2, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.9},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True},
        {"guidance_scale": 1.0, "repetition_penalty": 1.0, "min_length": 0, "is_assistant": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_neutral_settings_are_decoded_in_slots_as_generate_would(settings):
    model = configured(**settings)
    assert decoding._is_plain(model)
    found = greedy(model, prompts(), 6, TOKENIZER)
    model.generation_config.return_dict_in_generate = False  # the reference reads tokens alone
    assert found == [by_generate(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize(
    "settings",
    [
        {"watermarking_config": WatermarkingConfig(bias=9.0, seeding_scheme="lefthash")},
        {"encoder_repetition_penalty": 0.3},
        {"encoder_no_repeat_ngram_size": 1},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 30))},
        {"sequence_bias": [[[11], 40.0]]},
        {"forced_eos_token_id": EOS},
        {"num_beams": 3},
        {"exponential_decay_length_penalty": [1, 9.0]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_change_a_text_change_ours_alike(settings):
    model = configured(**settings)
    expected = [by_generate(model, prompt) for prompt in prompts()]
    assert greedy(model, prompts(), 6, TOKENIZER, [[5, 6]] * 3) == expected
    assert expected != [by_generate(small_model("llama"), prompt) for prompt in prompts()]


@pytest.mark.parametrize("stated", [{"cache_implementation": "quantized"}, {"max_time": 60.0}, {"token_healing": True}])
def test_settings_whose_effect_needs_more_than_a_model_are_left_to_generate(stated):
    assert not decoding._is_plain(configured(**stated))


def test_a_text_ends_at_a_stop_string(tiny):
    model = copy.deepcopy(tiny.model)
    ids = tiny.tokenizer("What did Tosu carry when Mira met them?")["input_ids"]
    free = greedy(model, [ids], 24, tiny.tokenizer)[0]
    model.generation_config.stop_strings = [tiny.tokenizer.decode(free[5:7])]
    ended = greedy(model, [ids], 24, tiny.tokenizer)[0]
    assert ended == free[: len(ended)] and len(ended) <= 7


@pytest.mark.parametrize("processor", [{}, {"no_repeat_ngram_size": 9}], ids=["slots", "generate"])
def test_without_a_stated_end_a_text_ends_at_the_tokenizers_eos_on_both_paths(processor):
    model = configured(eos_token_id=None, **processor)
    model.config.eos_token_id = None
    free = [by_generate(model, prompt) for prompt in prompts()]
    assert {len(row) for row in free} == {6}
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.eos_token_id = free[0][2]
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else 6 for row in free]
    assert min(ends) < 6
    assert greedy(model, prompts(), 6, tokenizer) == [row[:end] for row, end in zip(free, ends, strict=True)]


def test_nan_logits_are_refused_by_generate_too():
    model = configured(no_repeat_ngram_size=9)
    next(model.parameters()).fill_(float("nan"))
    with torch.no_grad(), pytest.raises(InputError, match="logits are NaN"):
        greedy(model, prompts(), 3, TOKENIZER)
