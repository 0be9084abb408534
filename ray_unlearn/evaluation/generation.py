"""Examples to what a model says about them: exactly as greedy decoding goes, or no more of it than scores need."""

from __future__ import annotations

from collections.abc import Sequence

from ray_unlearn.data.tokens import encode
from ray_unlearn.metrics.generation import rouge_l_recall
from ray_unlearn.models.decoding import greedy
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example

CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
LOOK_EVERY = 16
"""New tokens between two looks at whether a completion's score can still change."""
UNSURE_WORDS = 3
"""Words at a text's end that its next tokens may still change: one unfinished, and what CLEAN_UP may join to it."""


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of new tokens: special tokens skipped, tokenisation spaces cleaned up."""
    return clean_up(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def clean_up(text: str) -> str:
    """The space removals of transformers 4's `clean_up_tokenization_spaces=True`, there made for every tokenizer.

    Version 5 ignores the flag for BPE tokenizers; the official scores were made with it.
    """
    for spaced, tight in CLEAN_UP:
        text = text.replace(spaced, tight)
    return text


def continuations(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    exact_texts: bool = True,
) -> list[str]:
    """What the model says after each raw prompt. Without `exact_texts` a row ends as soon as its score is certain:
    its text is then a beginning of the model's, and scores the same."""
    encoded = [encode(tokenizer, row.input, row.output) for row in rows]
    new = greedy(
        model,
        [row.ids[: row.prompt] for row in encoded],
        max_new_tokens,
        tokenizer,
        [row.ids[row.prompt :] for row in encoded],
        batch_size=batch_size,
        stop_early=lambda index, ids: not exact_texts and certain(tokenizer, rows[index], ids),
    )
    return [decode(tokenizer, ids) for ids in new]


def certain(tokenizer: Tokenizer, row: Example, ids: Sequence[int]) -> bool:
    """Whether a row's score is the same for every continuation of these new ids.

    A question is answered wrongly once the text is no beginning of the answer; a completion has
    full recall once its finished words have.
    """
    if row.kind == "qa":
        return not _letters(row.output).startswith(_letters(decode(tokenizer, ids)).rstrip("\ufffd"))
    if len(ids) % LOOK_EVERY:
        return False
    finished = decode(tokenizer, ids).split()[:-UNSURE_WORDS]
    return rouge_l_recall(row.output, " ".join(finished)) == 1.0


def _letters(text: str) -> str:
    """What two texts that are equal after strip().lower() have in common, at each of their beginnings too.

    Spaces go, since clean_up may still remove them; casefold makes a final sigma a sigma.
    """
    return "".join(text.lower().casefold().split())
