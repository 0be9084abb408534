"""Greedy decoding of a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def greedy(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, tokenizer: Any) -> list[list[int]]:
    """New token ids of each prompt, most probable token first, up to EOS (kept) or `max_new_tokens`.

    Prompts are padded on the left. Rows that have ended leave the loop's decisions alone; the loop
    ends when all have. The cache is transformers' own.
    """
    device = next(model.parameters()).device
    pad, ends = tokenizer.pad_token_id, _eos_ids(model, tokenizer)
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    attention = (torch.arange(length, device=device) >= length - lengths[:, None]).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache, new = None, []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    step_ids = ids
    for _ in range(max_new_tokens):
        out = model(
            input_ids=step_ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = torch.where(done, pad, out.logits[:, -1].argmax(-1))
        new.append(token)
        done |= torch.isin(token, ends)
        if bool(done.all()):
            break
        step_ids, positions = token[:, None], positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(prompts), 1)], 1)
    rows = torch.stack(new, 1).tolist()
    stops = set(ends.tolist())
    return [_until(row, stops) for row in rows]


def _eos_ids(model: Any, tokenizer: Any) -> torch.Tensor:
    """Every id that ends a text, as `generate` reads them: the generation config's, else the tokenizer's."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stated = tokenizer.eos_token_id if stated is None else stated
    values = stated if isinstance(stated, (list, tuple)) else [stated]
    return torch.tensor([value for value in values if value is not None], device=next(model.parameters()).device)


def _until(row: list[int], stops: set[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in stops:
            return row[: index + 1]
    return row
