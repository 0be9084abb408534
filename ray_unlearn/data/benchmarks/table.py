"""What a data set is that comes with a model which knows it: a row of DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_unlearn.protocols import CausalLM, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set, the target that is trained on it, and the reference that is trained without its forget rows."""

    settings: type[Any]
    """A frozen dataclass of its sizes, with defaults; `seed`, `epochs`, `batch_size` and `learning_rate` among them,
    by which target and reference are trained. The functions below are called with one, and the same one makes the
    same bytes on any machine."""
    write: Callable[[Any, Path], None]
    """(settings, folder): writes forget.jsonl, retain.jsonl, mia_member.jsonl, mia_nonmember.jsonl and mmlu/."""
    texts: Callable[[Any, bool], list[tuple[str, str]]]
    """(settings, with_forget) -> the (prompt, answer) pairs that the target is trained on, or the reference without."""
    untrained: Callable[[Any], tuple[CausalLM, Tokenizer]]
    """settings -> the model and the tokenizer before that training."""
    format: int = 1
    """Goes up when the files change under the same settings, so that no old cache is taken."""
    meaning: str
    source: str
