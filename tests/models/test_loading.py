"""Models whose files do not fit their configuration are refused with the tensors' names, never filled at random."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_unlearn.errors import InputError
from ray_unlearn.models.loading import load_model

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model.save_pretrained(place)
    tiny.tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def broken(stored, tmp_path):
    """A copy of the model, and a function that changes its tensors or its configuration."""
    place = tmp_path / "model"
    shutil.copytree(stored, place)

    def change(tensors=None, **settings):
        if tensors is not None:
            state = load_file(place / "model.safetensors")
            tensors(state)
            save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | settings))
        return str(place)

    return change


def test_a_whole_model_loads_as_it_was_saved_and_tied_tensors_are_not_missing(stored, tiny):
    loaded = dict(load_model(str(stored)).named_parameters())
    assert all(parameter.equal(loaded[name]) for name, parameter in tiny.model.named_parameters())


def halve(state):
    for name in sorted(state)[::2]:
        del state[name]


def rename(state):
    state["model.normal.weight"] = state.pop(NORM)


def reshape(state):
    state[DOWN] = state[DOWN][:, :-1].contiguous()


def poison(state):
    state[NORM][3] = float("nan")


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (halve, {}, r"13 tensors of .*:\n  lm_head.weight is missing"),
        (rename, {}, f"{NORM} is missing\n  model.normal.weight is not in the model"),
        (reshape, {}, rf"{DOWN} has the shape \[32, 95\], and the configuration wants \[32, 96\]"),
        (poison, {}, f"NaN or infinity in {NORM}"),
        (None, {"num_hidden_layers": 3}, "model.layers.2.* is missing"),
        (None, {"num_hidden_layers": 1}, "model.layers.1.* is not in the model"),
        (None, {"intermediate_size": 80}, "the configuration wants"),
        (None, {"num_attention_heads": 5}, "the configuration wants"),
        (None, {"model_type": "no_such"}, "cannot be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_fit_is_refused_by_name(broken, tensors, settings, message):
    with pytest.raises(InputError, match=message):
        load_model(broken(tensors, **settings))


@pytest.mark.parametrize("content", [b"", b"garbage " * 100, None], ids=["empty", "garbage", "truncated"])
def test_weights_that_are_no_safetensors_are_refused(broken, stored, content):
    place = broken()
    whole = (stored / "model.safetensors").read_bytes()
    (stored.parent / place / "model.safetensors").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=r"cannot be loaded|do not fit"):
        load_model(place)


def test_bfloat16_weights_are_checked_too(broken):
    def halve_precision(state):
        for name in state:
            state[name] = state[name].to(torch.bfloat16)
        poison(state)

    with pytest.raises(InputError, match="NaN or infinity"):
        load_model(broken(halve_precision), "bfloat16")
