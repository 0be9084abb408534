"""A trial's rows: tokenised, with references and alternatives, grouped and dealt to steps."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch
from made_rows import PAD, FakeEngine, OneWorker, batch_for, some_rows

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.tokens import Encoded, encode
from ray_unlearn.errors import InputError
from ray_unlearn.losses import METHODS, losses_of
from ray_unlearn.records import Example
from ray_unlearn.training.dataloader import (
    PASS_TOKENS,
    REFUSALS,
    TrainingRow,
    TrialData,
    length_groups,
    make_trial_data,
)
from ray_unlearn.training.loop import _share_loss, _train_step
from ray_unlearn.training.schedule import Step
from ray_unlearn.training.step_loss import TrialLoss


class FakeBench:
    def __init__(self, tiny):
        self.model, self.tokenizer, self.limit, self.known = tiny.model, tiny.tokenizer, 256, {}

    def encoded(self, key, make):
        return self.known.setdefault(key, None) or self.known.update({key: make()}) or self.known[key]


def examples(tiny, split, count=4, **more):
    rows = getattr(tiny.data, split)[:count]
    return [
        Example(id=row["id"], input=row["input"], output=row["output"], task=row["task"], kind="qa", **more)
        for row in rows
    ]


class Store:
    """What a search shares between its trials; it counts how often something is made."""

    def __init__(self):
        self.values, self.made = {}, []

    def __call__(self, name, make):
        if name not in self.values:
            self.made.append(name)
            self.values[name] = make()
        return self.values[name]


def test_the_reference_pass_is_paid_once_and_is_the_adapter_switched_off(tiny, prepare):
    config = TrialConfig(method="npo_target_kl_ce", lora_rank=2)
    store, bench = Store(), FakeBench(tiny)
    forget, retain = examples(tiny, "forget"), examples(tiny, "retain")
    feed = make_trial_data(config, forget, retain, bench, store)
    make_trial_data(TrialConfig(method="npo_target_kl_ce", seed=5), forget, retain, bench, store)
    assert len(store.made) == 2  # forget and retain rows, whatever the number of trials
    engine, tuned = prepare(config)
    for (row,) in [*feed.forget, *feed.retain]:
        ids = torch.tensor([row.tokens.ids])
        with tuned.reference(engine.module) as model:
            logits = model(input_ids=ids).logits[0, :-1]
        torch.testing.assert_close(row.reference, logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    nothing = Store()
    make_trial_data(TrialConfig(method="ascent_kl_ce"), forget, retain, bench, nothing)
    assert nothing.made == []  # full logits of the reference come from the adapter switched off, in the step


def test_refusals_are_drawn_by_the_seed_and_end_in_eos(tiny):
    forget, retain, bench = examples(tiny, "forget"), examples(tiny, "retain"), FakeBench(tiny)
    drawn = []
    for seed in (0, 0, 1):
        feed = make_trial_data(TrialConfig(method="idk_dpo", seed=seed), forget, retain, bench, Store())
        texts = []
        for row, other in feed.forget:
            assert other.split == "alternative" and other.tokens.ids[-1] == tiny.tokenizer.eos_token_id
            assert row.tokens.ids[: row.tokens.prompt] == other.tokens.ids[: other.tokens.prompt]
            texts.append(tiny.tokenizer.decode(other.tokens.ids[other.tokens.prompt : -1]).strip())
        assert set(texts) <= set(REFUSALS)
        drawn.append(texts)
    assert drawn[0] == drawn[1] != drawn[2]


def test_alternatives_come_with_the_data_or_the_method_is_refused(tiny):
    retain, bench = examples(tiny, "retain"), FakeBench(tiny)
    config = TrialConfig(method="alt_po")
    feed = make_trial_data(config, examples(tiny, "forget", alternate="another"), retain, bench, Store())
    (_, other), *_ = feed.forget
    expected = encode(tiny.tokenizer, examples(tiny, "forget")[0].input, "another", eos=True)
    assert other.tokens == expected
    with pytest.raises(InputError, match="column `alternate`: 4 of 4 rows have none"):
        make_trial_data(config, examples(tiny, "forget"), retain, bench, Store())


@pytest.mark.parametrize(("forget_eos", "retain_eos"), [(False, True), (False, False), (True, True)])
def test_rows_end_in_eos_where_the_configuration_says_so(tiny, forget_eos, retain_eos):
    config = TrialConfig(method="grad_diff", forget_eos=forget_eos, retain_eos=retain_eos)
    data = make_trial_data(config, examples(tiny, "forget"), examples(tiny, "retain"), FakeBench(tiny), Store())
    for units, eos in ((data.forget, forget_eos), (data.retain, retain_eos)):
        assert all((row.tokens.ids[-1] == tiny.tokenizer.eos_token_id) == eos for (row,) in units)


def units_of(*lengths):
    """Units of the given rows' lengths; every row's tokens are its unit's number."""
    return [
        [
            TrainingRow("forget", Encoded(tuple([number] * length), 1))
            for length in ([unit] if isinstance(unit, int) else unit)
        ]
        for number, unit in enumerate(lengths)
    ]


def cost_of(groups):
    return sum(PASS_TOKENS + len(group) * max(len(row.tokens.ids) for row in group) for group in groups)


@pytest.mark.parametrize("seed", range(12))
def test_groups_cost_least_of_all_contiguous_groupings_keep_pairs_and_lose_no_row(seed):
    rng = random.Random(seed)
    units = units_of(*(rng.choice([rng.randint(4, 300), (rng.randint(4, 90), rng.randint(4, 90))]) for _ in range(7)))
    groups = length_groups(units, together=False)
    assert sorted(id(row) for group in groups for row in group) == sorted(id(row) for unit in units for row in unit)
    for unit in units:
        assert sum(unit[0] in group for group in groups) == 1
        assert all((unit[0] in group) == (unit[-1] in group) for group in groups)
    ordered = sorted(units, key=lambda unit: max(len(row.tokens.ids) for row in unit))
    best = min(
        cost_of([[row for unit in ordered[a:b] for row in unit] for a, b in pairwise((0, *cuts, len(ordered)))])
        for count in range(len(ordered))
        for cuts in combinations(range(1, len(ordered)), count)
    )
    assert cost_of(groups) == best


def test_rows_that_must_stay_together_do_in_their_order_and_no_rows_are_one_empty_group():
    units = units_of(10, (30, 4), 12, 290)
    assert [[row.tokens.ids[0] for row in group] for group in length_groups(units, together=True)] == [[0, 1, 1, 2, 3]]
    assert [row.tokens.ids[0] for row in length_groups(units, together=False)[-1]] == [3]
    assert length_groups([], together=False) == length_groups([], together=True) == [[]]


def test_a_step_deals_its_rows_to_slots():
    units = [[TrainingRow("forget", Encoded((n, n), 1))] for n in range(6)]
    feed = TrialData(units, units)
    step = Step("forget", 0, (0, 1, 2), (4, 5), 1e-3, True)
    assert [[u[0].tokens.ids[0] for u in feed.units(step, slot, 2)] for slot in (0, 1)] == [[0, 2, 4], [1, 5]]


def test_the_methods_that_need_a_reference_pass_are_those_of_full_distributions_and_hidden_states():
    needing = {name for name in METHODS if any(loss.needs_reference for loss in losses_of(name))}
    assert needing == {
        "kl_ascent", "ascent_kl_ce", "npo_kl_ce", "npo_renyi_ce", "undial", "dual_teacher", "rmu",
    }  # fmt: skip


def test_max_length_cuts_rows_and_alternatives_alike(tiny):
    limit = 2 + max(
        len(tiny.tokenizer(row["input"])["input_ids"]) for row in tiny.data.forget[:4] + tiny.data.retain[:4]
    )
    config = TrialConfig(method="alt_po", max_length=limit)
    forget, retain = examples(tiny, "forget", alternate="another " * 90), examples(tiny, "retain")
    feed = make_trial_data(config, forget, retain, FakeBench(tiny), Store())
    assert all(len(row.tokens.ids) <= limit for unit in [*feed.forget, *feed.retain] for row in unit)
    assert all(len(other.tokens.ids) == limit for _, other in feed.forget)


class StepEngine(FakeEngine):
    """An engine that only keeps gradients."""

    def backward(self, loss):
        (loss / self.micro_batches).backward()

    def step(self, learning_rate):
        return 0.0


@pytest.mark.parametrize("method", ["npo_kl_ce", "pdu", "grad_diff_adaptive", "idk_dpo"])
def test_a_steps_parts_are_means_over_all_its_rows_and_its_gradient_is_theirs(tiny, prepare, method):
    """Micro-batches, like ranks, must not show: a weight that follows the retain loss moves once, by the whole step."""
    rows = batch_for(tiny, method, 4, 5)
    units = [[row] for row in rows if row.split == "forget"]
    for unit, other in zip(units, [row for row in rows if row.split == "alternative"], strict=False):
        unit.append(other)
    feed = TrialData(units, [[row] for row in rows if row.split == "retain"])
    step = Step("forget", 1, (0, 1, 2, 3), (0, 1, 2, 3, 4), 1e-3, True)
    seen = []
    for micro_batches in (1, 2, 3):
        config = TrialConfig(method=method, lora_rank=2, micro_batches=micro_batches)
        _, tuned = prepare(config)
        engine = StepEngine(tuned.model)
        engine.micro_batches = micro_batches
        objective = TrialLoss(config, tuned, PAD)
        objective.update(0, {"retain": 0.05})
        parts, _ = _train_step(engine, objective, step, feed, OneWorker())
        objective.update(step.epoch, parts)
        gradient = torch.cat([p.grad.flatten() for p in tuned.model.parameters() if p.requires_grad])
        seen.append((parts, objective.weighting.weight, gradient))
        tuned.release()
    for parts, weight, gradient in seen[1:]:
        assert parts == pytest.approx(seen[0][0], rel=1e-4)
        assert weight == pytest.approx(seen[0][1], rel=1e-5)
        torch.testing.assert_close(gradient, seen[0][2], rtol=1e-3, atol=1e-5)
    if METHODS[method].weighting != "fixed":
        assert seen[0][1] != 1.0  # it did move


@pytest.mark.parametrize(("phase", "descends"), [("forget", False), ("repair", True)])
def test_retain_rows_alone_are_descended_on_in_a_repair_and_not_in_a_mixed_batch_of_a_method_without_retain(
    tiny, prepare, phase, descends
):
    config = TrialConfig(method="grad_ascent", schedule="mixed", lora_rank=2)
    _, tuned = prepare(config)
    engine, feed = StepEngine(tuned.model), TrialData([], [[row] for row in some_rows(tiny, "retain", 2, 3)])
    engine.micro_batches = 1
    parts, _ = _train_step(
        engine, TrialLoss(config, tuned, PAD), Step(phase, 1, (), (0, 1), 1e-3, True), feed, OneWorker()
    )
    moved = any(bool(p.grad.any()) for p in tuned.model.parameters() if p.requires_grad)
    assert moved == descends == (parts["loss"] > 0)


@pytest.mark.parametrize("max_length", [None, 13])
@pytest.mark.parametrize("method", ["kl_ascent", "npo_renyi_ce"])
def test_a_term_on_all_is_the_same_however_the_rows_fall_into_passes_micro_batches_and_ranks(
    tiny, prepare, method, max_length
):
    rows = batch_for(tiny, method, 4, 8)
    data = TrialData(*([[row] for row in rows if row.split == split] for split in ("forget", "retain")), max_length)
    step, seen = Step("forget", 0, tuple(range(4)), tuple(range(8)), 1e-3, False), []
    for world, micro in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 8)):
        config = TrialConfig(
            method=method, tuning="full", micro_batches=micro, kl_on="all", forget_on="all", max_length=max_length
        )
        engine, trainable = prepare(config)
        trial_loss, slots = TrialLoss(config, trainable, PAD), world * micro
        losses = [
            _share_loss(engine, trial_loss, step, data, data.units(step, slot, slots), slots) for slot in range(slots)
        ]
        total = sum(loss.total for loss in losses) / slots
        gradient = torch.autograd.grad(total, [p for p in trainable.model.parameters() if p.requires_grad])
        kl = sum(loss.shown.get("kl", 0.0) for loss in losses) / slots
        seen.append((kl, total.item(), torch.cat([g.flatten() for g in gradient])))
        trainable.release()
    for kl, total, gradient in seen[1:]:
        assert (kl, total) == pytest.approx(seen[0][:2], rel=1e-5)
        torch.testing.assert_close(gradient, seen[0][2], rtol=1e-3, atol=1e-5)


def test_a_loss_that_pools_sees_all_rows_of_a_split_in_one_pass_and_may_see_each_split_in_its_own(tiny, prepare):
    """Short forget rows beside retain rows padded to 200 tokens: two passes, and the value of one."""
    config = TrialConfig(
        method="kl_ascent", lora_rank=2, options={"pool_tokens": True}, kl_on="all", forget_on="answer", max_length=200
    )
    rows = batch_for(tiny, "kl_ascent", 4, 3)
    data = TrialData(*([[row] for row in rows if row.split == split] for split in ("forget", "retain")), 200)
    step = Step("forget", 0, tuple(range(4)), tuple(range(3)), 1e-3, False)
    engine, trainable = prepare(config)
    trial_loss, tokens = TrialLoss(config, trainable, PAD), []
    handle = trainable.model.get_input_embeddings().register_forward_hook(lambda m, i, o: tokens.append(i[0].shape))
    found = _share_loss(engine, trial_loss, step, data, data.units(step, 0, 1), 1)
    handle.remove()
    whole = trial_loss.loss(engine, rows, {"forget": 1.0, "retain": 1.0}, trial_loss.terms(True, True), length=200)
    assert found.shown == pytest.approx(whole.shown, rel=1e-5)
    assert tokens[0][0] == 4 and tokens[0][1] < 10 and tokens[1:] == [(3, 200)] * 2  # the second is the reference's


def test_padding_that_counts_goes_to_max_length_or_to_the_steps_longest_row():
    units = units_of(5, (7, 11), 6)
    step = Step("forget", 0, (0, 1), (2,), 1e-3, True)
    assert TrialData(units, units).padded_length(step) == 11 and TrialData(units, units, 20).padded_length(step) == 20
    least = {"forget": 200}
    groups = length_groups(units_of(5, 7, 6), False, least)
    assert [len(group) for group in groups] == [3]  # all are 200 tokens long, so they fit together
