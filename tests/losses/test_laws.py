"""What each loss alone must do, the weights that move, and the tables."""

from __future__ import annotations

import math

import pytest
import torch
from slow_losses import PRECISIONS, VOCABULARY, made, picked

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.losses import LOSSES, METHODS, OPTIONS, options_of, parameters_of
from ray_unlearn.losses.ascent import cross_entropy, gradient_ascent
from ray_unlearn.losses.distillation import kl_divergence, renyi_divergence, undial
from ray_unlearn.losses.preference import dpo, npo, simnpo
from ray_unlearn.losses.representation import adaptive_coefficient, control_vector, hidden_mse, rmu
from ray_unlearn.losses.weighting import Adaptive, Dual, adaptive_weight, dual_step


@pytest.mark.parametrize("dtype_rtol", PRECISIONS)
def test_gradient_of_cross_entropy_and_kl_is_the_formula(dtype_rtol):
    """d CE / d logits = (p - onehot) / n per row; d KL(ref || model) / d logits = (p - p_ref) / n."""
    dtype, rtol = dtype_rtol
    logits, ref, ids, mask = made(4, 5, dtype, seed=5)
    logits.requires_grad_(True)
    share = (mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1) / len(ids))[..., None]
    p = logits.detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(ids[:, 1:], VOCABULARY).to(dtype)
    for value, expected in (
        (cross_entropy(picked(logits, ids), mask), (p - onehot) * share),
        (kl_divergence(logits[mask], ref[mask], mask), (p - ref.softmax(-1)) * share),
    ):
        logits.grad = None
        value.backward()
        torch.testing.assert_close(logits.grad, expected, rtol=10 * rtol, atol=rtol)


def test_long_rows_weigh_more_where_tokens_are_pooled():
    """Rows of 4 and 60 tokens with losses of 3.0 and 0.5 nats: Atyaephyra's `-retain_logprob.mean()` is 0.656."""
    mask = torch.arange(60) < torch.tensor([[4], [60]])
    logps = torch.tensor([[-3.0], [-0.5]]).expand(2, 60)
    assert cross_entropy(logps, mask).item() == pytest.approx(1.75)
    assert cross_entropy(logps, mask, pool=True).item() == pytest.approx((4 * 3.0 + 60 * 0.5) / 64) == 0.65625
    assert cross_entropy(logps, mask, pool=True) == -logps[mask].mean()


def test_ascent_stops_pushing_the_rows_above_the_bound_and_only_those():
    logps = torch.tensor([[-1.0, -3.0], [-4.0, -6.0], [-2.9, -2.9]], dtype=torch.float64, requires_grad=True)
    value = gradient_ascent(logps, torch.ones(3, 2, dtype=torch.bool), bound=3.0)
    value.backward()
    assert value.item() == pytest.approx(-(2.0 + 3.0 + 2.9) / 3)
    assert logps.grad.tolist() == [[pytest.approx(1 / 6)] * 2, [0, 0], [pytest.approx(1 / 6)] * 2]


def test_descent_on_gradient_ascent_lowers_the_likelihood():
    logps = torch.tensor([[-1.0]], requires_grad=True)
    gradient_ascent(logps, torch.tensor([[True]])).backward()
    assert logps.grad.item() > 0  # a step against it makes the token less probable


def test_npo_gradient_tends_to_ascent_on_the_summed_log_likelihood():
    logits, ref, ids, mask = made(4, 5, seed=6)
    logps, ref_logps = picked(logits, ids).requires_grad_(True), picked(ref, ids)
    (limit,) = torch.autograd.grad(torch.where(mask, logps, 0.0).sum(1).mean(), logps)
    errors = []
    for beta in (1e-1, 1e-3, 1e-6):
        (gradient,) = torch.autograd.grad(npo(logps, ref_logps, mask, beta), logps)
        errors.append((gradient - limit).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_npo_mean_ratio_is_the_sum_ratio_over_the_token_count():
    logps = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64)
    ref = torch.tensor([[-2.0, -4.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    assert npo(logps, ref, mask, 0.5, "sum").item() == pytest.approx(4 * math.log1p(math.exp(0.5 * 3)))
    assert npo(logps, ref, mask, 0.5, "mean").item() == pytest.approx(4 * math.log1p(math.exp(0.5 * 1.5)))


def test_npo_of_the_reference_itself_is_two_log_two_over_beta_and_extremes_stay_finite():
    mask = torch.ones(1, 2, dtype=torch.bool)
    same = torch.full((1, 2), -3.0)
    assert npo(same, same, mask, 0.1).item() == pytest.approx(20 * math.log(2))
    for shift in (-1e4, 1e4):
        moved = (same + shift).requires_grad_(True)
        value = npo(moved, same, mask, 1.0)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(moved.grad).all()


def test_npo_of_one_row_of_one_token_is_the_same_by_every_ratio():
    logits, ref, ids, _ = made(1, 1)
    tensors = picked(logits, ids), picked(ref, ids), torch.ones(1, 1, dtype=torch.bool)
    assert len({round(npo(*tensors, 0.3, ratio).item(), 12) for ratio in ("sum", "mean", "batch", "token")}) == 1


def test_simnpo_falls_as_the_loss_rises_and_its_margin_shifts_it():
    mask = torch.ones(1, 2, dtype=torch.bool)
    values = [simnpo(torch.full((1, 2), -x), mask, 2.0).item() for x in (0.0, 1.0, 5.0)]
    assert values[0] == pytest.approx(math.log(2)) and values[0] > values[1] > values[2] > 0
    assert simnpo(torch.full((1, 2), -3.0), mask, 2.0, 1.0).item() == pytest.approx(
        simnpo(torch.full((1, 2), -2.0), mask, 2.0, 0.0).item()
    )


def test_dpo_prefers_the_alternative():
    mask = torch.ones(1, 1, dtype=torch.bool)
    answer, other = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    zero = torch.zeros(1, 1)
    dpo(answer, zero, mask, other, zero, mask).backward()
    assert answer.grad.item() > 0 > other.grad.item()


def test_kl_weighs_by_the_reference_or_by_the_model():
    p_ref, p = torch.tensor([[0.5, 0.499, 0.001], [0.9, 0.05, 0.05]], dtype=torch.float64)
    shown = torch.tensor([[True]])
    forward = float((p_ref * (p_ref.log() - p.log())).sum())
    backward = float((p * (p.log() - p_ref.log())).sum())
    assert abs(forward - backward) > 0.1
    assert kl_divergence(p.log()[None], p_ref.log()[None], shown).item() == pytest.approx(forward, rel=1e-9)
    assert kl_divergence(p.log()[None], p_ref.log()[None], shown, "model").item() == pytest.approx(backward, rel=1e-9)


@pytest.mark.parametrize("loss", [kl_divergence, renyi_divergence, hidden_mse])
def test_a_divergence_of_equal_models_is_zero_with_zero_gradient(loss):
    mask = torch.ones(2, 3, dtype=torch.bool)
    logits = made(2, 3)[0][mask].requires_grad_(True)
    value = loss(logits, logits.detach().clone(), mask)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and logits.grad.abs().max() < 1e-12


def test_renyi_tends_to_kl_as_its_order_tends_to_one():
    logits, ref, _, mask = made(3, 4)
    kl = kl_divergence(logits[mask], ref[mask], mask).item()
    gaps = [abs(renyi_divergence(logits[mask], ref[mask], mask, alpha).item() - kl) for alpha in (0.9, 0.99, 0.9999)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3 * kl


def test_undial_at_its_minimum_is_the_lowered_reference():
    _, ref, ids, mask = made(2, 3)
    targets = ids[:, 1:][mask]
    lowered = (ref[mask] - 4.0 * torch.nn.functional.one_hot(targets, VOCABULARY)).requires_grad_(True)
    undial(lowered, ref[mask], targets, mask, 4.0).backward()
    assert lowered.grad.abs().max() < 1e-12


def test_ce_u_raises_no_logit_of_the_target_and_keeps_the_order_of_the_others():
    logits, _, ids, mask = made(2, 4, seed=2)
    targets = ids[:, 1:][mask]
    packed = logits[mask].requires_grad_(True)
    LOSSES["ce_u"].compute(packed, targets, mask, skip=0).backward()
    at_target = packed.grad.gather(-1, targets[:, None])
    assert at_target.gt(0).all()  # descent lowers it
    assert packed.grad.scatter(-1, targets[:, None], 0.0).le(1e-12).all()


def test_a_control_vector_is_a_unit_vector_of_the_positive_orthant_and_the_seed_decides_it():
    a, b = (control_vector(64, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert a.norm().item() == pytest.approx(1, rel=1e-6) and a.ge(0).all() and not torch.equal(a, b)
    assert torch.equal(a, control_vector(64, torch.Generator().manual_seed(1)))
    hidden = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert adaptive_coefficient(hidden, 2.0) == pytest.approx(6.0)


def test_rmu_counts_each_row_once_whatever_the_batch():
    """Per-row sums [B] divided by counts [B,1] would broadcast to [B,B]: right for one row only."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    hidden = torch.tensor([[1.0], [1.0], [1.0], [3.0]])
    control = torch.zeros(2, 1)
    assert rmu(hidden, control, mask).item() == pytest.approx((1.0 + 9.0) / 2)


def test_a_dual_step_raises_the_multiplier_above_epsilon_and_never_goes_below_zero():
    assert dual_step(1.0, 0.5, 0.2, 2.0) == pytest.approx(1.6)
    assert dual_step(0.1, 0.0, 0.2, 2.0) == 0.0
    state = Dual(1.0, {"pdu_epsilon": 0.2, "pdu_rate": 2.0, "pdu_warmup_epochs": 1})
    state.update(0, 9.0)
    assert state.weight == 1.0
    state.update(1, 0.5)
    assert state.weight == pytest.approx(1.6)


@pytest.mark.parametrize(("excess", "weight"), [(-1, 1.2), (0, 1.2), (0.3, 1.3), (0.5, 1.5), (0.8, 2.1), (2, 2.3)])
def test_the_adaptive_weight_is_the_published_formula(excess, weight):
    assert adaptive_weight(excess) == pytest.approx(weight)
    assert 1.2 <= adaptive_weight(1e6) <= 2.3


def test_the_adaptive_baseline_is_the_mean_over_the_first_epochs_steps():
    state = Adaptive(1.2, {"adaptive_max": 2.3})
    for loss in (1.0, 2.0, 3.0):
        state.update(0, loss)
        assert state.weight == 1.2
    state.update(1, 2.5)
    assert state.weight == adaptive_weight(0.5)
    state.update(1, 1.0)
    assert state.weight == 1.2


def test_every_method_names_losses_and_options_that_exist_and_has_a_source():
    for name, method in METHODS.items():
        assert {method.forget, *method.retain} <= set(LOSSES) and method.source and method.formula, name
        assert set(options_of(name)) <= set(OPTIONS)
        assert set(parameters_of(name)) <= set(OPTIONS) | set(TrialConfig.__dataclass_fields__), name
        assert TrialConfig(method=name).options == {key: OPTIONS[key].default for key in options_of(name)}
    used = {key for name in METHODS for key in options_of(name)}
    assert used == set(OPTIONS)
    for name, option in OPTIONS.items():
        assert name not in TrialConfig.__dataclass_fields__ and option.meaning
