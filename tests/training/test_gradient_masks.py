"""Which gradients may move what is trained: the masks, and masked steps of a real DeepSpeed engine."""

from __future__ import annotations

import copy

import pytest
import torch
from made_rows import OneWorker, batch_for

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.training.dataloader import TrialData
from ray_unlearn.training.engine import Engine
from ray_unlearn.training.gradient_masks import memflex_mask, sure_mask
from ray_unlearn.training.loop import _train_step
from ray_unlearn.training.schedule import Step
from ray_unlearn.training.step_loss import TrialLoss


def gradients(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("percentile", [0.0, 50.0, 90.0, 99.0])
def test_sure_lets_through_the_rows_at_or_above_the_percentile_of_all_rows(percentile):
    made = gradients((6, 3), (4, 5), (7,))
    made[1][2] = 0.0
    masks = sure_mask(made, percentile)
    rows = [(i, r, float(row.norm())) for i, g in enumerate(made) for r, row in enumerate(g.reshape(len(g), -1))]
    norms = sorted(norm for _, _, norm in rows)
    place = (len(norms) - 1) * percentile / 100
    low = int(place)
    threshold = norms[low] + (place - low) * (norms[min(low + 1, len(norms) - 1)] - norms[low])
    for i, r, norm in rows:
        assert bool(masks[i][r]) == (norm >= threshold - 1e-6 and norm > 0)
    for gradient, mask in zip(made, masks, strict=True):
        assert (gradient * mask).shape == gradient.shape


def test_memflex_moves_tensors_where_forgetting_is_strong_and_disagrees_with_retaining():
    forget = gradients((3, 3), (3, 3), (3, 3), (2, 2))
    forget[3] *= 1e-3
    retain = [forget[0].clone(), -forget[1], torch.zeros(3, 3), -forget[3]]
    found = [bool(mask) for mask in memflex_mask(forget, retain, 0.92, 50.0)]
    magnitudes = [float(g.abs().mean()) for g in forget]
    median = sorted(magnitudes)[1:3]
    expected = [False, magnitudes[1] >= sum(median) / 2, magnitudes[2] >= sum(median) / 2, False]
    assert found == expected and any(found)


# -- whole steps, on a real engine -----------------------------------------------------------------


def mean_loss(model, units):
    """Mean over rows of the mean cross-entropy of a row's answer, each row passed alone."""
    values = []
    for (row,) in units:
        ids = torch.tensor([row.tokens.ids])
        logits = model(input_ids=ids).logits[0, row.tokens.prompt - 1 : -1]
        values.append(torch.nn.functional.cross_entropy(logits, ids[0, row.tokens.prompt :]))
    return sum(values) / len(values)


def slow_percentile(values, percentile):
    """Linear between the two nearest ranks."""
    ordered, place = sorted(values), (len(values) - 1) * percentile / 100
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def slow_step(model, optimizer, data, config):
    """One masked step of a plain model and optimiser: two backward passes, the mask entry by entry, clip, step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forget = torch.autograd.grad(-config.forget_weight * mean_loss(model, data.forget), trained)
    retain = torch.autograd.grad(config.retain_weight * mean_loss(model, data.retain), trained)
    if config.gradient_mask == "sure":
        rows = [[float(row.norm()) for row in gradient] for gradient in forget]
        bound = slow_percentile([norm for part in rows for norm in part], config.mask_percentile)
        kept = [torch.tensor([norm >= bound for norm in part]) for part in rows]
    else:
        sizes = [float(gradient.abs().mean()) for gradient in forget]
        bound = slow_percentile(sizes, config.mask_percentile)
        cosines = [float((f * r).sum() / (f.norm() * r.norm())) for f, r in zip(forget, retain, strict=True)]
        kept = [
            torch.full(gradient.shape[:1], size >= bound and cosine < config.mask_cosine)
            for gradient, size, cosine in zip(forget, sizes, cosines, strict=True)
        ]
    for parameter, f, r, keep in zip(trained, forget, retain, kept, strict=True):
        parameter.grad = torch.where(keep.reshape(-1, *[1] * (f.dim() - 1)), f + r, 0.0)
    norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    optimizer.step()
    return float(norm), kept


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("mask", ["sure", "memflex"])
def test_masked_steps_of_a_deepspeed_engine_are_those_of_a_slow_loop(tiny, prepare, one_rank, mask, tuning, zero_stage):
    config = TrialConfig(
        method="grad_diff", tuning=tuning, lora_rank=2, forget_weight=0.7, retain_weight=1.3, micro_batches=2,
        gradient_mask=mask, mask_percentile=60.0, mask_cosine=0.3, zero_stage=zero_stage,
    )  # fmt: skip
    rows = batch_for(tiny, "grad_diff", 5, 3)
    data = TrialData(*([[row] for row in rows if row.split == split] for split in ("forget", "retain")))
    _, trainable = prepare(config)
    plain = copy.deepcopy(trainable.model)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    engine = Engine(trainable.model, config, "float32")
    trial_loss = TrialLoss(config, trainable, tiny.tokenizer.pad_token_id)
    for _ in range(3):
        step = Step("forget", 0, tuple(range(5)), tuple(range(3)), 1e-3, False)
        parts, _ = _train_step(engine, trial_loss, step, data, OneWorker())
        norm, kept = slow_step(plain, optimizer, data, config)
        assert parts["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert 0 < sum(int(keep.sum()) for keep in kept) < sum(len(keep) for keep in kept)
    found = engine.weights(trainable.names)
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.detach(), rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(found[name], before[name]) for name in found)
    engine.close()


@pytest.mark.parametrize("mask", ["sure", "memflex"])
def test_a_masked_trial_that_repairs_or_has_no_retain_loss_moves_all_and_some(tiny, prepare, one_rank, mask):
    """No forget rows: nothing is masked. No retain terms: the mask is of the forget gradient alone."""
    moved = {}
    for phase, forget, retain in (("repair", (), (0, 1)), ("forget", (0, 1), ())):
        config = TrialConfig(method="grad_ascent", tuning="full", gradient_mask=mask, mask_percentile=80.0)
        rows = batch_for(tiny, "grad_ascent", 2, 2)
        data = TrialData(*([[row] for row in rows if row.split == split] for split in ("forget", "retain")))
        _, trainable = prepare(config)
        before = {name: p.detach().clone() for name, p in trainable.model.named_parameters()}
        engine = Engine(trainable.model, config, "float32")
        trial_loss = TrialLoss(config, trainable, tiny.tokenizer.pad_token_id)
        _train_step(engine, trial_loss, Step(phase, 0, forget, retain, 1e-3, False), data, OneWorker())
        found = engine.weights(trainable.names)
        moved[phase] = sum(not torch.equal(found[name], before[name]) for name in found)
        engine.close()
        trainable.release()
    assert moved["repair"] == len(before) > moved["forget"] > 0
