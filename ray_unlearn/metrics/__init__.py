"""Metrics: pure functions of strings, losses and probabilities; one table with direction, range and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from ray_unlearn.metrics.aggregate import cell_terms, final_score, harmonic_mean, row_values, task_terms
from ray_unlearn.metrics.generation import exact_match, rouge_1_f1, rouge_1_recall, rouge_l_f1, rouge_l_recall
from ray_unlearn.metrics.intervals import objective_intervals, with_documents
from ray_unlearn.metrics.membership import (
    auc,
    gradient_norm_signal,
    loss_signal,
    mia_score,
    min_k,
    min_k_plus_plus,
    reference_signal,
    zlib_signal,
)
from ray_unlearn.metrics.memorisation import (
    answer_probability,
    exact_memorisation,
    extraction_strength,
    log_truth_ratio,
    perplexity,
)
from ray_unlearn.metrics.privacy import forget_quality, privleak, score_differences
from ray_unlearn.tables import Table

__all__ = [
    "METRICS",
    "Metric",
    "auc",
    "cell_terms",
    "exact_match",
    "final_score",
    "harmonic_mean",
    "mia_score",
    "objective_intervals",
    "row_values",
    "task_terms",
    "with_documents",
]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: what it is, which value is best, and what not to be fooled by."""

    compute: Callable[..., Any]
    family: str
    """What it is computed from: `official` (always measured), `generation`, `answer`, `membership` or `privacy`."""
    formula: str
    range: tuple[float, float]
    best: dict[str, float]
    """The best value of each part that is reported: nearer to it is better. `forget` and `retain` are the rows'."""
    collapsed: str
    """What a model scores that has lost its language (one token for ever, or noise), so that it is not taken for one
    that has forgotten."""
    source: str
    needs_reference: bool = False
    """Whether it takes a second model, trained without the forget set."""


OFFICIAL = "SemEval-2025 Task 4, official evaluation"
SPLITS = {"forget": 0.0, "retain": 1.0}
TOLD = {"auc": 0.5, "tpr_at_1_percent_fpr": 0.01}


def _official(compute: Callable[..., Any], formula: str, collapsed: str, best: dict[str, float]) -> Metric:
    return Metric(
        compute=compute, family="official", formula=formula, range=(0, 1), best=best, collapsed=collapsed,
        source=OFFICIAL,
    )  # fmt: skip


def _generation(compute: Callable[..., Any], formula: str) -> Metric:
    return Metric(
        compute=compute, family="generation", formula=formula, range=(0, 1), best=SPLITS,
        collapsed="0, but for stop words by chance; noise of many words gains recall",
        source="Lin 2004; TOFU (recall), MUSE (F1); rouge_score with stemmer",
    )  # fmt: skip


def _membership(signal: Callable[..., Any], formula: str, source: str, reference: bool = False) -> Metric:
    return Metric(
        compute=signal, family="membership", formula=f"AUC and TPR at 1 % FPR of {formula}, low for members",
        range=(0, 1), best=TOLD, needs_reference=reference, source=source,
        collapsed="AUC near 0.5 by ignorance, or near 0 where the forget text was driven out; see perplexity on retain",
    )  # fmt: skip


_ROWS: dict[str, Metric] = {
    "regurgitation": _official(rouge_l_recall, "ROUGE-L recall of sc rows; forget terms 1 - x", "0", SPLITS),
    "knowledge": _official(exact_match, "equality after strip().lower() of qa rows; forget terms 1 - x", "0", SPLITS),
    "task_aggregate": _official(harmonic_mean, "harmonic mean of the terms", "0: no retain answer", {"value": 1}),
    "mia_score": _official(mia_score, "1 - 2 |AUC - 0.5|", "anything: 0 if driven out, 1 by ignorance", {"value": 1}),
    "final": _official(final_score, "mean of task aggregate, MIA score, utility", "up to 0.42", {"value": 1}),
    "rouge_1_f1": _generation(rouge_1_f1, "2PR/(P+R) of common words"),
    "rouge_1_recall": _generation(rouge_1_recall, "share of the expected words that are generated"),
    "rouge_l_f1": _generation(rouge_l_f1, "2PR/(P+R) of the longest common subsequence"),
    "rouge_l_recall": _generation(rouge_l_recall, "share of the expected words in the longest common subsequence"),
    "answer_probability": Metric(
        compute=answer_probability,
        family="answer",
        formula="mean over rows of exp(mean_t log p_t)",
        range=(0, 1),
        best=SPLITS,
        collapsed="0 to 1/V (V: vocabulary), on retain too",
        source="TOFU, Maini et al. 2024, sec. 2.2",
    ),
    "truth_ratio": Metric(
        compute=log_truth_ratio,
        family="answer",
        formula="R = exp(mean_j l_j - l), l mean token log-probabilities of the right and of wrong answers; "
        "mean over forget rows of min(R, 1/R), over retain rows of max(0, 1 - R)",
        range=(0, 1),
        best={"forget": 1.0, "retain": 1.0},
        collapsed="uniform: 1 on forget, 0 on retain",
        source="TOFU, Maini et al. 2024, sec. 2.2, with its code's geometric mean over wrong answers",
    ),
    "exact_memorisation": Metric(
        compute=exact_memorisation,
        family="answer",
        formula="mean over rows of mean_t [argmax p_t = y_t]",
        range=(0, 1),
        best=SPLITS,
        collapsed="the share of the one token it says",
        source="Tirumala et al. 2022; Wang et al. 2025, open-unlearning",
    ),
    "extraction_strength": Metric(
        compute=extraction_strength,
        family="answer",
        formula="mean over rows of 1 - k/T, k the fewest leading tokens after which all others are argmax",
        range=(0, 1),
        best=SPLITS,
        collapsed="0",
        source="Carlini et al. 2021; Wang et al. 2025; 0 where open-unlearning's code gives 1/T",
    ),
    "perplexity": Metric(
        compute=perplexity,
        family="answer",
        formula="exp(-sum log p / number of tokens) over all answer tokens of a split",
        range=(1, inf),
        best={"forget": inf, "retain": 1.0},
        collapsed="V for a uniform model, far above V for a wrong and sure one; on retain too",
        source="Jelinek et al. 1977",
    ),
    "mia_loss": _membership(loss_signal, "-mean log p_t", "Yeom et al. 2018"),
    "mia_zlib": _membership(zlib_signal, "loss / compressed bytes", "Carlini et al. 2021"),
    "mia_reference": _membership(reference_signal, "loss - loss of the reference", "Carlini et al. 2021", True),
    "mia_gradient_norm": _membership(
        gradient_norm_signal, "mean over parameter tensors of the loss gradient's 2-norm", "Wang et al. 2024"
    ),
    "mia_min_k": _membership(min_k, "-mean of the lowest 40 % of log p_t", "Shi et al. 2023; 40 % as in MUSE"),
    "mia_min_k_plus_plus": _membership(
        min_k_plus_plus, "min-k of (log p_t - mu_t) / sigma_t over the vocabulary", "Zhang et al. 2024"
    ),
    "privleak": Metric(
        compute=privleak,
        family="privacy",
        formula="100 (AUC_ref - AUC) / (1 - AUC_ref) of min-k, in percent",
        range=(-100, inf),
        best={"value": 0.0},
        collapsed="near 0 by ignorance, or far above 0 where the forget text was driven out",
        source="MUSE, Shi et al. 2024",
        needs_reference=True,
    ),
    "forget_quality": Metric(
        compute=forget_quality,
        family="privacy",
        formula="p-value of the two-sample KS test of the forget rows' truth ratios, model against reference",
        range=(0, 1),
        best={"value": 1.0},
        collapsed="near 0: its ratios all lie at 1",
        source="TOFU, Maini et al. 2024, sec. 2.2",
        needs_reference=True,
    ),
    "score_differences": Metric(
        compute=score_differences,
        family="privacy",
        formula="every term and objective, less the reference's",
        range=(-1, 1),
        best={"difference": 0.0},
        collapsed="task_aggregate near -1; its forget terms stay near 0 or above, its retain terms fall far below",
        source="this project; retraining as the standard: Maini et al. 2024",
        needs_reference=True,
    ),
}
METRICS = Table("metric", Metric, _ROWS)
