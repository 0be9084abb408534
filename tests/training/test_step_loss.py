"""The loss of a step against a plain pass row by row; what it forms and what it leaves out; how rows are dealt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made_rows import PAD, WEIGHTS, WHOLE, _AdapterOff, batch_for, some_rows, terms_of

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.tokens import Encoded
from ray_unlearn.errors import InputError
from ray_unlearn.losses import LOSSES, METHODS
from ray_unlearn.training.dataloader import TrainingRow
from ray_unlearn.training.step_loss import TrialLoss

# -- a plain pass, a row at a time, all logits, no padding -----------------------------------------


def plain_row(model, row, on, layer):
    ids = torch.tensor([row.tokens.ids])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    position = torch.arange(ids.shape[1] - 1)
    mask = {"answer": position >= row.tokens.prompt - 1, "document": position >= 0}[on]
    logits = out.logits[0, :-1]
    hidden = out.hidden_states[layer + 1][0, :-1]
    return SimpleNamespace(mask=mask, logits=logits, targets=ids[0, 1:], hidden=hidden)


def plain_term(name, config, model, base, rows, others, on, objective):
    """One loss of the table on rows passed one by one; a pooled one sees all tokens as one row."""
    loss, layer = LOSSES[name], 0
    made = []
    for index, row in enumerate(rows):
        m, r = plain_row(model, row, on, layer), plain_row(base, row, on, layer)
        logp, ref_logp = (
            x.logits.log_softmax(-1).gather(-1, x.targets[:, None])[:, 0] for x in (m, SimpleNamespace(**r.__dict__))
        )
        tensors = {
            "mask": m.mask, "logps": logp, "ref_logps": ref_logp.detach(), "logits": m.logits[m.mask],
            "ref_logits": r.logits[m.mask].detach(), "targets": m.targets[m.mask], "hidden": m.hidden[m.mask],
            "ref_hidden": r.hidden[m.mask].detach(),
        }  # fmt: skip
        if others:
            a, b = plain_row(model, others[index], on, layer), plain_row(base, others[index], on, layer)
            tensors |= {"alt_mask": a.mask}
            for key, x in (("alt_logps", a), ("alt_ref_logps", b)):
                tensors[key] = x.logits.log_softmax(-1).gather(-1, x.targets[:, None])[:, 0]
        if objective.steering is not None:
            tensors["control"] = objective.steering.control([row.task])[0]
        made.append(tensors)
    options = {argument: config.options[key] for argument, key in loss.options.items()}
    per_row = ("mask", "logps", "ref_logps", "alt_mask", "alt_logps", "alt_ref_logps", "control")
    if loss.pools(config.options):
        made = [{key: torch.cat([tensors[key] for tensors in made]) for key in made[0] if key in loss.tensors}]
    values = [
        loss.compute(*(t[key][None] if key in per_row else t[key] for key in loss.tensors), **options) for t in made
    ]
    return torch.stack(values).mean()


def plain_loss(config, engine, tuned, rows, objective):
    method, weights = METHODS[config.method], config
    by_split = {split: [row for row in rows if row.split == split] for split in ("forget", "alternative", "retain")}
    base = tuned.base
    parts = {}
    for name, split, on in (
        (method.forget, "forget", config.forget_on),
        *((name, "retain", getattr(config, f"{LOSSES[name].part}_on")) for name in method.retain),
    ):
        part = "forget" if split == "forget" else LOSSES[name].part
        others = by_split["alternative"] if split == "forget" else []
        if config.tuning == "lora":
            with tuned.reference(engine.module):
                pass
            reference = _AdapterOff(tuned)
        else:
            reference = base
        parts[part] = plain_term(name, config, engine.module, reference, by_split[split], others, on, objective)
    return parts, sum(getattr(weights, f"{part}_weight") * value for part, value in parts.items())


DETERMINISTIC = [name for name in METHODS if METHODS[name].forget != "noise_kl"]
VARIANTS = [(name, {}) for name in DETERMINISTIC]
VARIANTS += [("npo_kl_ce", {"npo_ratio": ratio}) for ratio in ("mean", "batch", "token")]
VARIANTS += [("npo_kl_ce", {"kl_direction": "model"}), ("grad_diff", {"ascent_bound": 4.0})]
VARIANTS += [(name, {"pool_tokens": True}) for name in ("grad_diff", "kl_ascent", "npo_ce", "undial")]


def rmu_layer(name):
    return {"rmu_layer": 0} if name == "rmu" else {}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_step_loss_and_gradient_equal_a_plain_pass_row_by_row(tiny, prepare, method, options, tuning):
    config = TrialConfig(method=method, tuning=tuning, lora_rank=2, options=options | rmu_layer(method), **WEIGHTS)
    rows = batch_for(tiny, method)
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD, ["Task1", "Task2"])
    found = objective.loss(engine, rows, WHOLE, terms_of(objective, rows))
    found.total.backward()
    gradients = {n: p.grad.clone() for n, p in tuned.model.named_parameters() if p.requires_grad}
    tuned.model.zero_grad()
    parts, expected = plain_loss(config, engine, tuned, rows, objective)
    expected.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert set(found.shown) == {"loss", *parts}
    for name, part in parts.items():
        assert found.shown[name] == pytest.approx(part.item(), rel=1e-5, abs=1e-6)
    for name, parameter in tuned.model.named_parameters():
        if parameter.requires_grad:
            plain = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[name], plain, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in tiny.model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_padding_id_and_padding_length_change_nothing(tiny, prepare, method):
    config = TrialConfig(method=method, lora_rank=2, options=rmu_layer(method), **WEIGHTS)
    rows = batch_for(tiny, method)
    engine, tuned = prepare(config)
    values = []
    for pad in (PAD, 0, len(tiny.tokenizer) - 1):
        torch.manual_seed(0)  # the noise of the second teacher
        objective = TrialLoss(config, tuned, pad, ["Task1", "Task2"])
        values.append(objective.loss(engine, rows, WHOLE, terms_of(objective, rows)).total.item())
    assert values[0] == pytest.approx(values[1], rel=1e-6) == pytest.approx(values[2], rel=1e-6)
    pooling = objective.pools
    if METHODS[method].forget == "noise_kl" or pooling:
        return
    long = TrainingRow("retain", Encoded(tuple(range(2, 60)), 3), "Task1", torch.zeros(57))
    weights = {"forget": 1.0, "retain": 0.0}  # the long row only stretches the batch
    alone = objective.loss(engine, [r for r in rows if r.split != "retain"], weights, objective.terms(True, False))
    beside = objective.loss(engine, [*rows, long], weights, objective.terms(True, True))
    assert beside.shown["forget"] == pytest.approx(alone.shown["forget"], rel=1e-5)


@pytest.mark.parametrize(("shares", "forget", "retain"), [(2, 4, 4), (3, 3, 5), (4, 2, 2)])
@pytest.mark.parametrize("method", ["npo_kl_ce", "idk_dpo", "undial", "rmu", "grad_ascent"])
def test_shares_weighted_by_their_rows_average_to_the_whole_batch(tiny, prepare, method, shares, forget, retain):
    """Whatever falls on a rank: both kinds of rows, one kind, or nothing."""
    config = TrialConfig(method=method, lora_rank=2, options=rmu_layer(method), **WEIGHTS)
    rows = batch_for(tiny, method, forget, retain)
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD, ["Task1", "Task2"])
    terms = terms_of(objective, rows)
    whole = objective.loss(engine, rows, WHOLE, terms)
    by_split = {split: [row for row in rows if row.split == split] for split in ("forget", "alternative", "retain")}
    total = 0.0
    for slot in range(shares):
        mine = [row for part in by_split.values() for row in part[slot::shares]]
        weights = {
            split: len(by_split[split][slot::shares]) * shares / len(by_split[split]) for split in ("forget", "retain")
        }
        total += objective.loss(engine, mine or by_split["retain"][:1], weights, terms).total.item() / shares
    assert total == pytest.approx(whole.total.item(), rel=1e-5, abs=1e-6)


def test_a_row_that_weighs_nothing_reaches_every_parameter_and_moves_none(tiny, prepare):
    config = TrialConfig(method="npo_kl_ce", lora_rank=2)
    rows = some_rows(tiny, "retain", 1, 3)
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD)
    found = objective.loss(engine, rows, {"forget": 0.0, "retain": 0.0}, objective.terms(True, True), collective=True)
    found.total.backward()
    assert found.total.item() == 0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in tuned.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_repair_descends_on_the_retain_terms_and_by_cross_entropy_where_there_are_none(tiny, prepare, method):
    config = TrialConfig(method=method, lora_rank=2, options=rmu_layer(method))
    rows = some_rows(tiny, "retain", 3, 5)
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD, ["Task1", "Task2"])
    terms = objective.terms(False, True, repair=True)
    assert [term.loss for term in terms] == list(METHODS[method].retain or ("cross_entropy",))
    found = objective.loss(engine, rows, WHOLE, terms)
    assert "forget" not in found.shown and found.total.item() == pytest.approx(found.shown["loss"])


# -- what is left out ------------------------------------------------------------------------------


def head_rows(model, call):
    """Rows of logits that the head forms during a call."""
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        call()
    finally:
        handle.remove()
    return [output.numel() // output.shape[-1] for output in seen]


def test_logits_are_formed_where_a_term_asks_for_them_and_nowhere_else(tiny, prepare):
    config = TrialConfig(method="npo_kl_ce", lora_rank=2, forget_on="answer", kl_on="document")
    rows = batch_for(tiny, "npo_kl_ce")
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD)
    formed = head_rows(tuned.model, lambda: objective.loss(engine, rows, WHOLE, terms_of(objective, rows)))
    forget = sum(len(row.tokens.ids) - row.tokens.prompt for row in rows if row.split == "forget")
    retain = sum(len(row.tokens.ids) - 1 for row in rows if row.split == "retain")
    assert formed == [forget + retain, retain]  # the trained pass, then the reference's, on the retain rows alone


def test_a_term_of_weight_zero_costs_no_pass(tiny, prepare):
    """A retain weight of 0 must not send the retain rows, or the reference, through the model."""
    config = TrialConfig(method="undial", lora_rank=2, retain_weight=0.0)
    rows = batch_for(tiny, "undial")
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD)
    found = objective.loss(engine, rows, WHOLE, terms_of(objective, rows))
    assert engine.rows == 3 and set(found.shown) == {"loss", "forget"}
    config = TrialConfig(method="npo_kl_ce", lora_rank=2, kl_weight=0.0)
    objective = TrialLoss(config, tuned, PAD)
    formed = head_rows(tuned.model, lambda: objective.loss(engine, rows, WHOLE, terms_of(objective, rows)))
    assert len(formed) == 1


@pytest.mark.parametrize("method", METHODS)
def test_no_rows_go_through_the_trained_model_twice(tiny, prepare, method):
    """KL on the retain rows takes the logits of the pass that cross-entropy takes, not a second pass."""
    config = TrialConfig(method=method, lora_rank=2, options=rmu_layer(method))
    rows = batch_for(tiny, method)
    engine, tuned = prepare(config)
    objective = TrialLoss(config, tuned, PAD, ["Task1", "Task2"])
    objective.loss(engine, rows, WHOLE, terms_of(objective, rows))
    assert engine.rows <= len(rows)


def test_all_counts_padding_and_document_does_not(tiny, prepare):
    values = {}
    for on in ("document", "all"):
        config = TrialConfig(method="npo_kl_ce", lora_rank=2, kl_on=on)
        rows = batch_for(tiny, "npo_kl_ce")
        engine, tuned = prepare(config)
        objective = TrialLoss(config, tuned, PAD)

        def take(o=objective, e=engine, r=rows, on=on):
            values[on] = o.loss(e, r, WHOLE, terms_of(o, r)).shown["kl"]

        formed = head_rows(tuned.model, take)
        longest = max(len(row.tokens.ids) for row in rows) - 1
        assert on == "document" or formed[1] == 4 * longest
        tuned.release()
    assert values["all"] != pytest.approx(values["document"], rel=1e-3)


# -- RMU's steering --------------------------------------------------------------------------------


def test_each_task_has_its_vector_and_an_adaptive_coefficient_follows_the_hidden_states(tiny, prepare):
    config = TrialConfig(
        method="rmu",
        tuning="full",
        train_modules="down_proj",
        train_layers=[0, 1],
        options={"rmu_layer": 0, "rmu_coefficient": 3.0, "rmu_adaptive": True},
    )
    engine, tuned = prepare(config)
    assert all("down_proj" in name for name in tuned.names) and len(tuned.names) == 2
    objective = TrialLoss(config, tuned, PAD, ["Task1", "Task2"])
    rows = some_rows(tiny, "forget", 5, 1)
    objective.begin_epoch(engine, rows)
    ours = [row for row in rows if row.task == "Task1"]
    norms = torch.cat([plain_row(tuned.model, row, "document", 0).hidden.norm(dim=-1) for row in ours])
    first, second = objective.steering.control(["Task1", "Task2"])
    assert first.norm().item() == pytest.approx(3.0 * norms.mean().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) < 0.999
    # What is frozen stays frozen once the optimiser is made.
    assert [n for n, p in tuned.model.named_parameters() if p.requires_grad] == tuned.names


@pytest.mark.parametrize(
    ("layer", "message"),
    [(2, "layers 0 to 1.*--scale-to-model"), (-1, "layers 0 to 1"), ("model.layers.9", "matches no module")],
)
def test_a_layer_that_the_model_does_not_have_is_refused(tiny, prepare, layer, message):
    config = TrialConfig(method="rmu", lora_rank=2, options={"rmu_layer": layer})
    _, tuned = prepare(config)
    with pytest.raises(InputError, match=message):
        TrialLoss(config, tuned, PAD, ["Task1"])


# -- rows ------------------------------------------------------------------------------------------
