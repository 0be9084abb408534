"""Every causal architecture of the installed transformers does in batches what it does row by row."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, has_window, small_config, small_model
from row_by_row import check_model
from transformers import AutoModelForCausalLM

from ray_unlearn.errors import InputError
from ray_unlearn.models.forward import check_causal

NOT_MADE = {
    "blt": "reads patches of bytes; the sizes of its parts depend on each other",
    "dots3_note": "the sizes of its vision and audio parts depend on each other; its text part is dots3_note_text",
    "gemma3n": "its vision part needs the library timm; its text part is gemma3n_text",
    "gemma4_assistant": "drafts for another model from that model's cache",
    "gemma4_unified_assistant": "drafts for another model from that model's cache",
    "musicgen": "makes sound; has no configuration without two encoders",
    "musicgen_melody": "makes sound; has no configuration without two encoders",
}
"""Architectures that cannot be made small, or not without other parts, and why."""
REFUSED = {
    "cpmant": "reads its prompt in both directions",
    "prophetnet": "predicts several tokens at each position",
    "xlm": "reads in both directions",
    "xlnet": "reads in both directions",
}
"""Architectures whose tokens see later ones: refused before any work."""
UNSTEADY = {
    "doge": "of equal tokens beyond its keep_window_size it drops one or another, with the length of the batch",
    "reformer": "draws other hashes in each pass over more than a chunk",
}
"""Architectures that beyond their window differ from themselves."""

pytestmark = pytest.mark.slow


def test_the_lists_name_architectures_of_the_installed_library():
    assert not {*NOT_MADE, *REFUSED, *UNSTEADY} - set(ARCHITECTURES)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in {**NOT_MADE, **REFUSED}])
def test_batches_are_as_good_as_rows_alone(name, monkeypatch):
    check_model(small_model(name), monkeypatch)
    if name in UNSTEADY:
        with pytest.raises(AssertionError):
            check_model(small_model(name, narrow=True), monkeypatch)
    elif has_window(name):
        check_model(small_model(name, narrow=True), monkeypatch)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_tokens_see_later_ones_is_refused(name):
    with pytest.raises(InputError, match="is no causal language model|for other positions than those of its tokens"):
        check_causal(small_model(name))


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_cannot_be_made_is_listed(name):
    with pytest.raises(Exception):  # noqa: B017  each has its own
        AutoModelForCausalLM.from_config(small_config(name))(input_ids=torch.tensor([[5, 6]]))
