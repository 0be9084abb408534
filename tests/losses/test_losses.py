"""The losses against slow loops, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from slow_losses import CASES, POOLED, PRECISIONS, Slow, fast_value, made

from ray_unlearn.losses import LOSSES

# -- slow references, one token at a time ----------------------------------------------------------


def test_every_loss_of_the_table_has_a_case():
    assert {name for name, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 7), (3, 5), (5, 3)])
def test_value_equals_the_slow_loop(name, options, dtype, rtol, rows, length):
    logits, ref, ids, mask = made(rows, length, dtype)
    value = fast_value(name, logits, ref, ids, mask, options)
    assert value.shape == () and value.dtype == dtype
    slow = Slow(logits, ref, ids, mask).value(name, options)
    assert value.item() == pytest.approx(slow, rel=rtol, abs=rtol)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("rows", "length"), [(1, 3), (4, 3)])
def test_gradient_equals_central_differences_of_the_slow_loop(name, options, rows, length):
    logits, ref, ids, mask = made(rows, length, seed=3)
    mask[0, :2] = True
    logits.requires_grad_(True)
    fast_value(name, logits, ref, ids, mask, options).backward()
    start = logits.detach()
    numeric, step = torch.zeros_like(start), 1e-5
    for index in torch.cartesian_prod(*(torch.arange(n) for n in start.shape)).tolist():
        sides = []
        for sign in (1, -1):
            moved = start.clone()
            moved[tuple(index)] += sign * step
            sides.append(Slow(moved, ref, ids, mask, frozen=start).value(name, options))
        numeric[tuple(index)] = (sides[0] - sides[1]) / (2 * step)
    assert numeric.abs().max() > 1e-6 or "bound" in options
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradient_in_float32_is_that_in_float64(name, options):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        logits, ref, ids, mask = made(4, 5, seed=8)
        logits = logits.to(torch.float32).to(dtype).requires_grad_(True)
        fast_value(name, logits, ref.to(torch.float32).to(dtype), ids, mask, options).backward()
        gradients.append(logits.grad.double())
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize(("name", "options"), CASES)
def test_content_under_the_mask_changes_neither_value_nor_gradient(name, options):
    """What stands under padding, and how much of it there is, must not be seen."""
    logits, ref, ids, mask = made(5, 7, seed=1)
    if name == "dpo":  # its alternatives are read under the mirrored mask
        mask = mask | mask.flip(1)
    if name == "rmu":
        mask[:, 0] = True  # the test's control vectors stand at the first position
    other_logits, other_ref, other_ids, _ = made(5, 7, seed=2)
    keep = mask[..., None]
    ids_shown = torch.cat([ids[:, :1], torch.where(mask, ids[:, 1:], other_ids[:, 1:])], 1)
    if name == "dpo":
        ids_shown = ids
    seen = []
    for a, r, i in (
        (logits, ref, ids),
        (torch.where(keep, logits, other_logits), torch.where(keep, ref, other_ref), ids_shown),
    ):
        a = a.clone().requires_grad_(True)
        value = fast_value(name, a, r, i, mask, options)
        value.backward()
        assert a.grad[~mask].eq(0).all()
        seen.append((value.detach(), a.grad))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "dpo"])
def test_longer_padding_changes_nothing(name, options):
    logits, ref, ids, mask = made(4, 5, seed=9)
    more = made(4, 3, seed=10)
    longer = (
        torch.cat([logits, more[0]], 1),
        torch.cat([ref, more[1]], 1),
        torch.cat([ids, more[2][:, :3]], 1),
        torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
    )
    short = fast_value(name, logits, ref, ids, mask, options)
    torch.testing.assert_close(fast_value(name, *longer, options), short, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_halves_weighted_by_their_rows_give_the_whole_unless_the_loss_pools(name, options):
    logits, ref, ids, mask = made(5, 3, seed=4)
    mask[:2] = True
    mask[2:, 1:] = False
    mask[2:, 0] = True
    whole = fast_value(name, logits, ref, ids, mask, options)
    halves = slice(2), slice(2, 5)
    parts = [fast_value(name, *(x[cut] for x in (logits, ref, ids, mask)), options) for cut in halves]
    joined = (2 * parts[0] + 3 * parts[1]) / 5
    chosen = {f"npo_{key}": value for key, value in options.items()} | {"pool_tokens": options.get("pool", False)}
    if LOSSES[name].pools(chosen):
        assert not torch.isclose(joined, whole, rtol=1e-6)
    else:
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-14)
    assert LOSSES[name].pools(chosen) == (options.get("pool", False) or (name, options.get("ratio")) in POOLED)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_batch_without_any_masked_token_is_finite_and_pushes_nothing(name, options):
    logits, ref, ids, mask = made(2, 3)
    logits.requires_grad_(True)
    value = fast_value(name, logits, ref, ids, torch.zeros_like(mask), options)
    value.backward()
    assert math.isfinite(value.item()) and (logits.grad is None or logits.grad.eq(0).all())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_of_the_reference_gets_no_gradient_it_does_not_need(name, options):
    """The model's side alone is trained: with the reference detached nothing of the gradient is lost."""
    grads = []
    for detached in (False, True):
        logits, ref, ids, mask = made(4, 5, seed=11)
        logits.requires_grad_(True)
        ref.requires_grad_(not detached)
        fast_value(name, logits, ref, ids, mask, options).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


# -- laws of single losses -------------------------------------------------------------------------


# -- weights that move -----------------------------------------------------------------------------


# -- the tables ------------------------------------------------------------------------------------
