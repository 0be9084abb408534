"""Metrics beyond the shared task's, chosen by name: a model and examples to their values and intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from ray_unlearn import metrics
from ray_unlearn.data.tokens import Encoded, encode
from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.evaluation.spec import EvalSet
from ray_unlearn.evaluation.work_units import BATCHES_IN_UNIT, balanced_shares
from ray_unlearn.metrics import METRICS, membership, memorisation
from ray_unlearn.metrics.intervals import limits, membership_resamples, ratio_interval
from ray_unlearn.metrics.privacy import score_differences
from ray_unlearn.models.token_statistics import TokenStatistics, gradient_norms, token_statistics
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example, Scores, document_id

DIFFERENCES = "score_differences"
WRONG_ANSWERS = 3
"""Other rows' answers that a truth ratio compares with, where the data bring no perturbed answers."""

Work = Callable[[Any, Sequence[Any]], list[Any]]
Spread = Callable[[Work, Any, Sequence[Sequence[Any]]], list[list[Any]]]
"""(work, model, shares) -> work(model, share) of each share of the rows, done here or by workers that hold the model.
Work can be pickled."""
MetricParts = dict[str, dict[str, Any]]
"""Part (forget, retain, auc, ...) -> value, and interval where there is one."""


def _here(work: Work, model: CausalLM, shares: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [work(model, share) for share in shares]


def extra_names(names: Sequence[str]) -> list[str]:
    """The named metrics without those that are always measured, each once; raises InputError for an unknown name."""
    for name in names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    return [name for name in dict.fromkeys(names) if METRICS[name].family != "official"]


def more_metrics(
    names: Sequence[str],
    model: Any,
    tokenizer: Tokenizer,
    data: EvalSet,
    *,
    texts: Sequence[str] | None = None,
    scores: Scores | None = None,
    reference: Any = None,
    reference_texts: Sequence[str] | None = None,
    reference_scores: Scores | None = None,
    batch_size: int = 32,
    seed: int = 0,
    spread: Spread = _here,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, MetricParts]:
    """Metric -> part -> {value, interval} of the named metrics, as they stand under `metrics` in scores.json.

    `texts` are the model's generations for the forget rows, then the retain rows; ROUGE needs them. `reference` is a
    model with the same tokenizer that was trained without the forget set; with it every part also has `reference`,
    that model's value, and `difference` from it; score differences need the `scores` of both. Wrong answers are the
    rows' own perturbed ones, or other rows' answers where none has any (see wrong_answers). Models are touched by
    `spread` alone. Raises InputError, before any work, for an unknown name or a missing input.
    """
    chosen = check_inputs(names, data, reference is not None)
    _check_texts(chosen, data, texts)
    if DIFFERENCES in chosen and (scores is None or reference_scores is None):
        raise InputError(f"metric {DIFFERENCES!r} compares the scores of two models, and they were not given.")
    wrong = _wrong(chosen, data)
    shared = _Shared(tokenizer, data, wrong, "mia_min_k_plus_plus" in chosen, batch_size, seed, spread)
    subject = _Subject(model, texts, scores, shared)
    retrained = None if reference is None else _Subject(reference, reference_texts, reference_scores, shared)
    found = {}
    for name in chosen:
        log(f"measuring {name}")
        found[name] = _measure(name, subject, retrained)
        if retrained is not None and not METRICS[name].needs_reference and _has_inputs(name, retrained):
            _compare(found[name], _measure(name, retrained, None))
    return found


def check_inputs(names: Sequence[str], data: EvalSet, reference: bool) -> list[str]:
    """`extra_names`, whose data and reference are there; raises InputError for a name whose inputs are not, saying
    which."""
    chosen = extra_names(names)
    for name in chosen:
        metric = METRICS[name]
        if metric.needs_reference and not reference:
            raise InputError(f"metric {name!r} compares with a model trained without the forget set; give a reference.")
        if metric.family == "membership" or name == "privleak":
            if not (data.members and data.nonmembers):
                raise InputError(f"metric {name!r} needs MIA documents; give --mia-member and --mia-nonmember.")
        elif not data.forget:
            raise InputError(f"metric {name!r} needs forget rows, got none.")
    return chosen


def _check_texts(names: Sequence[str], data: EvalSet, texts: Sequence[str] | None) -> None:
    """Refuses generations that are not there, or not one for each row."""
    for name in names:
        if METRICS[name].family == "generation" and texts is None:
            raise InputError(f"metric {name!r} needs the generations of the rows, and none were made.")
    rows = len(data.forget) + len(data.retain)
    if texts is not None and len(texts) != rows:
        raise InputError(f"there must be one generation for each row, got {len(texts)} for {rows} rows.")


def _wrong(names: Sequence[str], data: EvalSet) -> dict[str, list[list[str]]]:
    """Split -> wrong answers of each row, where a metric asks for them."""
    if not {"truth_ratio", "forget_quality"} & set(names):
        return {}
    splits = {"forget": data.forget} | ({"retain": data.retain} if "truth_ratio" in names else {})
    found = {}
    for split, rows in splits.items():
        bare = [row.id for row in rows if not row.perturbed]
        if bare and len(bare) < len(rows):
            raise InputError(
                f"{len(bare)} of the {split} set's {len(rows)} rows have no perturbed answer ({bare[0]!r} the first); "
                "give at least one for every row of a set, or none at all."
            )
        found[split] = wrong_answers(rows) if bare else [list(row.perturbed) for row in rows]
    return found


def wrong_answers(rows: Sequence[Example], count: int = WRONG_ANSWERS) -> list[list[str]]:
    """For each row up to `count` different wrong answers: those of the rows that follow it, in a circle, among the rows
    of its task and kind with the same question number (the last character of the id), or of its task and kind alone
    where that number has no other answer.

    Raises InputError for a row whose task and kind hold no other answer.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        for key in _peers(row):
            groups.setdefault(key, []).append(place)
    found = []
    for place, row in enumerate(rows):
        answers = next(filter(None, (_following(rows, groups[key], place, count) for key in _peers(row))), None)
        if answers is None:
            raise InputError(
                f"a truth ratio needs wrong answers, and row {row.id!r} has none: all rows of {row.task}/{row.kind} "
                f"have the answer {row.output!r:.60}. Give perturbed answers, or leave truth_ratio out."
            )
        found.append(answers)
    return found


def _peers(row: Example) -> list[tuple[str, ...]]:
    number = row.id[-1] if document_id(row.id) != row.id else ""
    return [(row.task, row.kind, number), (row.task, row.kind)]


def _following(rows: Sequence[Example], group: Sequence[int], place: int, count: int) -> list[str]:
    """Up to `count` different answers of a group's rows after the one at `place`, other than its own."""
    start = group.index(place)
    answers = {rows[place].output.strip().lower(): ""}
    for other in (*group[start + 1 :], *group[:start]):
        answers.setdefault(rows[other].output.strip().lower(), rows[other].output)
        if len(answers) > count:
            break
    return list(answers.values())[1:]


@dataclass(frozen=True)
class _Shared:
    """What is the same for the model and its reference."""

    tokenizer: Tokenizer
    data: EvalSet
    wrong: dict[str, list[list[str]]]
    moments: bool
    batch_size: int
    seed: int
    spread: Spread

    def splits(self) -> list[tuple[str, Sequence[Example]]]:
        """The splits that have rows."""
        return [(name, rows) for name, rows in (("forget", self.data.forget), ("retain", self.data.retain)) if rows]

    @cached_property
    def documents(self) -> list[Encoded]:
        """Members, then non-members; the first token has nothing before it."""
        texts = [*self.data.members, *self.data.nonmembers]
        rows = [Encoded(tuple(self.tokenizer(text)["input_ids"]), 1) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row.ids) < 2:
                raise InputError(f"an MIA document needs at least two tokens to have a loss, got {text!r}.")
        return rows


class _Subject:
    """A model and the signals that several metrics share, each computed when first asked for."""

    def __init__(self, model: CausalLM, texts: Sequence[str] | None, scores: Scores | None, shared: _Shared) -> None:
        self.model, self.texts, self.scores, self.shared = model, texts, scores, shared

    def signals(self, rows: Sequence[Encoded], moments: bool = False) -> list[TokenStatistics]:
        """Token signals of rows."""
        shared = self.shared
        work = partial(token_statistics, tokenizer=shared.tokenizer, moments=moments, batch_size=shared.batch_size)
        return self._spread(work, rows)

    def _spread(self, work: Work, rows: Sequence[Encoded]) -> list[Any]:
        """The work on all rows, in shares that do not depend on who does them."""
        shares = balanced_shares([len(row.ids) for row in rows], BATCHES_IN_UNIT * self.shared.batch_size)
        results = self.shared.spread(work, self.model, [[rows[i] for i in share] for share in shares])
        found: dict[int, Any] = {}
        for share, result in zip(shares, results, strict=True):
            found.update(zip(share, result, strict=True))
        return [found[index] for index in range(len(rows))]

    @cached_property
    def answers(self) -> dict[str, list[TokenStatistics]]:
        """Of each split's rows, over the answer."""
        return {
            split: self.signals([encode(self.shared.tokenizer, row.input, row.output) for row in rows])
            for split, rows in self.shared.splits()
        }

    @cached_property
    def log_ratios(self) -> dict[str, list[float]]:
        """Of each split's rows, log R of right against wrong answers."""
        return {
            split: self._log_ratios(split, rows) for split, rows in self.shared.splits() if split in self.shared.wrong
        }

    def _log_ratios(self, split: str, rows: Sequence[Example]) -> list[float]:
        wrong = self.shared.wrong[split]
        texts = [(row.input, answer) for row, answers in zip(rows, wrong, strict=True) for answer in answers]
        signals = iter(self.signals([encode(self.shared.tokenizer, *text) for text in texts]))
        ratios = []
        for right, answers in zip(self.answers[split], wrong, strict=True):
            others = [memorisation.mean_log_prob(next(signals).log_probs) for _ in answers]
            ratios.append(memorisation.log_truth_ratio(memorisation.mean_log_prob(right.log_probs), others))
        return ratios

    @cached_property
    def documents(self) -> list[TokenStatistics]:
        """Of members, then non-members."""
        return self.signals(self.shared.documents, self.shared.moments)

    @cached_property
    def gradient_norms(self) -> list[list[float]]:
        """Of members, then non-members."""
        return self._spread(gradient_norms, self.shared.documents)


def _has_inputs(name: str, subject: _Subject) -> bool:
    return METRICS[name].family != "generation" or subject.texts is not None


def _measure(name: str, subject: _Subject, reference: _Subject | None) -> MetricParts:
    """One metric of one model."""
    if METRICS[name].family == "membership":
        return _membership(_document_signals(name, subject, reference), subject.shared)
    if name == "privleak":
        assert reference is not None
        return {"value": _privleak(subject, reference)}
    if name == "forget_quality":
        assert reference is not None
        value = METRICS[name].compute(subject.log_ratios["forget"], reference.log_ratios["forget"])
        return {"value": {"value": value}}
    if name == DIFFERENCES:
        assert reference is not None
        return _differences(subject, reference)
    measured = {}
    for split, rows in subject.shared.splits():
        documents = [document_id(row.id) for row in rows]
        if name == "perplexity":
            measured[split] = _perplexity(subject.answers[split], documents, subject.shared.seed)
        else:
            values = _row_values(name, subject, split)
            ones = [1.0] * len(values)
            interval = ratio_interval(values, ones, documents, seed=subject.shared.seed)
            measured[split] = {"value": float(np.mean(values)), "interval": interval}
    return measured


def _row_values(name: str, subject: _Subject, split: str) -> list[float]:
    """The values whose mean a metric is."""
    compute, data = METRICS[name].compute, subject.shared.data
    if name == "truth_ratio":
        at_best = memorisation.truth_ratio_forget if split == "forget" else memorisation.truth_ratio_retain
        return [at_best(ratio) for ratio in subject.log_ratios[split]]
    if METRICS[name].family == "generation":
        assert subject.texts is not None
        count = len(data.forget)
        rows, texts = (
            (data.forget, subject.texts[:count]) if split == "forget" else (data.retain, subject.texts[count:])
        )
        return [compute(row.output, text) for row, text in zip(rows, texts, strict=True)]
    of_log_probs = name == "answer_probability"
    return [compute(row.log_probs if of_log_probs else row.matches) for row in subject.answers[split]]


def _perplexity(rows: Sequence[TokenStatistics], documents: Sequence[str], seed: int) -> dict[str, Any]:
    pooled = np.concatenate([row.log_probs for row in rows])
    totals, sizes = [float(row.log_probs.sum()) for row in rows], [float(len(row.log_probs)) for row in rows]
    # the ends are of the mean log-probability, whose higher end is the lower perplexity
    high, low = (memorisation.perplexity([end]) for end in ratio_interval(totals, sizes, documents, seed=seed))
    return {"value": memorisation.perplexity(pooled), "interval": [low, high]}


def _document_signals(name: str, subject: _Subject, reference: _Subject | None) -> list[float]:
    """The membership signal of members, then non-members."""
    compute, shared = METRICS[name].compute, subject.shared
    if name == "mia_gradient_norm":
        return [compute(norms) for norms in subject.gradient_norms]
    columns: list[Sequence[Any]] = [[one.log_probs for one in subject.documents]]
    if name == "mia_zlib":
        columns.append([*shared.data.members, *shared.data.nonmembers])
    elif name == "mia_reference":
        assert reference is not None
        columns.append([one.log_probs for one in reference.documents])
    elif name == "mia_min_k_plus_plus":
        columns += [[one.means for one in subject.documents], [one.deviations for one in subject.documents]]
    return [compute(*values) for values in zip(*columns, strict=True)]


def _membership(signals: Sequence[float], shared: _Shared) -> MetricParts:
    count = len(shared.data.members)
    members, nonmembers = signals[:count], signals[count:]
    areas, rates = membership_resamples(members, nonmembers, seed=shared.seed)
    area, rate = metrics.auc(members, nonmembers), membership.tpr_at_fpr(members, nonmembers)
    return {
        "auc": {"value": area, "interval": limits(areas, area)},
        "tpr_at_1_percent_fpr": {"value": rate, "interval": limits(rates, rate)},
    }


def _privleak(subject: _Subject, reference: _Subject) -> dict[str, Any]:
    """With the same documents drawn for both models, so that what is hard about a document cancels."""
    count, seed = len(subject.shared.data.members), subject.shared.seed
    both = [_document_signals("mia_min_k", one, None) for one in (subject, reference)]
    area, base = (metrics.auc(signals[:count], signals[count:]) for signals in both)
    value = METRICS["privleak"].compute(area, base)
    areas, bases = (membership_resamples(signals[:count], signals[count:], seed=seed)[0] for signals in both)
    sound = bases < 1  # a resample whose reference tells all members has no PrivLeak
    leaks = 100 * ((bases[sound] - areas[sound]) / (1 - bases[sound]))
    return {"value": value, "interval": limits(leaks if leaks.size else [value], value)}


def _differences(subject: _Subject, reference: _Subject) -> MetricParts:
    """Every term and objective of both models, where both were measured."""
    assert subject.scores is not None and reference.scores is not None
    mine, theirs = ({**_objectives(scores), **scores.terms} for scores in (subject.scores, reference.scores))
    differences = METRICS[DIFFERENCES].compute(mine, theirs)
    return {
        name: {"value": mine[name], "reference": theirs[name], "difference": difference}
        for name, difference in differences.items()
    }


def _objectives(scores: Scores) -> dict[str, float]:
    names = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")
    return {name: value for name in names if (value := getattr(scores, name)) is not None}


def _compare(measured: MetricParts, reference: MetricParts) -> None:
    """Adds the reference's values and the differences from them."""
    theirs = {part: values["value"] for part, values in reference.items()}
    differences = score_differences({part: values["value"] for part, values in measured.items()}, theirs)
    for part, difference in differences.items():
        measured[part] |= {"reference": theirs[part], "difference": difference}
