"""Rows to tokens and batches. The one place where prompt and answer are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.protocols import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row; the first `prompt` of them are the prompt."""

    ids: tuple[int, ...]
    prompt: int


def document_of(input: str, output: str) -> str:
    """Prompt and answer as one text: a space between, unless one stands there already."""
    glue = "" if input[-1:].isspace() or output[:1].isspace() else " "
    return input + glue + output


def encode(tokenizer: Tokenizer, input: str, output: str, eos: bool = False) -> Encoded:
    """Tokens of prompt and answer such that the prompt's are exactly those that generation starts from.

    The text is tokenised as a whole; where that would merge the prompt's last token with the
    answer's first, the two are tokenised apart.
    """
    prompt = list(tokenizer(input)["input_ids"])
    text = document_of(input, output)
    ids = list(tokenizer(text)["input_ids"])
    if ids[: len(prompt)] != prompt:
        ids = prompt + list(tokenizer(text[len(input) :], add_special_tokens=False)["input_ids"])
    if eos:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token, but EOS was asked for at the end of rows.")
        ids.append(tokenizer.eos_token_id)
    return Encoded(tuple(ids), len(prompt))


def cut(row: Encoded, max_length: int | None) -> Encoded:
    """The row's first `max_length` tokens; at least one answer token must remain."""
    if max_length is None or len(row.ids) <= max_length:
        return row
    if row.prompt >= max_length:
        raise InputError(
            f"a row's prompt alone has {row.prompt} tokens, and the limit is {max_length}: no answer token is left. "
            f"Raise max_length or drop the row."
        )
    return Encoded(row.ids[:max_length], row.prompt)


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens. Masks are over predicted tokens: position t stands for token t + 1."""

    ids: Tensor
    """[B, T] token ids, padded on the right."""
    attention: Tensor
    """[B, T] 1 for tokens, 0 for padding."""
    answer: Tensor
    """[B, T-1] whether token t + 1 belongs to the answer."""
    document: Tensor
    """[B, T-1] whether token t + 1 is a token at all."""

    def mask(self, on: str) -> Tensor:
        """[B, T-1] by name: `answer`, `prompt`, `document` (both), or `all`, which padding is part of."""
        if on == "prompt":
            return self.document & ~self.answer
        return {"answer": self.answer, "document": self.document, "all": torch.ones_like(self.document)}[on]


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu", length: int = 0) -> Batch:
    """Rows to a batch as long as its longest row, or as `length` tokens where that is longer."""
    length = max(2, length, *(len(row.ids) for row in rows))
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompts = torch.tensor([row.prompt for row in rows])
    ids = torch.tensor([[*row.ids, *[pad_id] * (length - len(row.ids))] for row in rows])
    position = torch.arange(length)
    real = position < lengths[:, None]
    answer = real & (position >= prompts[:, None])
    tensors = (ids, real.long(), answer[:, 1:], real[:, 1:])
    return Batch(*(tensor.to(device) for tensor in tensors))


def by_length(items: Iterable[object], length: Callable[[Any], int], size: int) -> list[list[int]]:
    """Indices of the items in groups of at most `size` of similar length, so that little padding is needed."""
    lengths = [length(item) for item in items]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]
