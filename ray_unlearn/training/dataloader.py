"""A trial's rows: tokenised, with their alternatives and the untrained model's log-probabilities, dealt to steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.tokens import Encoded, collate, cut, encode
from ray_unlearn.errors import InputError
from ray_unlearn.losses import LOSSES, METHODS
from ray_unlearn.models.forward import MAX_LOGITS, MAX_TOKENS, batches, device_of, picked_logits, vocabulary_of
from ray_unlearn.models.likelihood import token_losses
from ray_unlearn.protocols import CausalLM
from ray_unlearn.records import Example
from ray_unlearn.training.schedule import Step

REFUSALS = (
    "I don't know.",
    "I don't have that information.",
    "I'm not sure about that.",
    "I have no knowledge of this.",
    "That is something I can't answer.",
    "I'm unable to say.",
    "I was never told that.",
    "I can't help with that question.",
    "I have no answer to that.",
    "I'm afraid I don't know.",
)
"""What a row is to be answered with under `idk_dpo`."""
PASS_TOKENS = 64
"""What a forward and backward pass is taken to cost beside its tokens, in tokens: a guess of the right order for
135 M parameters on a CPU, not a measurement."""


@dataclass(frozen=True)
class TrainingRow:
    """A tokenised row, which split it is of, and what the untrained model makes of it."""

    split: str
    tokens: Encoded
    task: str = ""
    reference: Tensor | None = None
    """[tokens - 1] log-probability of each next token, where the method needs it."""


MakeOnce = Callable[[str, Callable[[], Any]], Any]
"""(name, how to make it) -> the value: made once by whoever asks first, then the same for all trials of a search."""
RowGroup = list[TrainingRow]
"""Rows that must stay in one forward pass: a row, or a forget row and its alternative."""


@dataclass(frozen=True)
class TrialData:
    """The rows that a trial's steps name by index."""

    forget: Sequence[RowGroup]
    retain: Sequence[RowGroup]
    max_length: int | None = None
    """Tokens that rows were cut to, where the trial says so."""

    def padded_length(self, step: Step) -> int:
        """Tokens that a row has with the padding that `all` counts: `max_length`, or those of the step's longest row.

        So a term on `all` is the same however the step's rows fall into passes, micro-batches and ranks. ZJUKLAB's
        code pads to its max_length, and so does TOFU's; open-unlearning's pads each micro-batch to its longest row.
        """
        units = [*(self.forget[i] for i in step.forget), *(self.retain[i] for i in step.retain)]
        return self.max_length or max((len(row.tokens.ids) for unit in units for row in unit), default=0)

    def units(self, step: Step, slot: int, slots: int) -> list[RowGroup]:
        """One slot's share of a step's rows, forget rows first; every slots-th of each."""
        return [self.forget[i] for i in step.forget[slot::slots]] + [self.retain[i] for i in step.retain[slot::slots]]


def make_trial_data(
    config: TrialConfig, forget: Sequence[Example], retain: Sequence[Example], state: Any, once: MakeOnce
) -> TrialData:
    """The data of a trial. `state` has the untrained model and tokenizer, and its `limit` of tokens.

    The reference's log-probabilities are computed once for a search, whatever the number of trials,
    and only those that the method reads.
    """
    method = METHODS[config.method]
    limit = min(config.max_length or state.limit, state.limit)
    splits = {"forget": (forget, config.forget_eos), "retain": (retain, config.retain_eos)}
    rows: dict[str, list[TrainingRow]] = {}
    for split, (examples, eos) in splits.items():
        losses = [method.forget] if split == "forget" else list(method.retain)
        rows[split] = _rows(split, examples, eos, limit, losses, state, once)
    units = [[row] for row in rows["forget"]]
    if method.alternative is not None:
        others = _alternatives(forget, method.alternative, config.seed)
        drawn = config.seed if method.alternative == "refusal" else ""
        made = _rows("alternative", others, True, limit, [method.forget], state, once, f"{method.alternative}{drawn}")
        units = [[row, other] for row, other in zip(rows["forget"], made, strict=True)]
    return TrialData(units, [[row] for row in rows["retain"]], limit if config.max_length else None)


def _rows(
    split: str,
    examples: Sequence[Example],
    eos: bool,
    limit: int,
    losses: Sequence[str],
    state: Any,
    once: MakeOnce,
    variant: str = "",
) -> list[TrainingRow]:
    encoded = state.encoded(
        (split, eos, limit, variant),
        lambda: [cut(encode(state.tokenizer, e.input, e.output, eos), limit) for e in examples],
    )
    references: Sequence[Tensor | None] = [None] * len(encoded)
    if any("ref_logps" in LOSSES[name].tensors for name in losses):
        references = once(
            f"logps/{split}/{eos}/{limit}/{variant}",
            lambda: token_logps(state.model, encoded, state.tokenizer.pad_token_id),
        )
    return [
        TrainingRow(split, tokens, example.task, reference)
        for example, tokens, reference in zip(examples, encoded, references, strict=True)
    ]


def check_rows(config: TrialConfig, forget: Sequence[Example]) -> None:
    """Refuses forget rows that lack what the method needs."""
    kind = METHODS[config.method].alternative
    if kind is not None:
        _alternatives(forget, kind, config.seed)


def _alternatives(forget: Sequence[Example], kind: str, seed: int) -> list[Example]:
    """The forget rows with another answer: a refusal drawn by the seed, or the one in the data."""
    if kind == "refusal":
        rng = random.Random(seed)
        return [Example(**{**e.__dict__, "output": rng.choice(REFUSALS)}) for e in forget]
    missing = [e.id for e in forget if not e.alternate]
    if missing:
        raise InputError(
            f"alt_po needs an alternative answer to each forget row, in a column `alternate`: {len(missing)} of "
            f"{len(forget)} rows have none, the first is {missing[0]!r}. Add them, or use idk_dpo."
        )
    return [Example(**{**e.__dict__, "output": e.alternate}) for e in forget]


def token_logps(model: CausalLM, rows: Sequence[Encoded], pad_id: int) -> list[Tensor]:
    """[tokens - 1] of each row: the model's log-probability of each next token, float32 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    lengths = [len(row.ids) for row in rows]
    with torch.no_grad():
        for group in batches(lengths, len(rows), min(MAX_TOKENS, MAX_LOGITS // vocabulary_of(model))):
            batch = collate([rows[i] for i in group], pad_id, device_of(model))
            at_row, at = batch.document.nonzero(as_tuple=True)
            logits = picked_logits(model, at_row, at, input_ids=batch.ids, attention_mask=batch.attention)
            losses = token_losses(logits, batch.ids[at_row, at + 1]).cpu()
            for index, row in zip(group, losses.split([lengths[i] - 1 for i in group]), strict=True):
                found[index] = -row.clone()
    return found


def split_units(units: Sequence[RowGroup]) -> list[RowGroup]:
    """One unit for each split, of all its rows: where a loss pools a split's tokens, those stay in one pass."""
    splits = dict.fromkeys(unit[0].split for unit in units)
    return [[row for unit in units if unit[0].split == split for row in unit] for split in splits]


def length_groups(
    units: Sequence[RowGroup], together: bool, least: Mapping[str, int] | None = None
) -> list[list[TrainingRow]]:
    """Units in groups of like length that cost least: padded tokens, and PASS_TOKENS for each group.

    `least` has the tokens to which the rows of a split are padded at least.

    Each group is a forward pass of its own, and one backward pass follows them all. `together`
    keeps all in one group: where ranks' passes must match one to one.
    """
    known = least or {}
    sizes = [max(max(len(row.tokens.ids), known.get(row.split, 0)) for row in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda i: (sizes[i], i))
    counts = [len(units[index]) for index in order]
    cost, start = [0], [0]  # of the best grouping of the shortest so many units, and where its last group begins
    for end in range(1, len(order) + 1):
        firsts = [0] if together else range(end)
        longest = sizes[order[end - 1]]
        costs = [cost[first] + PASS_TOKENS + sum(counts[first:end]) * longest for first in firsts]
        cost.append(min(costs))
        start.append(firsts[costs.index(cost[-1])])
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        groups.insert(0, order[start[end] : end])
        end = start[end]
    return [[row for index in sorted(group) for row in units[index]] for group in groups or [[]]]
