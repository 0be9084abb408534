"""Metrics of a generated text against the expected one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from rouge_score import rouge_scorer

from ray_unlearn.metrics.table import Metric


@lru_cache(maxsize=1)
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge_l_recall(expected: str, generated: str) -> float:
    """Share of the expected text's stemmed words that the longest common subsequence covers (ROUGE-L recall)."""
    return float(_scorer().score(expected, generated)["rougeL"].recall)


def rouge_l_f1(expected: str, generated: str) -> float:
    """2 P R / (P + R), P and R the shares of both texts' words in the longest common subsequence (Lin 2004)."""
    return float(_scorer().score(expected, generated)["rougeL"].fmeasure)


def rouge_1_recall(expected: str, generated: str) -> float:
    """Share of the expected text's stemmed words that the generated one has too, each as often as it has it."""
    return float(_scorer().score(expected, generated)["rouge1"].recall)


def rouge_1_f1(expected: str, generated: str) -> float:
    """2 P R / (P + R), P and R the shares of both texts' words that they have in common, in any order (Lin 2004)."""
    return float(_scorer().score(expected, generated)["rouge1"].fmeasure)


def exact_match(expected: str, generated: str) -> float:
    """1.0 if the texts are equal after strip().lower(), else 0.0."""
    return float(expected.strip().lower() == generated.strip().lower())


def _rouge(compute: Callable[[str, str], float], formula: str) -> Metric:
    return Metric(
        compute=compute, signals=("expected", "generated"),
        formula=formula, range=(0, 1), best={"forget": 0.0, "retain": 1.0},
        collapsed="0, but for stop words by chance; noise of many words gains recall",
        source="Lin 2004; TOFU (recall), MUSE (F1); rouge_score with stemmer",
    )  # fmt: skip


METRICS = {
    "rouge_1_f1": _rouge(rouge_1_f1, "2PR/(P+R) of common words"),
    "rouge_1_recall": _rouge(rouge_1_recall, "share of the expected words that are generated"),
    "rouge_l_f1": _rouge(rouge_l_f1, "2PR/(P+R) of the longest common subsequence"),
    "rouge_l_recall": _rouge(rouge_l_recall, "share of the expected words in the longest common subsequence"),
}
