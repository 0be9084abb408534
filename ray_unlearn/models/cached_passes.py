"""Passes over the caches of rows of differing length, and which of them a model can be trusted with.

How far back a model's layers look is stated by its configuration. What it makes of positions, columns and masks is
stated nowhere: each model shows it, once, on a row of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ray_unlearn.models.forward import (
    differ,
    picked_logits,
    right_padded,
    rope_switch,
    scoring_mode,
    some_tokens,
)
from ray_unlearn.models.kv_cache import SlotCache, selected, whole_cache
from ray_unlearn.protocols import CausalLM

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that keep each token's keys and values, if no further back than their window."""
WINDOW = re.compile(r"(window|chunk)(_size|_length|_len)?$|block_size$|^local_attention$")
"""Settings by which the models of transformers limit how far back a layer looks: sliding_window, window_size,
attention_window_size, attention_chunk_size, local_attention, ... Where one limits something else, rows longer than it
are only read and decoded one by one."""


def read_in_slots(model: CausalLM, cache: SlotCache, tokens: Tensor) -> Tensor:
    """Logits [B, V] after one more token [B] of each row in the slots."""
    logits = model(
        input_ids=tokens[:, None],
        position_ids=cache.lengths[:, None],
        attention_mask=cache.attention_mask(),
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    cache.advance()
    return logits


def read_after_gap(model: CausalLM, cache: Any, lengths: Tensor, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits [N, V] at ids[rows[n], columns[n]] of texts [B, T] that follow a cache's rows of these lengths [B].

    A text's columns begin where the longest row ends, its positions where its own row does.
    """
    width = cache.get_seq_length()
    known = torch.arange(width, device=ids.device) < lengths[:, None]
    column = torch.arange(ids.shape[1], device=ids.device)
    return picked_logits(
        model,
        rows,
        columns,
        cache,
        input_ids=ids,
        position_ids=lengths[:, None] + column,
        attention_mask=torch.cat([known, known.new_ones(ids.shape)], 1).long(),
    )


# -- which of them a model can be trusted with ---------------------------------------------------


def reach(model: CausalLM) -> float:
    """Tokens up to which every layer keeps and sees all of a row's keys and values.

    0 where a layer keeps a state instead, which cannot be cut; a window's width; or where RoPE takes other frequencies.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if getattr(model, "_is_stateful", False) or any(kind not in ATTENTION for kind in kinds):
        return 0
    return min(rope_switch(model), *_windows(config.to_dict()), math.inf)


def _windows(settings: dict[Any, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _windows(value)
        elif type(value) is int and value > 0 and WINDOW.search(str(name)):
            yield value


def reads_in_pieces(model: CausalLM, longest: int) -> bool:
    """Whether rows of up to `longest` tokens may be read in pieces, and share what their beginnings left in a cache."""
    return longest <= reach(model) and _shows(model, _piece_by_piece, longest)


def decodes_in_slots(model: CausalLM, longest: int) -> bool:
    """Whether rows of up to `longest` tokens say side by side in a SlotCache what each says alone."""
    return reads_in_pieces(model, longest) and _shows(model, _in_slots, longest)


def reads_after_gaps(model: CausalLM, longest: int) -> bool:
    """Whether rows of up to `longest` tokens may go on behind the longest row's last column (see read_after_gap)."""
    return reads_in_pieces(model, longest) and _shows(model, _after_gap, longest)


Probe = Callable[[CausalLM, Tensor, Tensor], Tensor]
"""(model, ids [1, 3], a longer row's ids [1, T]) -> logits [V] after the three in one way of reading them."""
_SHOWN: WeakKeyDictionary[CausalLM, dict[Probe, list[float]]] = WeakKeyDictionary()
"""Of each model and way of reading: the longest row that it was right beside, and the shortest that it was not."""


def _shows(model: CausalLM, probe: Probe, longest: int) -> bool:
    bounds = _SHOWN.setdefault(model, {}).setdefault(probe, [0, math.inf])
    if bounds[0] < longest < bounds[1]:
        short, long = some_tokens(model, 3), some_tokens(model, max(4, longest - 1)).flip(1)
        with scoring_mode(model):
            alone = picked_logits(model, *_last(short), input_ids=short)[0]
            wrong = differ(probe(model, short, long), alone)
        bounds[1 if wrong else 0] = longest
    return longest <= bounds[0]


def _piece_by_piece(model: CausalLM, short: Tensor, long: Tensor) -> Tensor:
    cache = whole_cache()
    for piece in (short[:, :2], short[:, 2:]):
        logits = picked_logits(model, *_last(piece), cache, input_ids=piece)
    return logits[0]


def _in_slots(model: CausalLM, short: Tensor, long: Tensor) -> Tensor:
    filled, lengths = _side_by_side(model, short, long)
    cache = SlotCache(short.device)
    cache.join(filled, [0, 1], lengths)
    return read_in_slots(model, cache, short[0, 2].expand(2))[0]


def _after_gap(model: CausalLM, short: Tensor, long: Tensor) -> Tensor:
    filled, lengths = _side_by_side(model, short, long)
    cache = selected(filled, torch.arange(2, device=short.device))
    ids = short[:, 2:].expand(2, 1)
    return read_after_gap(model, cache, torch.tensor(lengths, device=short.device), ids, *_last(ids))[0]


def _side_by_side(model: CausalLM, short: Tensor, long: Tensor) -> tuple[object, list[int]]:
    """A cache of the short row's first two tokens and the whole long row, padded on the right; and their lengths."""
    cache = whole_cache()
    ids = right_padded([short[0, :2].tolist(), long[0].tolist()], int(long[0, -1]), short.device)
    picked_logits(model, *_last(short[:, :2]), cache, input_ids=ids)
    return cache, [2, long.shape[1]]


def _last(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of a first row's last token, as picked_logits takes them."""
    return ids.new_zeros(1), ids.new_tensor([ids.shape[1] - 1])
