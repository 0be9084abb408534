"""The losses against slow loops, what they must not depend on, and the loss of a step built of them."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ray_unlearn.config import TrialConfig
from ray_unlearn.data import Encoded, collate
from ray_unlearn.losses import LOSSES, METHODS, RETAIN_TERMS, cross_entropy, gradient_ascent, kl_divergence, npo
from ray_unlearn.trial import step_loss, token_logps

VOCABULARY = 11
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-6)]


def made(rows, length, dtype=torch.float64, seed=0):
    """Random logits, reference logits, ids of length + 1, and a mask with some empty rows."""
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


# -- slow references, one token at a time ----------------------------------------------------------


def log_probability(row, t, v):
    """Log-probability of entry v at position t, from logits as lists."""
    top = max(row[t])
    return row[t][v] - top - math.log(sum(math.exp(x - top) for x in row[t]))


def slow_nll(logits, ids, mask):
    """Per row the mean of -log p over masked tokens, 0 for none."""
    out = []
    for b in range(len(ids)):
        values = [-log_probability(logits[b], t, ids[b][t + 1]) for t in range(len(mask[b])) if mask[b][t]]
        out.append(sum(values) / len(values) if values else 0.0)
    return out


def slow_value(name, logits, ref, ids, mask, options):
    logits, ref, ids, mask = (x.tolist() for x in (logits, ref, ids, mask))
    rows = range(len(ids))
    if name == "cross_entropy":
        per_row = slow_nll(logits, ids, mask)
    elif name == "gradient_ascent":
        per_row = [-min(x, options.get("bound", math.inf)) for x in slow_nll(logits, ids, mask)]
    elif name == "kl_divergence":
        per_row = []
        for b in rows:
            terms = []
            for t in [t for t in range(len(mask[b])) if mask[b][t]]:
                pairs = [(log_probability(ref[b], t, v), log_probability(logits[b], t, v)) for v in range(VOCABULARY)]
                terms.append(sum(math.exp(r) * (r - m) for r, m in pairs))
            per_row.append(sum(terms) / len(terms) if terms else 0.0)
    else:
        beta, per_row = options["beta"], []
        for b in rows:
            shown = [t for t in range(len(mask[b])) if mask[b][t]]
            ratio = sum(
                log_probability(logits[b], t, ids[b][t + 1]) - log_probability(ref[b], t, ids[b][t + 1]) for t in shown
            )
            if options["ratio"] == "mean":
                ratio /= max(1, len(shown))
            per_row.append(2 / beta * math.log1p(math.exp(beta * ratio)))
    return sum(per_row) / len(per_row)


def fast_value(name, logits, ref, ids, mask, options):
    if name == "kl_divergence":
        return kl_divergence(logits, ref, mask)
    if name == "npo":
        return npo(picked(logits, ids), picked(ref, ids), mask, **options)
    return LOSSES[name].compute(picked(logits, ids), mask, **options)


CASES = [
    ("cross_entropy", {}),
    ("gradient_ascent", {}),
    ("gradient_ascent", {"bound": 2.5}),
    ("kl_divergence", {}),
    ("npo", {"beta": 0.1, "ratio": "sum"}),
    ("npo", {"beta": 0.7, "ratio": "mean"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 7), (3, 5), (5, 3)])
def test_value_equals_the_slow_loop(name, options, dtype, rtol, rows, length):
    logits, ref, ids, mask = made(rows, length, dtype)
    value = fast_value(name, logits, ref, ids, mask, options)
    assert value.shape == () and value.dtype == dtype
    assert value.item() == pytest.approx(slow_value(name, logits, ref, ids, mask, options), rel=rtol, abs=rtol)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("rows", "length"), [(1, 3), (5, 3)])
def test_gradient_equals_central_differences_of_the_slow_loop(name, options, rows, length):
    logits, ref, ids, mask = made(rows, length, seed=3)
    mask[0, 0] = True
    logits.requires_grad_(True)
    fast_value(name, logits, ref, ids, mask, options).backward()
    numeric, step = torch.zeros_like(logits), 1e-5
    for index in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape)).tolist():
        sides = []
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved[tuple(index)] += sign * step
            sides.append(slow_value(name, moved, ref, ids, mask, options))
        numeric[tuple(index)] = (sides[0] - sides[1]) / (2 * step)
    assert numeric.abs().max() > 0 or "bound" in options
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-6, atol=1e-9)


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
        (kl_divergence(logits, ref, mask), (p - ref.softmax(-1)) * share),
    ):
        logits.grad = None
        value.backward()
        torch.testing.assert_close(logits.grad, expected, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_content_under_the_mask_changes_neither_value_nor_gradient(name, options):
    logits, ref, ids, mask = made(5, 7, seed=1)
    other_logits, other_ref, other_ids, _ = made(5, 7, seed=2)
    shown = mask[..., None]
    seen = []
    for a, r, i in (
        (logits, ref, ids),
        (
            torch.where(shown, logits, other_logits),
            torch.where(shown, ref, other_ref),
            torch.cat([ids[:, :1], torch.where(mask, ids[:, 1:], other_ids[:, 1:])], 1),
        ),
    ):
        a = a.clone().requires_grad_(True)
        value = fast_value(name, a, r, i, mask, options)
        value.backward()
        assert a.grad[~mask].eq(0).all()
        seen.append((value.detach(), a.grad))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_halves_weighted_by_their_rows_give_the_whole(name, options):
    logits, ref, ids, mask = made(5, 3, seed=4)
    whole = fast_value(name, logits, ref, ids, mask, options)
    parts = [fast_value(name, *(x[cut] for x in (logits, ref, ids, mask)), options) for cut in (slice(2), slice(2, 5))]
    torch.testing.assert_close(whole, (2 * parts[0] + 3 * parts[1]) / 5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["cross_entropy", "gradient_ascent", "kl_divergence", "npo"])
def test_a_batch_without_any_masked_token_is_finite_and_pushes_nothing(name):
    logits, ref, ids, mask = made(2, 3)
    logits.requires_grad_(True)
    options = {"beta": 0.1, "ratio": "mean"} if name == "npo" else {}
    value = fast_value(name, logits, ref, ids, torch.zeros_like(mask), options)
    value.backward()
    assert math.isfinite(value.item()) and logits.grad.eq(0).all()


# -- laws of single losses -------------------------------------------------------------------------


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


def test_kl_weighs_by_the_reference():
    p_ref, p = torch.tensor([[0.5, 0.499, 0.001], [0.9, 0.05, 0.05]], dtype=torch.float64)
    value = kl_divergence(p.log()[None, None], p_ref.log()[None, None], torch.tensor([[True]])).item()
    forward = float((p_ref * (p_ref.log() - p.log())).sum())
    backward = float((p * (p.log() - p_ref.log())).sum())
    assert abs(forward - backward) > 0.1
    assert value == pytest.approx(forward, rel=1e-9)


def test_kl_of_equal_models_is_zero_with_zero_gradient():
    logits = made(2, 3)[0].requires_grad_(True)
    value = kl_divergence(logits, logits.detach().clone(), torch.ones(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and logits.grad.abs().max() < 1e-12


def test_every_method_names_losses_that_exist():
    for name, method in METHODS.items():
        assert {method.forget, *method.retain} <= set(LOSSES), name
        assert set(method.parameters) <= set(TrialConfig.__dataclass_fields__), name
        assert method.needs_reference(True, False) == (method.forget == "npo")
        assert method.needs_reference(False, True) == ("kl_divergence" in method.retain)
        assert set(method.retain) <= set(RETAIN_TERMS), name
    for name, loss in LOSSES.items():
        assert set(loss.options.values()) <= set(TrialConfig.__dataclass_fields__), name


# -- the loss of a step ----------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """A causal bigram model: logits depend on this token and the one before, nothing on padding after them."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.before = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, input_ids, attention_mask, use_cache):
        assert attention_mask.shape == input_ids.shape and use_cache is False
        before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], 1)
        return SimpleNamespace(logits=self.table[input_ids] + self.before[before])


class FakeEngine:
    def __init__(self):
        self.module = Toy(1)

    def __call__(self, **inputs):
        return self.module(**inputs)


class FakeTuned:
    def __init__(self):
        self.base, self.asked = Toy(2), 0

    @contextmanager
    def reference(self, model):
        self.asked += 1
        with torch.no_grad():
            yield self.base


OPTIONS = {
    "forget_weight": 0.7, "retain_weight": 1.3, "kl_weight": 2.1, "npo_beta": 0.3, "ascent_bound": 2.4,
    "forget_on": "document", "retain_on": "answer",
}  # fmt: skip


def made_rows(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randint(3, 9)
        rows.append(Encoded(tuple(rng.randrange(VOCABULARY) for _ in range(length)), rng.randint(1, length - 1)))
    return rows


def plain_parts(config, model, base, forget, retain):
    """The parts of a method's loss, row by row without padding or batching."""

    def row(module, encoded):
        ids = torch.tensor([encoded.ids])
        return module(ids, torch.ones_like(ids), False).logits[0, :-1].log_softmax(-1), ids[0, 1:]

    def tokens(encoded, on):
        return range(encoded.prompt - 1 if on == "answer" else 0, len(encoded.ids) - 1)

    def ce(encoded, on):
        logp, target = row(model, encoded)
        return -torch.stack([logp[t, target[t]] for t in tokens(encoded, on)]).mean()

    parts, method = {}, METHODS[config.method]
    if forget and method.forget == "npo":
        values = []
        for encoded in forget:
            (logp, target), (ref, _) = row(model, encoded), row(base, encoded)
            ratios = [logp[t, target[t]] - ref[t, target[t]] for t in tokens(encoded, config.forget_on)]
            ratio = torch.stack(ratios).sum() if config.npo_ratio == "sum" else torch.stack(ratios).mean()
            values.append(2 / config.npo_beta * torch.log1p(torch.exp(config.npo_beta * ratio)))
        parts["forget"] = torch.stack(values).mean()
    elif forget:
        bound = math.inf if config.ascent_bound is None else config.ascent_bound
        parts["forget"] = -torch.stack([ce(encoded, config.forget_on).clamp(max=bound) for encoded in forget]).mean()
    if retain and "cross_entropy" in method.retain:
        parts["retain"] = torch.stack([ce(encoded, config.retain_on) for encoded in retain]).mean()
    if retain and "kl_divergence" in method.retain:
        values = []
        for encoded in retain:
            (logp, _), (ref, _) = row(model, encoded), row(base, encoded)
            values.append((ref.exp() * (ref - logp)).sum(-1).mean())
        parts["kl"] = torch.stack(values).mean()
    return parts


def total(config, parts):
    scale = {"forget": config.forget_weight, "retain": config.retain_weight, "kl": config.kl_weight}
    return sum(scale[name] * part for name, part in parts.items())


@pytest.mark.parametrize("ratio", ["sum", "mean"])
@pytest.mark.parametrize("method", METHODS)
def test_step_loss_is_the_weighted_sum_of_the_methods_terms(method, ratio):
    config = TrialConfig(method=method, npo_ratio=ratio, **OPTIONS)
    engine, tuned = FakeEngine(), FakeTuned()
    rows = made_rows(7)
    loss, shown = step_loss(engine, tuned, config, collate(rows, 0), 3, (1.0, 1.0))
    loss.backward()
    assert tuned.base.table.grad is None  # the reference is never trained
    gradient = engine.module.table.grad.clone()
    engine.module.zero_grad()
    parts = plain_parts(config, engine.module, tuned.base, rows[:3], rows[3:])
    expected = total(config, parts)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(shown) == {"loss", *parts}
    for name, part in parts.items():
        assert shown[name] == pytest.approx(part.item(), rel=1e-5)
    torch.testing.assert_close(gradient, engine.module.table.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_forget_rows_give_only_the_forget_term(method):
    config = TrialConfig(method=method, **OPTIONS)
    engine, tuned, rows = FakeEngine(), FakeTuned(), made_rows(3)
    loss, shown = step_loss(engine, tuned, config, collate(rows, 0), 3, (1.0, 0.0))
    expected = total(config, plain_parts(config, engine.module, tuned.base, rows, []))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and set(shown) == {"loss", "forget"}
    assert tuned.asked == (method.startswith("npo"))  # no reference pass that no term needs


@pytest.mark.parametrize("method", METHODS)
def test_repair_descends_on_the_retain_terms_and_by_cross_entropy_where_there_are_none(method):
    config = TrialConfig(method=method, **OPTIONS)
    engine, tuned, rows = FakeEngine(), FakeTuned(), made_rows(3)
    loss, shown = step_loss(engine, tuned, config, collate(rows, 0), 0, (0.0, 1.0), repair=True)
    stand_in = "grad_diff" if not METHODS[method].retain else method
    parts = plain_parts(TrialConfig(method=stand_in, **OPTIONS), engine.module, tuned.base, [], rows)
    expected = sum(parts.values()) if not METHODS[method].retain else total(config, parts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(shown) == {"loss", *parts} and "forget" not in shown


@pytest.mark.parametrize("method", METHODS)
def test_an_idle_batch_weighs_nothing_but_reaches_every_parameter(method):
    engine, tuned = FakeEngine(), FakeTuned()
    batch = collate(made_rows(1), 0)
    loss, shown = step_loss(engine, tuned, TrialConfig(method=method), batch, 0, (0.0, 0.0), idle=True)
    loss.backward()
    assert loss.item() == 0 and shown["loss"] == 0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in engine.module.parameters())


@pytest.mark.parametrize(("num_forget", "num_retain", "shares"), [(4, 4, 2), (3, 5, 3), (1, 7, 2), (2, 2, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_shares_weighted_by_their_rows_average_to_the_whole_batch(method, num_forget, num_retain, shares):
    """The weighting that a trial's step uses, whatever falls on a share: both kinds, one kind, or nothing."""
    config = TrialConfig(method=method, **OPTIONS)
    engine, tuned = FakeEngine(), FakeTuned()
    forget, retain = made_rows(num_forget, 1), made_rows(num_retain, 2)
    whole, _ = step_loss(engine, tuned, config, collate(forget + retain, 0), num_forget, (1.0, 1.0))
    losses = []
    for slot in range(shares):
        mine = forget[slot::shares], retain[slot::shares]
        weights = len(mine[0]) * shares / num_forget, len(mine[1]) * shares / num_retain
        idle = not (mine[0] or mine[1])
        batch = collate(mine[0] + mine[1] or retain[:1], 0)
        losses.append(step_loss(engine, tuned, config, batch, len(mine[0]), weights, idle=idle)[0])
    torch.testing.assert_close(sum(losses) / shares, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_padding_id_and_padding_length_change_nothing(method):
    config = TrialConfig(method=method, **OPTIONS)
    engine, tuned, rows = FakeEngine(), FakeTuned(), made_rows(4, 5)
    losses = [step_loss(engine, tuned, config, collate(rows, pad), 2, (1.0, 1.0))[0] for pad in (0, 1, VOCABULARY - 1)]
    assert losses[0].item() == losses[1].item() == losses[2].item()
    # Beside a far longer row the padding is longer; per-row sums must not notice.
    long = Encoded(tuple(random.Random(0).randrange(VOCABULARY) for _ in range(40)), 3)
    alone = [step_loss(engine, tuned, config, collate([r], 0), 1, (1.0, 0.0))[0] for r in (rows[0], long)]
    together = step_loss(engine, tuned, config, collate([rows[0], long], 0), 2, (1.0, 0.0))[0]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=0)


def test_token_logps_pairs_each_position_with_the_next_token():
    logits, _, ids, _ = made(3, 4)
    found = token_logps(logits, ids)
    for b in range(3):
        for t in range(4):
            expected = log_probability(logits[b].tolist(), t, int(ids[b, t + 1]))
            assert found[b, t].item() == pytest.approx(expected, rel=1e-12)
