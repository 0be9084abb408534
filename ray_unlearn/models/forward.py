"""Forward passes that form no more logits than are asked for, and the batches they take."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.protocols import CausalLM, ModelConfig

MAX_TOKENS = 4096
"""Tokens in one forward pass, padding included."""
FEW_TOKENS = 256
"""A pass of fewer tokens costs hardly less: up to here any padding is taken."""
MAX_PADDED = 1.125
"""Tokens of a larger pass, padding included, for each of its rows' own."""
MAX_LOGITS = 2**27
"""Logits formed at once: 512 MiB in float32."""
ROUNDING, HALF_ROUNDING = 0.01, 0.1
"""Difference of logits from those of the same tokens read in another way, as a share of their spread: in float32
(TF32 included), and in bfloat16 or float16. A token that is not seen, or at another place, changes them by far more."""
SWITCHING_ROPE = ("longrope", "dynamic")


def picked_logits(model: CausalLM, rows: Tensor, columns: Tensor, cache: object = None, **inputs: object) -> Tensor:
    """Logits [N, V] at hidden[rows[n], columns[n]] of a forward pass, over `cache` and into it where one is given.

    Only those N positions reach the output head. What the model does with its logits afterwards
    (soft caps, scales) is elementwise and stays as it is.
    """
    inputs |= {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    if model.get_output_embeddings() is None:
        return model(**inputs).logits[rows, columns]
    with head_at(model, rows, columns):
        return model(**inputs).logits[0]


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


def batches(lengths: Sequence[int], size: int, max_tokens: int, apart: float = math.inf) -> list[list[int]]:
    """Indices by ascending length in groups of at most `size` rows that share a pass.

    Rows of up to `apart` tokens share none with longer ones (see `rope_switch`).
    """
    waiting = deque(sorted(range(len(lengths)), key=lambda i: (lengths[i], i)))
    groups = []
    while waiting:
        candidates = [lengths[i] for i in itertools.islice(waiting, size)]
        near = sum(length <= apart for length in candidates)
        count = share_a_pass(candidates[: near or None], max_tokens)
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
    return context_limit(model.config)


def context_limit(config: ModelConfig) -> int | None:
    """The same of a configuration."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None  # XLNet says -1


def rope_switch(model: CausalLM) -> float:
    """Tokens of a pass beyond which RoPE takes other frequencies for all its rows (longrope, dynamic), or infinity."""
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    limits = [
        found.get("original_max_position_embeddings") or trained
        for found in _dicts(getattr(config, "rope_parameters", None))
        if found.get("rope_type") in SWITCHING_ROPE
    ]
    return min((limit for limit in limits if limit), default=math.inf)


def _dicts(value: object) -> Iterator[dict[str, Any]]:
    """A dict and all within it: models whose layers differ state their RoPE by kind of layer."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _dicts(part)


def check_causal(model: CausalLM) -> None:
    """Refuses a model that does not read from left to right, or has other than one row of logits for each token.

    One that cannot be run at all says so where it is run: its weights alone may be wanted, as in a merge.
    """
    ids = some_tokens(model, 5)
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    seen = []
    head = model.get_output_embeddings()
    handle = head and head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        with scoring_mode(model):
            one, two = (model(input_ids=given, use_cache=False).logits for given in (ids, other))
    except RuntimeError:
        return
    finally:
        if handle:
            handle.remove()
    name = type(model).__name__
    if any(states.shape[:-1] != ids.shape for states in (one, *seen)):
        raise InputError(f"{name} cannot be scored: it has logits for other positions than those of its tokens.")
    if differ(one[0, :-1], two[0, :-1]):
        raise InputError(
            f"{name} is no causal language model as configured: a later token changes what it says of earlier ones. "
            "An encoder such as BERT needs is_decoder: true in its config.json, and training as a decoder."
        )


def some_tokens(model: CausalLM, count: int) -> Tensor:
    """[1, count] ids from the middle of the vocabulary, away from the special tokens at its ends."""
    vocabulary = vocabulary_of(model)
    return (vocabulary // 2 + torch.arange(count, device=device_of(model)) % max(1, vocabulary // 4))[None]


def differ(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by more than rounding does. NaN is no difference: it is found where it is used."""
    rounding = HALF_ROUNDING if expected.dtype.itemsize == 2 else ROUNDING
    found, expected = found.double(), expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return bool((found - expected).norm() > rounding * spread)
