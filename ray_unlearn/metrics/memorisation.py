"""Metrics of a reference answer under teacher forcing: how probable each of its tokens is to the model.

`log_probs` are log p(y_t | input, y_<t) in nats, `matches` say whether y_t is the most probable token; both are over
the answer's tokens without EOS. Each raises InputError for an answer of no tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_unlearn.errors import InputError
from ray_unlearn.metrics.summaries import pooled_tokens
from ray_unlearn.metrics.table import Metric

LARGEST_EXPONENT = 700.0
"""exp of this still is a float."""


def answer_probability(log_probs: ArrayLike) -> float:
    """P(y | x)^(1/T) = exp(mean_t log p_t): its tokens' geometric mean probability (TOFU, Maini et al. 2024)."""
    return math.exp(mean_log_prob(log_probs))


def mean_log_prob(log_probs: ArrayLike) -> float:
    """1/T sum_t log p_t, in nats."""
    return float(np.mean(_answer(log_probs)))


def perplexity(log_probs: ArrayLike) -> float:
    """exp(-mean_t log p_t); of several answers, of all their tokens together, so that no short one dominates."""
    return math.exp(min(-mean_log_prob(log_probs), LARGEST_EXPONENT))


def exact_memorisation(matches: ArrayLike) -> float:
    """Share of the answer's tokens that are the model's most probable (Tirumala et al. 2022)."""
    return float(np.mean(_answer(matches)))


def extraction_strength(matches: ArrayLike) -> float:
    """1 - k/T, k the fewest leading answer tokens after which greedy decoding gives all the others
    (Carlini et al. 2021; Wang et al. 2025). 0 when the last token is wrong: k = T, and nothing was extracted."""
    wrong = np.flatnonzero(~_answer(matches).astype(bool))
    return 1 - (int(wrong[-1]) + 1 if wrong.size else 0) / np.size(matches)


def log_truth_ratio(right: Sequence[float], wrong: Sequence[float]) -> float:
    """log R = mean_j l_j - mean_i l_i: mean token log-probabilities of wrong answers against those of right ones.

    The right ones are to be paraphrases of what was trained, so that R does not measure a text learnt by heart (TOFU).
    TOFU's code takes this geometric mean over the wrong answers, and open-unlearning over several right ones too; the
    paper an arithmetic one. In logarithms, so that the ratio of two answers that are both improbable is still their
    ratio: open-unlearning adds 1e-10 to the probability it divides by, and gives a collapsed model 0. Raises InputError
    where one side is empty.
    """
    if not len(right) or not len(wrong):
        raise InputError(
            f"a truth ratio needs at least one right and one wrong answer, got {len(right)} and {len(wrong)}."
        )
    return math.fsum(wrong) / len(wrong) - math.fsum(right) / len(right)


def truth_ratio(log_ratio: float, split: str) -> float:
    """How near a row's truth ratio R is to its best: min(R, 1/R) of a forget row, 1 when right and wrong answers are
    equally probable (open-unlearning, `closer_to_1_better`); max(0, 1 - R) of a retain row, 1 when the right answer is
    far more probable than the wrong ones (TOFU's model utility)."""
    return math.exp(-abs(log_ratio)) if split == "forget" else max(0.0, -math.expm1(min(log_ratio, 0.0)))


def _answer(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise InputError("an answer needs at least one token to be scored, got none.")
    return array


_MEMORISED = {"forget": 0.0, "retain": 1.0}
METRICS = {
    "answer_probability": Metric(
        compute=answer_probability,
        signals=("answer_log_probs",),
        formula="mean over rows of exp(mean_t log p_t), over the answer's tokens without the EOS that TOFU and "
        "open-unlearning count too",
        range=(0, 1),
        best=_MEMORISED,
        collapsed="0 to 1/V (V: vocabulary), on retain too",
        source="TOFU, Maini et al. 2024, sec. 2.2",
    ),
    "truth_ratio": Metric(
        compute=truth_ratio,
        signals=("log_truth_ratio", "split"),
        formula="R = exp(mean_j l_j - mean_i l_i), l mean token log-probabilities of wrong answers j (perturbed, or of "
        "other rows) and of right ones i (paraphrased, or the trained one; the result says which); "
        "mean over forget rows of min(R, 1/R), over retain rows of max(0, 1 - R)",
        range=(0, 1),
        best={"forget": 1.0, "retain": 1.0},
        collapsed="uniform: 1 on forget, 0 on retain",
        source="TOFU, Maini et al. 2024, sec. 2.2, with its code's geometric mean over wrong answers",
    ),
    "exact_memorisation": Metric(
        compute=exact_memorisation,
        signals=("answer_matches",),
        formula="mean over rows of mean_t [argmax p_t = y_t]",
        range=(0, 1),
        best=_MEMORISED,
        collapsed="the share of the one token it says",
        source="Tirumala et al. 2022; Wang et al. 2025, open-unlearning",
    ),
    "extraction_strength": Metric(
        compute=extraction_strength,
        signals=("answer_matches",),
        formula="mean over rows of 1 - k/T, k the fewest leading tokens after which all others are argmax",
        range=(0, 1),
        best=_MEMORISED,
        collapsed="0",
        source="Carlini et al. 2021; Wang et al. 2025; 0 where open-unlearning's code gives 1/T",
    ),
    "perplexity": Metric(
        compute=perplexity,
        signals=("answer_log_probs",),
        summary=pooled_tokens,
        formula="exp(-sum log p / number of tokens) over all answer tokens of a split",
        range=(1, math.inf),
        best={"forget": math.inf, "retain": 1.0},
        collapsed="V for a uniform model, far above V for a wrong and sure one; on retain too",
        source="Jelinek et al. 1977",
    ),
}
