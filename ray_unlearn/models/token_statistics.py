"""What metrics take from a model: log-probabilities of given tokens, their moments, gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_unlearn.data.tokens import Encoded, collate
from ray_unlearn.errors import InputError
from ray_unlearn.models.forward import (
    MAX_LOGITS,
    MAX_TOKENS,
    batches,
    device_of,
    picked_logits,
    rope_switch,
    scoring_mode,
    vocabulary_of,
)
from ray_unlearn.protocols import CausalLM, Tokenizer

MAX_SLICE = 2**24
"""Logits in float32 at a time."""


@dataclass(frozen=True)
class TokenStatistics:
    """A model's view of the T tokens after a row's prompt, each given all tokens before it."""

    log_probs: NDArray[np.float64]
    """[T] log p of the token, in nats."""
    matches: NDArray[np.bool_]
    """[T] whether it is the most probable one; of equally probable ones the lowest id is."""
    means: NDArray[np.float64]
    """[T] mean of log p over the vocabulary under p: minus the entropy. Empty unless asked for."""
    deviations: NDArray[np.float64]
    """[T] its standard deviation. Empty unless asked for."""


def token_statistics(
    model: CausalLM, rows: Sequence[Encoded], *, tokenizer: Tokenizer, moments: bool = False, batch_size: int = 32
) -> list[TokenStatistics]:
    """Signals of each row's tokens after its prompt, in order of the rows; `moments` adds means and deviations.

    Raises InputError for a row without such a token, and for a log-probability that is not finite.
    """
    for number, row in enumerate(rows):
        if not 1 <= row.prompt < len(row.ids):
            raise InputError(
                f"row {number} has {len(row.ids)} tokens, {row.prompt} of them prompt: there must be at least one "
                f"before the tokens that are scored, and one to score."
            )
    found: list[TokenStatistics | None] = [None] * len(rows)
    most = min(MAX_TOKENS, MAX_LOGITS // vocabulary_of(model))
    for group in batches([len(row.ids) for row in rows], batch_size, most, rope_switch(model)):
        with scoring_mode(model):
            signals = _batch_signals(model, tokenizer.pad_token_id, [rows[i] for i in group], moments)
        for index, one in zip(group, signals, strict=True):
            if not np.isfinite(one.log_probs).all():
                raise InputError(
                    f"row {index} has a token whose log-probability is not finite. The model's weights hold NaN or "
                    f"infinity, or its precision is too low; score it in float32."
                )
            found[index] = one
    return found  # type: ignore[return-value]


def _batch_signals(model: CausalLM, pad_id: int, rows: Sequence[Encoded], moments: bool) -> list[TokenStatistics]:
    batch = collate(rows, pad_id, device_of(model))
    at_row, at = batch.answer.nonzero(as_tuple=True)
    logits = picked_logits(model, at_row, at, input_ids=batch.ids, attention_mask=batch.attention)
    labels = batch.ids[at_row, at + 1]
    step = max(1, MAX_SLICE // logits.shape[-1])
    slices = zip(logits.split(step), labels.split(step), strict=True)
    parts = [_signals(some, ids, moments) for some, ids in slices]
    joined = [torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True)]
    ends = np.cumsum([len(row.ids) - row.prompt for row in rows])[:-1]
    each = [np.split(column, ends if column.size else [0] * len(ends)) for column in joined]
    return [TokenStatistics(*columns) for columns in zip(*each, strict=True)]


def _signals(logits: Tensor, labels: Tensor, moments: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of [N, V] logits and [N] tokens: log_probs and matches, then means and deviations or nothing."""
    log_probs = torch.log_softmax(logits.float(), -1)
    own = log_probs.gather(1, labels[:, None])[:, 0].double()
    matches = log_probs.argmax(-1) == labels
    if not moments:
        return own, matches, own[:0], own[:0]
    probs = log_probs.exp()
    finite = log_probs.clamp(min=-1e4)  # a token that is ruled out weighs 0, and 0 times infinity is no number
    means = (probs * finite).sum(-1)
    deviations = (probs * (finite - means[:, None]).square()).sum(-1).sqrt()
    return own, matches, means.double(), deviations.double()


def gradient_norms(model: CausalLM, rows: Sequence[Encoded]) -> list[list[float]]:
    """For each row the 2-norms of the gradient of its mean token loss, one for each parameter tensor it reaches.

    All parameters count, frozen ones too, so that a model with an adapter is not measured by that alone. Leaves
    no gradients behind. One row at a time; needs as much memory again as the weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    trained = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with scoring_mode(model), torch.enable_grad():
            return [_norms(model, parameters, row) for row in rows]
    finally:
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.requires_grad_(flag)


def _norms(model: CausalLM, parameters: Sequence[Tensor], row: Encoded) -> list[float]:
    ids = torch.tensor([row.ids], device=parameters[0].device)
    logits = model(input_ids=ids, use_cache=False).logits[0, row.prompt - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, row.prompt :])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [float(gradient.float().norm()) for gradient in gradients if gradient is not None]
