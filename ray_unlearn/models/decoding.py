"""Greedy decoding that verifies a draft in one pass and decodes on, in slots, where the model departs from it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ray_unlearn.errors import InputError
from ray_unlearn.models.forward import (
    MAX_LOGITS,
    context_of,
    device_of,
    most_probable,
    picked_logits,
    right_padded,
    share_a_pass,
    vocabulary_of,
)
from ray_unlearn.protocols import CausalLM, Tokenizer

CACHE_BYTES = 2**30
"""Memory that the decoding rows' keys and values may take, where `batch_size` rows do not take more."""
StopEarly = Callable[[int, list[int]], bool]
"""(row, its new ids so far) -> whether the caller needs no more of them."""

PROCESSORS = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "token_healing": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "is_assistant": False,
    "stop_strings": None,
    "cache_config": None,
}
"""Settings of a generation config that change what `generate` makes, with the value under which they do not."""


@dataclass
class _Sequence:
    """A row on its way: its prompt, what it is expected to say, and what the model has said."""

    index: int
    prompt: Sequence[int]
    draft: Sequence[int]
    limit: int
    """New tokens at most."""
    new: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the verification pass."""
        return len(self.prompt) + len(self.draft)

    @property
    def end(self) -> int:
        """Tokens that the row may grow to."""
        return len(self.prompt) + self.limit


def greedy(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer,
    drafts: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 32,
    stop_early: StopEarly = lambda index, new: False,
) -> list[list[int]]:
    """New token ids of each prompt, most probable token first, up to EOS (kept), `max_new_tokens` or the context's end.

    `drafts` are continuations that the model may make; they cost one pass and change nothing: what
    the model says is compared with them as ids, token by token, and from where it departs it is
    decoded on. A pass over prompts has `batch_size` rows, a step of decoding as many as CACHE_BYTES
    hold, and not fewer. A `stop_early` row stops where it is.
    Raises InputError for logits that are NaN, and where nothing could end a row.
    """
    stops = _stops(model, tokenizer)
    context = context_of(model) or 10**9
    rows = []
    for index, prompt in enumerate(prompts):
        limit = min(max_new_tokens, context - len(prompt))
        if limit < 1:
            raise InputError(f"row {index + 1}'s prompt has {len(prompt)} tokens; the model's context is {context}.")
        draft = [] if drafts is None else list(drafts[index])[: limit - 1]
        rows.append(_Sequence(index, prompt, draft, limit))
    together = _fit_for_slots(model, rows)
    if together:
        _Decoder(model, tokenizer.pad_token_id, stops, batch_size, stop_early).run(together)
    for row in rows:
        if not row.new:
            row.new = _generate(model, row, tokenizer, stops)
    return [row.new for row in rows]


def _fit_for_slots(model: CausalLM, rows: Sequence[_Sequence]) -> list[_Sequence]:
    """The rows that may decode side by side: those that no window, state or processor keeps apart."""
    from ray_unlearn.models.cached_passes import decodes_in_slots, reach

    within = reach(model) if _is_plain(model) else 0
    fit = [row for row in rows if row.end <= within]
    return fit if fit and decodes_in_slots(model, max(row.end for row in fit)) else []


class _Decoder:
    """Rows enter by verification, live in the slots while they differ from their drafts, and leave when they end."""

    def __init__(self, model: CausalLM, pad: int, stops: set[int], batch_size: int, stop_early: StopEarly) -> None:
        from ray_unlearn.models.kv_cache import SlotCache

        self.model, self.pad, self.stops, self.batch_size, self.stop_early = model, pad, stops, batch_size, stop_early
        self.device = device_of(model)
        self.cache = SlotCache(self.device)
        self.slots = batch_size
        self.active: list[_Sequence] = []

    def run(self, rows: Sequence[_Sequence]) -> None:
        """Fills `new` of every row."""
        waiting = deque(sorted(rows, key=lambda row: (row.length, row.index)))
        longest = max(row.end for row in rows)
        while waiting or self.active:
            free = min(self.batch_size, self.slots - len(self.active))
            if waiting and 2 * free >= self.batch_size:
                self._verify(self._take(waiting, free), longest)
            else:
                self._decode(until=self.slots - -(-self.batch_size // 2) if waiting else 0)

    def _take(self, waiting: deque[_Sequence], free: int) -> list[_Sequence]:
        """The next rows, as many as fit into the slots, a pass and its logits."""
        candidates = list(itertools.islice(waiting, free))
        logits = itertools.accumulate(len(row.draft) + 1 for row in candidates)
        room = sum(count <= MAX_LOGITS // vocabulary_of(self.model) for count in logits)
        count = share_a_pass([row.length for row in candidates[: max(1, room)]])
        return [waiting.popleft() for _ in range(count)]

    def _verify(self, group: list[_Sequence], longest: int) -> None:
        """One pass over prompts and drafts; rows that depart from theirs move into the slots."""
        from ray_unlearn.models.kv_cache import bytes_of_token, whole_cache

        places = [(i, len(row.prompt) - 1 + k) for i, row in enumerate(group) for k in range(len(row.draft) + 1)]
        where = torch.tensor(places, device=self.device)
        ids = right_padded([[*row.prompt, *row.draft] for row in group], self.pad, self.device)
        cache = whole_cache()
        logits = picked_logits(self.model, where[:, 0], where[:, 1], cache, input_ids=ids)
        self.slots = max(self.batch_size, CACHE_BYTES // (bytes_of_token(cache) * longest))
        said = iter(most_probable(logits).tolist())
        going: list[int] = []
        for i, row in enumerate(group):
            predicted = [next(said) for _ in range(len(row.draft) + 1)]
            agreed = _agreement(predicted, row.draft, self.stops)
            row.new = predicted[: agreed + 1]
            if not self._ended(row):
                going.append(i)
        if going:
            self.cache.join(cache, going, [len(group[i].prompt) + len(group[i].new) - 1 for i in going])
            self.active += [group[i] for i in going]

    def _decode(self, until: int) -> None:
        """Steps until at most `until` rows go on. Slots of ended rows idle until a quarter of all have ended."""
        from ray_unlearn.models.cached_passes import read_in_slots

        alive = [True] * len(self.active)
        tokens = torch.tensor([row.new[-1] for row in self.active], device=self.device)
        while sum(alive) > until:
            tokens = most_probable(read_in_slots(self.model, self.cache, tokens))
            for slot, token in enumerate(tokens.tolist()):
                if alive[slot]:
                    self.active[slot].new.append(token)
                    alive[slot] = not self._ended(self.active[slot])
            kept = [slot for slot, goes_on in enumerate(alive) if goes_on]
            if 4 * len(kept) <= 3 * len(alive) or len(kept) <= until:
                self.cache.keep(kept)
                self.active = [self.active[slot] for slot in kept]
                tokens, alive = tokens[kept], [True] * len(kept)

    def _ended(self, row: _Sequence) -> bool:
        return row.new[-1] in self.stops or len(row.new) >= row.limit or self.stop_early(row.index, row.new)


def _agreement(predicted: Sequence[int], draft: Sequence[int], stops: set[int]) -> int:
    """How many of the draft's tokens the model predicts before it departs or ends."""
    for k, token in enumerate(draft):
        if predicted[k] != token or token in stops:
            return k
    return len(draft)


def _is_plain(model: CausalLM) -> bool:
    """Whether the model's own generation config leaves greedy decoding to the logits alone."""
    config = getattr(model, "generation_config", None)
    if getattr(config, "cache_implementation", None) == "quantized":
        return False
    return all(getattr(config, name, None) in (None, neutral) for name, neutral in PROCESSORS.items())


def _generate(model: CausalLM, row: _Sequence, tokenizer: Tokenizer, stops: set[int]) -> list[int]:
    """transformers' own loop for one row: models whose caches cannot be shared, and generation configs with processors.

    It ends where `greedy` does, whatever the generation config says of EOS.
    """
    ids = torch.tensor([list(row.prompt)], device=device_of(model))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=row.limit,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(stops),
        logits_processor=[_refuse_nan],
        return_dict_in_generate=False,
        tokenizer=tokenizer,
    )
    new: list[int] = out[0, len(row.prompt) :].tolist()
    return new


def _refuse_nan(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that changes nothing."""
    most_probable(scores)
    return scores


def _stops(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends a text: the generation config's, or the tokenizer's where it states none.

    There `generate` would go on to the last token asked for; a text is to stop at EOS.
    """
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stated = tokenizer.eos_token_id if stated is None else stated
    values = stated if isinstance(stated, (list, tuple)) else [stated]
    stops = {int(value) for value in values if value is not None}
    if not stops:
        raise InputError("neither the tokenizer nor the model's generation config has an EOS token: nothing would end.")
    return stops
