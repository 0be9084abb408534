"""Token losses of given texts: of a row's answer, or of whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ray_unlearn.data.tokens import Batch, Encoded, collate
from ray_unlearn.errors import InputError
from ray_unlearn.models.forward import (
    MAX_LOGITS,
    MAX_TOKENS,
    at_least_float32,
    batches,
    device_of,
    picked_logits,
    rope_switch,
    vocabulary_of,
)
from ray_unlearn.protocols import CausalLM

SLICE = 256
"""Positions whose logits are float32 at once."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(logits [N, V], targets [N]) -> [N] cross-entropies in nats, float32 a slice at a time."""
    parts = zip(logits.split(SLICE), targets.split(SLICE), strict=True)
    return torch.cat(
        [torch.nn.functional.cross_entropy(at_least_float32(part), ids, reduction="none") for part, ids in parts]
    )


def row_losses(model: CausalLM, pad: int, rows: Sequence[Encoded], batch_size: int, on: str) -> list[float]:
    """Mean next-token cross-entropy of each row over its `answer` or its whole `document`, in nats.

    A batch's logits fit MAX_LOGITS; a row that alone has more is read in pieces, through a cache, where
    the model can be read so.
    """
    from ray_unlearn.models.cached_passes import reads_in_pieces

    device, most = device_of(model), MAX_LOGITS // vocabulary_of(model)
    losses = [0.0] * len(rows)
    lengths = [len(row.ids) for row in rows]
    for group in batches(lengths, batch_size, min(MAX_TOKENS, most), rope_switch(model)):
        batch = collate([rows[i] for i in group], pad, device)
        whole, width = batch.ids.shape[1], max(1, most // len(group))
        in_pieces = width < whole and reads_in_pieces(model, whole)
        totals, counts = _sums(model, batch, batch.mask(on), width if in_pieces else whole)
        for index, loss in zip(group, (totals / counts.clamp(min=1)).tolist(), strict=True):
            losses[index] = loss
    return losses


def _sums(model: CausalLM, batch: Batch, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """([B] sums of the masked tokens' losses, [B] how many); `width` columns are read at a time."""
    from ray_unlearn.models.kv_cache import whole_cache

    read = batch.ids.shape[1] - 1  # nothing follows the last column
    cache = whole_cache() if read > width else None
    totals = torch.zeros(len(batch.ids), dtype=torch.float64, device=batch.ids.device)
    for start in range(0, read, width):
        end = min(start + width, read)
        rows, columns = mask[:, start:end].nonzero(as_tuple=True)
        logits = picked_logits(model, rows, columns, cache, input_ids=batch.ids[:, start:end])
        if len(rows):
            losses = token_losses(logits, batch.ids[rows, columns + start + 1])
            totals.index_add_(0, rows, losses.double())
    return totals, mask.sum(1)


def check_documents(documents: Sequence[Encoded], context: int | None) -> None:
    """Refuses documents without a loss, and those longer than the model's context."""
    for number, row in enumerate(documents, start=1):
        if len(row.ids) < 2:
            raise InputError(f"an MIA document needs at least two tokens to have a loss; document {number} has fewer.")
        if context is not None and len(row.ids) > context:
            raise InputError(
                f"MIA document {number} has {len(row.ids)} tokens, and the model's context is {context}. "
                "A cut document would have another loss: drop it, or use a model with a longer context."
            )


def check_losses(losses: Sequence[float]) -> None:
    """Refuses losses that are no numbers: there is no AUC of them."""
    for number, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise InputError(f"the loss of MIA document {number} is {loss}: the model's weights have diverged.")
