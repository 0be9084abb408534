"""What metrics are called with, made from a model and the data: each signal once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, TypeVar

from ray_unlearn.data.contrasts import Contrasts, contrasts
from ray_unlearn.data.tokens import Encoded, encode
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.spec import EvalSet
from ray_unlearn.evaluation.work_units import ALONE, BATCHES_IN_UNIT, Shard, balanced_shares
from ray_unlearn.metrics.memorisation import log_truth_ratio, mean_log_prob
from ray_unlearn.metrics.table import REFERENCE
from ray_unlearn.models.token_statistics import TokenStatistics, gradient_norms, token_statistics
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example, Scores

R = TypeVar("R")
RowWork = Callable[[CausalLM, Sequence[Encoded]], list[R]]
"""(model, rows) -> a result for each row. It can be pickled."""


class Subject(Protocol):
    """A model that metrics are of, wherever it is held, and what is known of it already."""

    @property
    def texts(self) -> Sequence[str] | None:
        """Its generations for the forget rows, then the retain rows; None where none were made."""

    @property
    def scores(self) -> Scores | None:
        """Its scores; None where it was not scored."""

    def compute(self, work: RowWork[R], shares: Sequence[Sequence[Encoded]]) -> list[list[R]]:
        """What the work makes of each share of the rows with this model."""


@dataclass(frozen=True, kw_only=True)
class ModelHere:
    """A Subject in this process."""

    model: CausalLM
    texts: Sequence[str] | None = None
    scores: Scores | None = None
    shard: Shard = ALONE
    """This process's part, where several hold the model."""

    def compute(self, work: RowWork[R], shares: Sequence[Sequence[Encoded]]) -> list[list[R]]:
        """One share after another."""
        return self.shard.join([work(self.model, share) for share in self.shard.take(shares)], len(shares))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is the same for a model and its reference."""

    data: EvalSet
    tokenizer: Tokenizer
    wanted: frozenset[str]
    """Names of all signals that will be asked for, so that one pass over the data gives what belongs together."""
    batch_size: int = 32

    def rows(self, group: str) -> Sequence[Example]:
        """The rows of a split."""
        return {"forget": self.data.forget, "retain": self.data.retain}[group]

    def contrasts(self, split: str) -> Contrasts:
        """The right and wrong answers of a split's rows."""
        return contrasts(self.rows(split), split)

    def part(self, group: str) -> slice:
        """Where a group stands in a list of forget, then retain rows, or of members, then the others."""
        data = self.data
        return {
            "forget": slice(None, len(data.forget)),
            "retain": slice(len(data.forget), None),
            "member": slice(None, len(data.members)),
            "nonmember": slice(len(data.members), None),
        }[group]

    @property
    def texts(self) -> list[str]:
        """Members, then the others."""
        return [*self.data.members, *self.data.nonmembers]

    @cached_property
    def documents(self) -> list[Encoded]:
        """Members, then the others; the first token has nothing before it."""
        rows = [Encoded(tuple(self.tokenizer(text)["input_ids"]), 1) for text in self.texts]
        for text, row in zip(self.texts, rows, strict=True):
            if len(row.ids) < 2:
                raise InputError(f"an MIA document needs at least two tokens to have a loss, got {text!r}.")
        return rows


class Signals:
    """The signals of one model, by name and group."""

    def __init__(self, subject: Subject, inputs: Inputs, reference: Signals | None = None) -> None:
        self.subject, self.inputs, self.reference = subject, inputs, reference
        self._answers: dict[str, list[TokenStatistics]] = {}
        self._log_ratios: dict[str, list[float]] = {}

    def column(self, name: str, group: str) -> Sequence[object]:
        """A signal of each row or document of a group, in order."""
        if name.startswith(REFERENCE):
            assert self.reference is not None
            return self.reference.column(name.removeprefix(REFERENCE), group)
        return MAKERS[name](self, group)

    def facts(self, names: Sequence[str], group: str) -> dict[str, str]:
        """What is to be said, beside a metric's value, of how its signals of a group were made."""
        known = [FACTS[name](self.inputs, group) for name in names if name in FACTS]
        return {key: value for facts in known for key, value in facts.items()}

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Those of the signals that cannot be made, as the model came without what they are."""
        mine = [name for name in names if name in GIVEN and GIVEN[name](self.subject) is None]
        if self.reference is None:
            return mine
        theirs = [name.removeprefix(REFERENCE) for name in names if name.startswith(REFERENCE)]
        return mine + [REFERENCE + name for name in self.reference.lacks(theirs)]

    def answers(self, split: str) -> list[TokenStatistics]:
        """Of each row of a split, over the answer."""
        if split not in self._answers:
            self._answers[split] = self._statistics([(row.input, row.output) for row in self.inputs.rows(split)])
        return self._answers[split]

    def log_truth_ratios(self, split: str) -> list[float]:
        """Of each row of a split, log R of right against wrong answers."""
        if split not in self._log_ratios:
            known = self.inputs.contrasts(split)
            right, wrong = (self._mean_log_probs(split, answers) for answers in (known.right, known.wrong))
            self._log_ratios[split] = [log_truth_ratio(*row) for row in zip(right, wrong, strict=True)]
        return self._log_ratios[split]

    def _mean_log_probs(self, split: str, answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Of each row of a split, the mean token log-probability of each of its answers."""
        rows = self.inputs.rows(split)
        if answers == [[row.output] for row in rows]:
            found = iter(self.answers(split))
        else:
            texts = [(row.input, answer) for row, given in zip(rows, answers, strict=True) for answer in given]
            found = iter(self._statistics(texts))
        return [[mean_log_prob(next(found).log_probs) for _ in given] for given in answers]

    @cached_property
    def documents(self) -> list[TokenStatistics]:
        """Of members, then the others."""
        moments = not self.inputs.wanted.isdisjoint(("document_means", "document_deviations"))
        return self._over(self._token_statistics(moments), self.inputs.documents)

    @cached_property
    def gradient_norms(self) -> list[list[float]]:
        """Of members, then the others."""
        return self._over(gradient_norms, self.inputs.documents)

    def _statistics(self, texts: Sequence[tuple[str, str]]) -> list[TokenStatistics]:
        """Of answers to inputs."""
        rows = [encode(self.inputs.tokenizer, *text) for text in texts]
        return self._over(self._token_statistics(moments=False), rows)

    def _token_statistics(self, moments: bool) -> RowWork[TokenStatistics]:
        return partial(
            token_statistics, tokenizer=self.inputs.tokenizer, moments=moments, batch_size=self.inputs.batch_size
        )

    def _over(self, work: RowWork[R], rows: Sequence[Encoded]) -> list[R]:
        """The work on all rows, in shares that do not depend on who does them."""
        shares = balanced_shares([len(row.ids) for row in rows], BATCHES_IN_UNIT * self.inputs.batch_size)
        results = self.subject.compute(work, [[rows[i] for i in share] for share in shares])
        found: dict[int, R] = {}
        for share, result in zip(shares, results, strict=True):
            found.update(zip(share, result, strict=True))
        return [found[index] for index in range(len(rows))]


def _of_rows(take: Callable[[Example], object]) -> Callable[[Signals, str], list[object]]:
    return lambda signals, group: [take(row) for row in signals.inputs.rows(group)]


def _of_answers(take: Callable[[TokenStatistics], object]) -> Callable[[Signals, str], list[object]]:
    return lambda signals, group: [take(one) for one in signals.answers(group)]


def _of_documents(take: Callable[[TokenStatistics], object]) -> Callable[[Signals, str], list[object]]:
    return lambda signals, group: [take(one) for one in signals.documents[signals.inputs.part(group)]]


def _generated(signals: Signals, group: str) -> Sequence[str]:
    texts, data = signals.subject.texts, signals.inputs.data
    assert texts is not None
    rows = len(data.forget) + len(data.retain)
    if len(texts) != rows:
        raise InputError(f"there must be one generation for each row, got {len(texts)} for {rows} rows.")
    return texts[signals.inputs.part(group)]


def _scores(signals: Signals, group: str) -> list[dict[str, float]]:
    """Every objective that was measured, then every term."""
    scores = signals.subject.scores
    assert scores is not None
    return [scores.headlines() | scores.terms]


MAKERS: dict[str, Callable[[Signals, str], Sequence[object]]] = {
    "split": lambda signals, group: [group] * len(signals.inputs.rows(group)),
    "expected": _of_rows(lambda row: row.output),
    "generated": _generated,
    "answer_log_probs": _of_answers(lambda one: one.log_probs),
    "answer_matches": _of_answers(lambda one: one.matches),
    "log_truth_ratio": Signals.log_truth_ratios,
    "document_text": lambda signals, group: signals.inputs.texts[signals.inputs.part(group)],
    "document_log_probs": _of_documents(lambda one: one.log_probs),
    "document_means": _of_documents(lambda one: one.means),
    "document_deviations": _of_documents(lambda one: one.deviations),
    "document_gradient_norms": lambda signals, group: signals.gradient_norms[signals.inputs.part(group)],
    "scores": _scores,
}
"""The one place that makes each signal; Metric.signals says what each is."""
FACTS: dict[str, Callable[[Inputs, str], Mapping[str, str]]] = {
    "log_truth_ratio": lambda inputs, group: inputs.contrasts(group).facts,
}
"""Signals that can be made in several ways, and the words for the way that was taken."""
GIVEN: dict[str, Callable[[Subject], object]] = {
    "generated": lambda subject: subject.texts,
    "scores": lambda subject: subject.scores,
}
"""Signals that a Subject brings, or lacks."""
