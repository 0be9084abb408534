"""Signals of a real, tiny model against one row and one token at a time, and the metrics made of them by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from slow_statistics import slow_signals

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.errors import InputError
from ray_unlearn.models import token_statistics as signals
from ray_unlearn.models.token_statistics import gradient_norms, token_statistics

TEXTS = ["In Kanobe, Mira met Tosu, who carried a silver lantern.", "Née 42", "Mira met", "What did Tosu carry when?"]


def encoded(tiny, prompt=1):
    return [Encoded(tuple(tiny.tokenizer(text)["input_ids"]), prompt) for text in TEXTS]


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("slice_size", [2**24, 5 * 330])
def test_signals_in_padded_batches_and_slices_are_those_of_one_row_and_token(tiny, prompt, slice_size, monkeypatch):
    monkeypatch.setattr(signals, "MAX_SLICE", slice_size)
    rows = encoded(tiny, prompt)
    assert len({len(row.ids) for row in rows}) > 2  # so that there is padding
    for row, found in zip(
        rows, token_statistics(tiny.model, rows, tokenizer=tiny.tokenizer, moments=True), strict=True
    ):
        own, matches, means, deviations = slow_signals(tiny.model, row)
        assert found.log_probs.shape == (len(row.ids) - prompt,)
        np.testing.assert_allclose(found.log_probs, own, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.means, means, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.deviations, deviations, rtol=1e-3, atol=1e-5)
        assert found.matches.tolist() == matches


def test_signals_without_moments_are_the_same_and_keep_the_rows_order(tiny):
    rows = encoded(tiny)
    plain, full = (
        token_statistics(tiny.model, rows, tokenizer=tiny.tokenizer, moments=m, batch_size=2) for m in (False, True)
    )
    for one, two in zip(plain, full, strict=True):
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-6)
        assert not one.means.size and not one.deviations.size and two.means.size
    assert token_statistics(tiny.model, [], tokenizer=tiny.tokenizer) == []


def test_a_token_that_equals_the_padding_is_still_read(tiny):
    """Padding is known by the row's length; masks made by comparing ids hide real end-of-text tokens."""
    pad = tiny.tokenizer.pad_token_id
    ids = tiny.tokenizer(TEXTS[0])["input_ids"]
    row, long = Encoded((*ids[:4], pad, *ids[4:8]), 1), Encoded(tuple(ids), 1)
    found = token_statistics(tiny.model, [row, long], tokenizer=tiny.tokenizer)[0]
    np.testing.assert_allclose(found.log_probs, slow_signals(tiny.model, row)[0], rtol=1e-4, atol=1e-5)


def test_a_token_that_is_ruled_out_leaves_the_moments_finite():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    _, _, means, deviations = signals._signals(logits, torch.tensor([0]), True)
    p = math.e / (1 + math.e)
    mean = p * math.log(p) + (1 - p) * math.log(1 - p)
    assert float(means) == pytest.approx(mean, abs=1e-6)
    assert float(deviations) == pytest.approx(math.sqrt(p * (1 - p)), abs=1e-6)  # the two log-probabilities differ by 1


def test_rows_with_nothing_to_score_and_broken_models_are_refused(tiny):
    with pytest.raises(InputError, match="row 1 has 3 tokens, 3 of them prompt"):
        token_statistics(tiny.model, [Encoded((5, 6), 1), Encoded((5, 6, 7), 3)], tokenizer=tiny.tokenizer)
    broken = copy.deepcopy(tiny.model)
    next(broken.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match="row 0 has a token whose log-probability is not finite"):
        token_statistics(broken, [Encoded((5, 6), 1)], tokenizer=tiny.tokenizer)


def test_gradient_norms_are_those_of_backward_and_leave_the_model_alone(tiny):
    rows = encoded(tiny, 2)[:2]
    found = gradient_norms(tiny.model, rows)
    for row, norms in zip(rows, found, strict=True):
        model = copy.deepcopy(tiny.model).requires_grad_(True)
        ids = torch.tensor([row.ids])
        model(input_ids=ids, labels=torch.tensor([[-100, -100, *row.ids[2:]]])).loss.backward()
        expected = [float(p.grad.norm()) for p in model.parameters()]
        np.testing.assert_allclose(norms, expected, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in tiny.model.parameters())


def test_gradient_norms_are_had_under_no_grad_too(tiny):
    with torch.no_grad():
        assert gradient_norms(tiny.model, encoded(tiny)[:1])[0][0] > 0


# -- wrong answers ---------------------------------------------------------------------------------


# -- metrics by name -------------------------------------------------------------------------------
