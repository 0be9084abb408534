"""What a model's cache is trusted with: windows, states, positions and RoPE, on real small models of each kind."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from architectures import EOS, PAD, VOCABULARY, small_model
from row_by_row import by_generate, check_model, loss, rows

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.errors import InputError
from ray_unlearn.models import likelihood
from ray_unlearn.models.cached_passes import decodes_in_slots, reach, reads_after_gaps, reads_in_pieces
from ray_unlearn.models.decoding import greedy
from ray_unlearn.models.forward import check_causal, differ
from ray_unlearn.models.likelihood import row_losses
from ray_unlearn.models.token_statistics import token_statistics

TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)


@pytest.mark.parametrize("name", ["gpt_neo", "mistral", "llama4_text", "modernbert-decoder", "recurrent_gemma"])
def test_a_row_beside_longer_ones_sees_the_window_it_sees_alone(name, monkeypatch):
    check_model(small_model(name, narrow=True), monkeypatch)


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon", "roberta", "roformer", "trocr"])
def test_positions_that_a_model_counts_in_its_own_way_are_those_of_the_row_alone(name, monkeypatch):
    settings = {"alibi": True, "new_decoder_architecture": False} if name == "falcon" else {}
    check_model(small_model(name, **settings), monkeypatch)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "recurrent_gemma", "openai-gpt", "lfm2", "qwen3_next"])
def test_models_with_states_or_without_a_cache_are_read_whole(name, monkeypatch):
    check_model(small_model(name), monkeypatch)


@pytest.mark.parametrize(
    ("name", "narrow", "expected"),
    [
        ("llama", False, math.inf),
        ("qwen2", False, math.inf),  # its window is turned off
        ("qwen2", True, 8),
        ("gemma3", True, 8),  # stated in the configuration of its text part
        ("gpt_neo", True, 8),
        ("gpt_neo", False, 256),
        ("llama4_text", False, 8192),
        ("doge", True, 8),
        ("mamba", False, 0),
        ("lfm2", False, 0),
        ("deepseek_v32", False, 0),
    ],
)
def test_a_configuration_says_how_far_back_every_layer_looks(name, narrow, expected):
    assert reach(small_model(name, narrow)) == expected


@pytest.mark.parametrize(
    ("name", "pieces", "slots", "gaps"),
    [
        ("llama", True, True, True),
        ("bloom", True, True, True),
        ("mpt", True, True, False),  # its biases count columns
        ("roberta", True, False, False),  # its positions begin after the padding's id
        ("openai-gpt", False, False, False),  # it takes no cache, and says nothing of it
        ("mamba", False, False, False),
    ],
)
def test_a_model_shows_what_its_cache_can_do(name, pieces, slots, gaps):
    model = small_model(name)
    found = [shows(model, 40) for shows in (reads_in_pieces, decodes_in_slots, reads_after_gaps)]
    assert found == [pieces, slots, gaps]


def counted(model):
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, given: calls.append(given["input_ids"].shape), with_kwargs=True
    )
    return calls


def test_it_is_shown_once_and_again_for_longer_rows_alone():
    model = small_model("llama")
    calls = counted(model)
    assert decodes_in_slots(model, 40) and len(calls) == 6
    assert decodes_in_slots(model, 40) and reads_in_pieces(model, 30) and len(calls) == 6
    assert decodes_in_slots(model, 41) and len(calls) == 12
    assert max(columns for _, columns in calls) == 40 and calls[-1] == (2, 1)


def test_windows_that_no_setting_names_are_shown(monkeypatch):
    model = small_model("gpt_neo", narrow=True)
    monkeypatch.setattr("ray_unlearn.models.cached_passes.WINDOW", re.compile("$^"))
    assert reach(model) == math.inf
    assert decodes_in_slots(model, 8) and not decodes_in_slots(model, 10)
    assert reads_after_gaps(model, 8) and not reads_after_gaps(model, 10)


def test_rows_within_a_window_decode_side_by_side_whatever_longer_rows_there_are():
    model = small_model("mistral", narrow=True)
    prompts = rows(1, 1, 2, 2, 20)
    expected = [by_generate(model, prompt) for prompt in prompts]
    assert decodes_in_slots(model, 8)
    calls = counted(model)
    assert greedy(model, prompts, 6, TOKENIZER) == expected
    assert max(size for size, _ in calls) == 3


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16} | {
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def test_rows_on_either_side_of_a_switch_of_frequencies_share_no_pass(monkeypatch):
    model = small_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    assert reach(model) == 16
    check_model(model, monkeypatch)
    documents = [Encoded(tuple(ids), 1) for ids in rows(5, 5, 16, 17, 40)]
    expected = [loss(model, list(row.ids)) for row in documents]
    assert row_losses(model, PAD, documents, 8, "document") == pytest.approx(expected, abs=1e-5)
    found = token_statistics(model, documents, tokenizer=TOKENIZER)
    assert [-row.log_probs.mean() for row in found] == pytest.approx(expected, abs=1e-5)
    prompts = rows(6, 4, 8, 13, 20)  # the second ends at the switch, the third crosses it
    expected = [by_generate(model, prompt) for prompt in prompts]
    assert greedy(model, prompts, 6, TOKENIZER) == expected


def test_a_row_that_cannot_be_read_in_pieces_is_read_whole(monkeypatch):
    """Three documents: the logits of all of them do not fit, and neither do those of one."""
    model = small_model("lfm2")
    documents = [Encoded(tuple(ids), 1) for ids in rows(4, 30, 31, 32)]
    monkeypatch.setattr(likelihood, "MAX_LOGITS", VOCABULARY * 20)
    assert row_losses(model, PAD, documents, 32, "document") == pytest.approx(
        [loss(model, list(row.ids)) for row in documents], abs=1e-5
    )


def test_an_encoder_is_refused_as_a_language_model():
    with pytest.raises(InputError, match="BertLMHeadModel is no causal language model .*is_decoder: true"):
        check_causal(small_model("bert", is_decoder=False))
    check_causal(small_model("bert"))


def test_rounding_and_nan_are_no_difference():
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(0))
    assert not differ(logits + 1e-4, logits) and differ(logits + 0.05 * logits.flip(1), logits)
    assert not differ((logits + 0.05 * logits.flip(1)).bfloat16(), logits.bfloat16())
    assert differ(logits.flip(1).bfloat16(), logits.bfloat16())
    assert not differ(logits * math.nan, logits) and not differ(logits * 0, logits * 0)
