"""Key-value caches beyond transformers' own: rows of differing length in fixed slots, and a shared prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

COLUMNS = 64
"""Columns by which the slots grow."""


class SlotCache(Cache):
    """Rows of differing length, side by side: slot s holds its row's tokens in columns 0 to lengths[s] - 1.

    A column is a position, so a row joins by a copy and leaves without moving the others, and a
    step writes in place. What stands beyond a row's length is masked by the caller.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.width = 0
        self.layers: list[Any]
        super().__init__(layers=[])

    def join(self, filled: Any, rows: list[int], lengths: list[int]) -> None:
        """Takes the first lengths[i] tokens of rows[i] of another cache into the next free slots."""
        used = len(self.lengths)
        self.lengths = torch.cat([self.lengths, self.lengths.new_tensor(lengths)])
        self.width = max(self.width, *lengths)
        if not self.layers:
            self.layers = [_SlotLayer(self, layer.keys, layer.values) for layer in filled.layers]
        index = self.lengths.new_tensor(rows)
        for mine, theirs in zip(self.layers, filled.layers, strict=True):
            mine.reserve(used + len(rows), self.width + 1)
            width = max(lengths)
            mine.keys[used : used + len(rows), :, :width] = theirs.keys[index, :, :width]
            mine.values[used : used + len(rows), :, :width] = theirs.values[index, :, :width]

    def keep(self, slots: list[int]) -> None:
        """Moves these slots, in ascending order, to the front; the others are free."""
        index = self.lengths.new_tensor(slots)
        self.lengths = self.lengths[index]
        self.width = int(self.lengths.max()) if slots else 0
        for layer in self.layers:
            layer.keys[: len(slots), :, : self.width] = layer.keys[index, :, : self.width]
            layer.values[: len(slots), :, : self.width] = layer.values[index, :, : self.width]

    def attention_mask(self) -> Tensor:
        """[B, width + 1] 1 for each row's own tokens and the one that the next step writes."""
        columns = torch.arange(self.width + 1, device=self.lengths.device)
        return (columns <= self.lengths[:, None]).long()

    def advance(self) -> None:
        """Counts the token that a step has written to every row."""
        self.lengths = self.lengths + 1
        self.width += 1


class _SlotLayer(DynamicLayer):
    """keys and values [slots, heads, columns, dim] of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: SlotCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.owner = owner
        self.dtype, self.device = keys.dtype, keys.device
        self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[3])
        self.values = values.new_zeros(0, values.shape[1], 0, values.shape[3])
        self.is_initialized = True

    def reserve(self, slots: int, columns: int) -> None:
        """Room for so many slots and columns at least. What is unused is zero: a masked NaN would still spoil a row."""
        more_slots, more_columns = max(0, slots - self.keys.shape[0]), max(0, columns - self.keys.shape[2])
        if more_slots or more_columns:
            grown = (0, 0, 0, more_columns + COLUMNS if more_columns else 0, 0, 0, 0, more_slots)
            self.keys = torch.nn.functional.pad(self.keys, grown)
            self.values = torch.nn.functional.pad(self.values, grown)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes one token of each row at its length; returns the columns in use."""
        rows, width = key_states.shape[0], self.owner.width + 1
        self.reserve(rows, width)
        slots = torch.arange(rows, device=self.device)
        self.keys[slots, :, self.owner.lengths] = key_states[:, :, 0]
        self.values[slots, :, self.owner.lengths] = value_states[:, :, 0]
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        """Columns before the one that the next step writes."""
        return self.owner.width


def bytes_of_token(cache: Any) -> int:
    """Memory of one token's keys and values in all layers."""
    return sum(states[0, :, 0].nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def whole_cache() -> object:
    """An empty cache that keeps every token of every layer, whatever window the layer has."""
    return DynamicCache()


def selected(cache: Any, rows: Tensor) -> object:
    """A new cache whose row i is row rows[i] of this one; a single row is shared, not copied."""
    made = DynamicCache()
    for layer in cache.layers:
        twin = DynamicLayer()
        twin.lazy_initialization(layer.keys, layer.values)
        single = layer.keys.shape[0] == 1
        twin.keys = layer.keys.expand(len(rows), -1, -1, -1) if single else layer.keys[rows]
        twin.values = layer.values.expand(len(rows), -1, -1, -1) if single else layer.values[rows]
        made.layers.append(twin)
    return made
