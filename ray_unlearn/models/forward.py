"""Forward passes that form no more logits than are asked for, and the batches they take."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.protocols import CausalLM

MAX_TOKENS = 4096
"""Tokens in one forward pass, padding included."""
FEW_TOKENS = 256
"""A pass of fewer tokens costs hardly less: up to here any padding is taken."""
MAX_PADDED = 1.125
"""Tokens of a larger pass, padding included, for each of its rows' own."""
MAX_LOGITS = 2**27
"""Logits formed at once: 512 MiB in float32."""
ATTENTION = ("full_attention", "sliding_attention")


def picked_logits(model: CausalLM, rows: Tensor, columns: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """Logits [N, V] at hidden[rows[n], columns[n]] of a forward pass, and its cache.

    Only those N positions reach the output head. What the model does with its logits afterwards
    (soft caps, scales) is elementwise and stays as it is.
    """
    if model.get_output_embeddings() is None:
        out = model(**inputs)
        return out.logits[rows, columns], out.past_key_values
    with head_at(model, rows, columns):
        out = model(**inputs)
    return out.logits[0], out.past_key_values


@contextmanager
def head_at(model: CausalLM, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """The output head sees hidden[rows[n], columns[n]] alone, so that a pass's logits are [1, N, V]."""
    head = model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_pre_hook(lambda module, given: (given[0][rows, columns][None], *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scoring_mode(model: CausalLM) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode is given back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision as float32: a softmax over a vocabulary needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def most_probable(logits: Tensor) -> Tensor:
    """logits [N, V] -> [N] ids of the largest; raises InputError where they are NaN."""
    ids = logits.argmax(-1)
    if bool(logits.gather(-1, ids[:, None]).isnan().any()):
        raise InputError("the model's logits are NaN: its weights have diverged, and nothing it says can be scored.")
    return ids


def right_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """[B, T] token ids that start at column 0. Under causal attention the padding is never seen."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)


def batches(lengths: Sequence[int], size: int, max_tokens: int) -> list[list[int]]:
    """Indices by ascending length in groups of at most `size` rows that share a pass."""
    waiting = deque(sorted(range(len(lengths)), key=lambda i: (lengths[i], i)))
    groups = []
    while waiting:
        count = share_a_pass([lengths[i] for i in itertools.islice(waiting, size)], max_tokens)
        groups.append([waiting.popleft() for _ in range(count)])
    return groups


def share_a_pass(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> int:
    """How many of these rows, by ascending length, one pass takes: at least one, within `max_tokens` and MAX_PADDED."""
    own = 0
    for count, length in enumerate(lengths):
        own += length
        padded = (count + 1) * length
        if count and padded > min(max_tokens, max(FEW_TOKENS, MAX_PADDED * own)):
            return count
    return len(lengths)


def device_of(model: CausalLM) -> torch.device:
    """Where the model's inputs must be."""
    return next(model.parameters()).device


def vocabulary_of(model: CausalLM) -> int:
    """Logits at one position."""
    weight = cast(Tensor, model.get_input_embeddings().weight)
    return int(weight.shape[0] or model.config.vocab_size)


def context_of(model: CausalLM) -> int | None:
    """Positions that the model was made for, or None where its configuration names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def remembers_all(model: CausalLM, longest: int) -> bool:
    """Whether all layers are attention that sees every one of `longest` tokens, so that a cache can be cut and copied.

    Recurrent states cannot be wound back, and a window's edge moves with a row's own length.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if getattr(model, "_is_stateful", False) or any(kind not in ATTENTION for kind in kinds):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or longest <= window
