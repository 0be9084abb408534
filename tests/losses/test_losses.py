"""The losses against slow loops, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.losses import LOSSES, METHODS, OPTIONS, options_of, parameters_of
from ray_unlearn.losses.ascent import cross_entropy, gradient_ascent
from ray_unlearn.losses.distillation import kl_divergence, renyi_divergence, undial
from ray_unlearn.losses.preference import dpo, npo, simnpo
from ray_unlearn.losses.representation import adaptive_coefficient, control_vector, hidden_mse, rmu
from ray_unlearn.losses.weighting import Adaptive, Dual, adaptive_weight, dual_step

VOCABULARY = 7
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-6)]


def made(rows, length, dtype=torch.float64, seed=0):
    """Random logits, reference logits, ids of length + 1, and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    ref = 2 * torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    if rows > 2:
        mask[1] = False
    return logits.to(dtype), ref.to(dtype), ids, mask


def picked(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def given(logits, ref, ids, mask):
    """Every tensor that a loss may ask for, by name. Alternatives are the same rows read backwards; the hidden
    states are the logits themselves, and a row's control is the reference's first."""
    back, alt_mask = ids.flip(1), mask.flip(1)
    return {
        "mask": mask,
        "logps": picked(logits, ids),
        "ref_logps": picked(ref, ids),
        "logits": logits[mask],
        "ref_logits": ref[mask],
        "targets": ids[:, 1:][mask],
        "noise": ref[mask],
        "hidden": logits[mask],
        "ref_hidden": ref[mask],
        "control": ref[:, 0],
        "alt_mask": alt_mask,
        "alt_logps": picked(logits, back),
        "alt_ref_logps": picked(ref, back),
    }


def fast_value(name, logits, ref, ids, mask, options):
    tensors = given(logits, ref, ids, mask)
    return LOSSES[name].compute(*(tensors[key] for key in LOSSES[name].tensors), **options)


# -- slow references, one token at a time ----------------------------------------------------------


def log_probability(row, t, v):
    """Log-probability of entry v at position t, from logits as lists."""
    top = max(row[t])
    return row[t][v] - top - math.log(sum(math.exp(x - top) for x in row[t]))


def softmax(scores):
    total = sum(math.exp(x) for x in scores)
    return [math.exp(x) / total for x in scores]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > -30 else -x


class Slow:
    """One batch as lists; `frozen` are the logits wherever a loss takes no gradient."""

    def __init__(self, logits, ref, ids, mask, frozen=None):
        self.logits, self.ref, self.ids, self.mask = (x.tolist() for x in (logits, ref, ids, mask))
        self.frozen = self.logits if frozen is None else frozen.tolist()
        self.rows = range(len(self.ids))

    def shown(self, b):
        return [t for t in range(len(self.mask[b])) if self.mask[b][t]]

    def logp(self, b, t, of=None):
        return log_probability((self.logits if of is None else of)[b], t, self.ids[b][t + 1])

    def by_row(self, token):
        """Mean over rows of each row's mean of token(b, t)."""
        return mean([mean([token(b, t) for t in self.shown(b)]) for b in self.rows])

    def pooled(self, token):
        return mean([token(b, t) for b in self.rows for t in self.shown(b)])

    def dist(self, b, t, of):
        return [log_probability(of[b], t, v) for v in range(VOCABULARY)]

    def cross_entropy(self):
        return self.by_row(lambda b, t: -self.logp(b, t))

    def gradient_ascent(self, bound=math.inf):
        return -mean([min(mean([-self.logp(b, t) for t in self.shown(b)]), bound) for b in self.rows])

    def weighted_ascent(self, beta):
        return self.by_row(lambda b, t: math.exp(self.logp(b, t, self.frozen)) ** beta * self.logp(b, t))

    def satimp(self, beta1, beta2):
        def token(b, t):
            p = math.exp(self.logp(b, t, self.frozen))
            return p**beta1 * (1 - p) ** beta2 * self.logp(b, t)

        return self.by_row(token)

    def logit_margin(self):
        return self.by_row(lambda b, t: (max(self.logits[b][t]) - mean(self.logits[b][t])) ** 2)

    def npo(self, beta, ratio):
        def difference(b, t):
            return self.logp(b, t) - self.logp(b, t, self.ref)

        if ratio == "token":
            return self.pooled(lambda b, t: 2 / beta * minus_log_sigmoid(-beta * difference(b, t)))
        if ratio == "batch":
            return 2 / beta * minus_log_sigmoid(-beta * self.pooled(difference))
        total = {"sum": sum, "mean": mean}[ratio]
        ratios = [total([difference(b, t) for t in self.shown(b)]) for b in self.rows]
        return mean([2 / beta * minus_log_sigmoid(-beta * x) for x in ratios])

    def simnpo(self, beta, delta):
        losses = [mean([-self.logp(b, t) for t in self.shown(b)]) for b in self.rows]
        return mean([2 / beta * minus_log_sigmoid(beta * (loss - delta)) for loss in losses])

    def dpo(self, beta):
        values = []
        for b in self.rows:
            answer = sum(self.logp(b, t) - self.logp(b, t, self.ref) for t in self.shown(b))
            length, back = len(self.mask[b]), self.ids[b][::-1]
            other = sum(
                log_probability(self.logits[b], t, back[t + 1]) - log_probability(self.ref[b], t, back[t + 1])
                for t in range(length)
                if self.mask[b][length - 1 - t]
            )
            values.append(2 / beta * minus_log_sigmoid(beta * (other - answer)))
        return mean(values)

    def kl_divergence(self, direction="reference"):
        def token(b, t):
            pairs = zip(self.dist(b, t, self.ref), self.dist(b, t, self.logits), strict=True)
            if direction == "model":
                return sum(math.exp(m) * (m - r) for r, m in pairs)
            return sum(math.exp(r) * (r - m) for r, m in pairs)

        return self.by_row(token)

    def noise_kl(self):
        return self.kl_divergence()

    def target_kl(self):
        def token(b, t):
            r = self.logp(b, t, self.ref)
            return math.exp(r) * (r - self.logp(b, t))

        return self.pooled(token)

    def renyi_divergence(self, alpha):
        def token(b, t):
            pairs = zip(softmax(self.ref[b][t]), softmax(self.logits[b][t]), strict=True)
            return math.log(sum(r**alpha * m ** (1 - alpha) for r, m in pairs)) / (alpha - 1)

        return self.by_row(token)

    def undial(self, beta):
        def token(b, t):
            target = self.ids[b][t + 1]
            teacher = softmax([x - beta * (v == target) for v, x in enumerate(self.ref[b][t])])
            return -sum(q * m for q, m in zip(teacher, self.dist(b, t, self.logits), strict=True))

        return self.by_row(token)

    def ce_u(self, skip):
        values = []
        for b in self.rows:
            tokens = []
            for t in self.shown(b)[skip:]:
                target = self.ids[b][t + 1]
                p = softmax(self.frozen[b][t])
                rest = sum(x for v, x in enumerate(p) if v != target)
                logs = self.dist(b, t, self.logits)
                tokens.append(-sum(x / rest * logs[v] for v, x in enumerate(p) if v != target))
            values.append(mean(tokens))
        return mean(values)

    def _distance(self, b, t, other):
        return mean([(x - y) ** 2 for x, y in zip(self.logits[b][t], other, strict=True)])

    def rmu(self):
        return self.by_row(lambda b, t: self._distance(b, t, self.ref[b][0]))

    def hidden_mse(self):
        return self.by_row(lambda b, t: self._distance(b, t, self.ref[b][t]))


CASES = [
    ("cross_entropy", {}),
    ("gradient_ascent", {}),
    ("gradient_ascent", {"bound": 2.5}),
    ("weighted_ascent", {"beta": 0.7}),
    ("satimp", {"beta1": 2.0, "beta2": 0.5}),
    ("logit_margin", {}),
    ("npo", {"beta": 0.1, "ratio": "sum"}),
    ("npo", {"beta": 0.7, "ratio": "mean"}),
    ("npo", {"beta": 0.4, "ratio": "batch"}),
    ("npo", {"beta": 0.5, "ratio": "token"}),
    ("simnpo", {"beta": 2.5, "delta": 0.3}),
    ("dpo", {"beta": 0.3}),
    ("kl_divergence", {}),
    ("kl_divergence", {"direction": "model"}),
    ("target_kl", {}),
    ("renyi_divergence", {"alpha": 0.5}),
    ("renyi_divergence", {"alpha": 1.7}),
    ("undial", {"beta": 3.0}),
    ("ce_u", {"skip": 0}),
    ("ce_u", {"skip": 1}),
    ("noise_kl", {}),
    ("rmu", {}),
    ("hidden_mse", {}),
]
POOLED = [("npo", "batch"), ("npo", "token"), ("target_kl", None)]


def test_every_loss_of_the_table_has_a_case():
    assert {name for name, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 7), (3, 5), (5, 3)])
def test_value_equals_the_slow_loop(name, options, dtype, rtol, rows, length):
    logits, ref, ids, mask = made(rows, length, dtype)
    value = fast_value(name, logits, ref, ids, mask, options)
    assert value.shape == () and value.dtype == dtype
    slow = getattr(Slow(logits, ref, ids, mask), name)(**options)
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
            sides.append(getattr(Slow(moved, ref, ids, mask, frozen=start), name)(**options))
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
    chosen = {f"npo_{key}": value for key, value in options.items()}
    if LOSSES[name].pools(chosen):
        assert not torch.isclose(joined, whole, rtol=1e-6)
    else:
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-14)
    assert LOSSES[name].pools(chosen) == ((name, options.get("ratio")) in POOLED)


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


# -- weights that move -----------------------------------------------------------------------------


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


# -- the tables ------------------------------------------------------------------------------------


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
