"""Metrics of a generated text against the expected one."""

from __future__ import annotations

from functools import lru_cache

from rouge_score import rouge_scorer


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
