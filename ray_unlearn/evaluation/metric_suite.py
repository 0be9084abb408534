"""Metrics beyond the shared task's, chosen by name: a model and examples to their values and intervals."""

from __future__ import annotations

from collections.abc import Sequence

from ray_unlearn.data.contrasts import contrasts
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.signals import Inputs, Signals, Subject
from ray_unlearn.evaluation.spec import EvalSet
from ray_unlearn.metrics import METRICS, Metric
from ray_unlearn.metrics.privacy import score_differences
from ray_unlearn.metrics.summaries import Part, Sample
from ray_unlearn.metrics.table import DOCUMENTS, REFERENCE, ROWS
from ray_unlearn.protocols import Log, Tokenizer
from ray_unlearn.records import document_id

LACKING = {
    "generated": "needs the generations of the rows, and none were made",
    "scores": "needs a model's scores, and they were not given",
}
"""Why a metric cannot be measured whose signal a Subject lacks."""


def extra_names(names: Sequence[str]) -> list[str]:
    """The named metrics without those that are always measured, each once; raises InputError for an unknown name."""
    return [name for name in dict.fromkeys(names) if METRICS.find(name).signals]


def of_scores() -> list[str]:
    """The metrics that compare two models' scores and take nothing else: what a reference alone is for."""
    return [name for name, metric in METRICS.items() if set(metric.signals) == {"scores", f"{REFERENCE}scores"}]


def more_metrics(
    names: Sequence[str],
    model: Subject,
    tokenizer: Tokenizer,
    data: EvalSet,
    *,
    reference: Subject | None = None,
    batch_size: int = 32,
    log: Log = lambda line: None,
) -> dict[str, dict[str, Part]]:
    """Metric -> part -> {value, interval} of the named metrics, as they stand under `metrics` in scores.json.

    `reference` is a model with the same tokenizer that was trained without the forget set; with it every part also has
    `reference`, that model's value, and `difference` from it, as far as the reference brings what the metric takes.
    Raises InputError, before any work, for an unknown name or a missing input.
    """
    chosen = check_inputs(names, data, reference is not None)
    wanted = {signal.removeprefix(REFERENCE) for name in chosen for signal in METRICS[name].signals}
    inputs = Inputs(data=data, tokenizer=tokenizer, wanted=frozenset(wanted), batch_size=batch_size)
    theirs = None if reference is None else Signals(reference, inputs)
    mine = Signals(model, inputs, theirs)
    for name in chosen:
        for signal in mine.lacks(METRICS[name].signals):
            raise InputError(f"metric {name!r} {LACKING[signal.removeprefix(REFERENCE)]}.")
    found = {}
    for name in chosen:
        log(f"measuring {name}")
        metric = METRICS[name]
        found[name] = _measure(metric, mine)
        if theirs is not None and not metric.needs_reference and not theirs.lacks(metric.signals):
            _compare(found[name], _measure(metric, theirs))
    return found


def check_inputs(names: Sequence[str], data: EvalSet, reference: bool) -> list[str]:
    """`extra_names`, whose data and reference are there; raises InputError for a name whose inputs are not, saying
    which."""
    chosen = extra_names(names)
    for name in chosen:
        metric = METRICS[name]
        if metric.needs_reference and not reference:
            raise InputError(f"metric {name!r} compares with a model trained without the forget set; give a reference.")
        if metric.groups == DOCUMENTS and not (data.members and data.nonmembers):
            raise InputError(f"metric {name!r} needs MIA documents; give --mia-member and --mia-nonmember.")
        if "forget" in metric.groups and not data.forget:
            raise InputError(f"metric {name!r} needs forget rows, got none.")
        if "log_truth_ratio" in metric.signals:
            for split in metric.groups:
                contrasts(data.forget if split == "forget" else data.retain, split)
    return chosen


def check_in_run(names: Sequence[str], data: EvalSet) -> None:
    """Refuses what cannot be measured of each candidate of a run, where a model is alone and part of it may train."""
    for name in check_inputs(names, data, reference=False):
        if "document_gradient_norms" in METRICS[name].signals:
            raise InputError(
                f"metric {name!r} needs gradients of all weights, which a trial's workers have no room for: leave it "
                "out of evaluation.metrics, and measure the delivered model with `ray-unlearn evaluate`."
            )


def _measure(metric: Metric, signals: Signals) -> dict[str, Part]:
    """One metric of one model."""
    samples = {group: _sample(metric, signals, group) for group in metric.groups}
    samples = {group: sample for group, sample in samples.items() if sample.signals}
    parts = metric.summary(metric.compute, samples)
    for group in samples:
        facts = signals.facts(metric.signals, group)
        for part in [group] if group in parts else parts:
            parts[part] |= facts
    return parts


def _sample(metric: Metric, signals: Signals, group: str) -> Sample:
    """The metric's signals of a group."""
    columns = [signals.column(name, group) for name in metric.signals]
    values = list(zip(*columns, strict=True))
    ids = [document_id(row.id) for row in signals.inputs.rows(group)] if group in ROWS else range(len(values))
    return Sample(values, ids)


def _compare(measured: dict[str, Part], reference: dict[str, Part]) -> None:
    """Adds the reference's values and the differences from them."""
    mine, theirs = ({part: _value(one) for part, one in parts.items()} for parts in (measured, reference))
    for part, difference in score_differences(mine, theirs).items():
        measured[part] |= {"reference": theirs[part], "difference": difference}


def _value(part: Part) -> float:
    value = part["value"]
    assert isinstance(value, float)
    return value
