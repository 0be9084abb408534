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


def log_truth_ratio(paraphrased: float, perturbed: Sequence[float]) -> float:
    """log R = mean_j l_j - l: mean token log-probabilities of wrong answers against that of the right one.

    TOFU's code takes this geometric mean over the wrong answers; its paper
    an arithmetic one. In logarithms, so that the ratio of two answers that are both improbable is still their ratio:
    open-unlearning adds 1e-10 to the probability it divides by, and gives a collapsed model 0. Raises InputError where
    there is no wrong answer.
    """
    if not len(perturbed):
        raise InputError("a truth ratio needs at least one wrong answer beside the right one, got none.")
    return math.fsum(perturbed) / len(perturbed) - paraphrased


def truth_ratio_forget(log_ratio: float) -> float:
    """min(R, 1/R): 1 when right and wrong answers are equally probable (open-unlearning, `closer_to_1_better`)."""
    return math.exp(-abs(log_ratio))


def truth_ratio_retain(log_ratio: float) -> float:
    """max(0, 1 - R): 1 when the right answer is far more probable than the wrong ones (TOFU's model utility)."""
    return max(0.0, -math.expm1(min(log_ratio, 0.0)))


def _answer(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise InputError("an answer needs at least one token to be scored, got none.")
    return array
