"""The table of scores that the report and the model card share: what each number means, and who is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_unlearn.records import Scores

PARTS = (
    ("final", "Final", "higher is better; mean of task aggregate, MIA score and utility"),
    ("task_aggregate", "Task aggregate", "higher is better; harmonic mean of all forget and retain terms"),
    ("mia_score", "MIA score", "higher is better; 1 = forget rows cannot be told from unseen documents"),
    ("mia_auc", "MIA AUC", "0.5 is best; towards 1 still memorised, towards 0 over-unlearned"),
    ("utility", "Utility", "higher is better; general ability on the utility questions"),
)
TERMS = {
    ("forget", "regurgitation"): "higher = more forgotten; 1 − ROUGE-L recall",
    ("forget", "knowledge"): "higher = more forgotten; 1 − exact match",
    ("retain", "regurgitation"): "higher = better kept; ROUGE-L recall",
    ("retain", "knowledge"): "higher = better kept; exact match",
}
GROUPS = {
    "": "Objectives",
    "forget": "Forget terms: 1 − the mean on forget rows, so higher = more forgotten",
    "retain": "Retain terms: the mean on retain rows, so higher = better kept",
}


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One measure of the target, the best and the retrained reference; None where it was not measured."""

    group: str
    name: str
    meaning: str
    target: float | None
    best: float | None
    reference: float | None = None
    count: int | None = None
    ideal: float | None = None
    """The value that is best, for a measure where higher is not better."""
    intervals: tuple[Sequence[float] | None, ...] = (None, None, None)
    """95 % intervals of target, best and reference."""

    @property
    def change(self) -> float | None:
        """Best minus target."""
        return None if self.best is None or self.target is None else self.best - self.target

    @property
    def tone(self) -> str:
        """`better`, `worse` or an empty string, for colour; no colour where the intervals of the two overlap."""
        if self.best is None or self.target is None or overlap(*self.intervals[:2]):
            return ""
        before, after = self.target, self.best
        if self.ideal is not None:
            before, after = -abs(before - self.ideal), -abs(after - self.ideal)
        return "" if abs(after - before) < 0.0005 else "better" if after > before else "worse"


def overlap(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether both intervals are there and have a value in common."""
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def score_rows(target: Scores | None, best: Scores | None, reference: Scores | None = None) -> list[TableRow]:
    """The objectives, then the forget terms, then the retain terms of up to three models."""
    rows = [
        TableRow(
            group="",
            name=name,
            meaning=meaning,
            target=getattr(target, key, None),
            best=getattr(best, key, None),
            reference=getattr(reference, key, None),
            ideal=0.5 if key == "mia_auc" else None,
            intervals=tuple(scores.intervals.get(key) if scores else None for scores in (target, best, reference)),
        )
        for key, name, meaning in PARTS
    ]
    known = [scores for scores in (target, best, reference) if scores is not None]
    for key in sorted({key for scores in known for key in scores.terms}):
        split, _, rest = key.partition("/")
        task, _, measure = rest.rpartition("/")
        rows.append(
            TableRow(
                group=split,
                name=f"{task} {measure}".strip(),
                meaning=TERMS.get((split, measure), ""),
                target=target.terms.get(key) if target else None,
                best=best.terms.get(key) if best else None,
                reference=reference.terms.get(key) if reference else None,
                count=next((scores.counts[key] for scores in known if key in scores.counts), None),
            )
        )
    return rows
