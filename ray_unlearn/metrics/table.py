"""What a metric is: a row of the table METRICS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray_unlearn.errors import unknown_name
from ray_unlearn.metrics.summaries import Summary, mean_over_rows

ROWS = ("forget", "retain")
DOCUMENTS = ("member", "nonmember")
WHOLE = ("model",)
REFERENCE = "reference_"
"""Before a signal's name: that signal of a second model, trained without the forget set."""

SIGNALS = tuple(
    "split expected generated answer_log_probs answer_matches log_truth_ratio document_text document_log_probs "
    "document_means document_deviations document_gradient_norms scores".split()
)
"""What a metric may be called with: see Metric.signals."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: what it is called with, which value is best, and what not to be fooled by."""

    compute: Callable[..., object]
    signals: tuple[str, ...] = ()
    """Its positional arguments, in order, by name; none for what every evaluation measures anyway.
    Of a row with T answer tokens: `split`, `expected`, `generated` (texts), `answer_log_probs` [T], `answer_matches`
    [T] (whether the token is the most probable one), `log_truth_ratio` (a number). Of a document with T tokens after
    its first: `document_text`, `document_log_probs`, `document_means`, `document_deviations` [T] (of log p over the
    vocabulary), `document_gradient_norms` (of each parameter tensor). Of a model: `scores` (name -> number).
    Each with `reference_` before it is that of the reference."""
    groups: tuple[str, ...] = ROWS
    """What it is measured on: ROWS, or some of them; DOCUMENTS; or WHOLE, the model itself."""
    summary: Summary = mean_over_rows
    """How its values become numbers."""
    formula: str
    range: tuple[float, float]
    best: dict[str, float]
    """The best value of each part that is reported: nearer to it is better. `forget` and `retain` are the rows'."""
    collapsed: str
    """What a model scores that has lost its language (one token for ever, or noise), so that it is not taken for one
    that has forgotten."""
    source: str

    def __post_init__(self) -> None:
        for signal in self.signals:
            if signal.removeprefix(REFERENCE) not in SIGNALS:
                raise unknown_name("signal of a metric", signal, SIGNALS)

    @property
    def needs_reference(self) -> bool:
        """Whether it takes a second model, trained without the forget set."""
        return any(signal.startswith(REFERENCE) for signal in self.signals)
