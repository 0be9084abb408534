"""The search over merges of front members."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ray_unlearn.merging import MergeRecipe
from ray_unlearn.records import MergeRecord, Scores
from ray_unlearn.search.merge_space import Growth, MergeSpace
from ray_unlearn.search.study import Study, Trial, enqueue, handle, has_waiting, queue_again, running, tell


class Scorers(Protocol):
    """Who merges and scores (cluster.merge_actor.MergePool)."""

    @property
    def free(self) -> bool:
        """Whether one of them waits for a recipe."""

    def start(self, name: str, recipe: MergeRecipe) -> None:
        """Gives a free one a recipe."""

    def wait(self) -> tuple[str, Scores | None, str]:
        """(name, scores or None, reason of a failure) of one that has ended."""


def search_merges(
    study: Study,
    space: MergeSpace,
    scorers: Scorers,
    save: Callable[[str, MergeRecipe, Scores | None, str, float], None],
    growth: Growth,
    *,
    missing: int,
    patience: int,
    utility_floor: float,
) -> None:
    """Asks for `missing` merges and has them scored; fewer where the hypervolume has not grown for `patience` of them.

    `save` writes the record before the study is told, so that a killed driver finds its outcome again.
    """
    in_flight: dict[str, tuple[Trial, MergeRecipe, float]] = {}
    while in_flight or (missing > 0 and not growth.stalled(patience)):
        while missing > 0 and scorers.free and not growth.stalled(patience):
            unscored = [(recipe, None) for _, recipe, _ in in_flight.values()]
            trial = _ask_for_merge(study, space, [*growth.plain, *unscored])
            recipe, name = space.suggest(trial, growth.joined), f"merge-{trial.number:04d}"
            scorers.start(name, recipe)
            in_flight[name] = (trial, recipe, time.monotonic())
            missing -= 1
        name, scores, reason = scorers.wait()
        trial, recipe, began = in_flight.pop(name)
        save(name, recipe, scores, reason, time.monotonic() - began)
        tell(study, trial, scores, utility_floor, {"record": name})
        growth.add(name, recipe, scores)


def _ask_for_merge(study: Study, space: MergeSpace, known: Sequence[tuple[MergeRecipe, Scores | None]]) -> Trial:
    """A trial of what a killed driver left queued, else of the bisected segment, else of the next first point, else of
    the sampler. A merge in flight counts as known without scores: the bisection waits for it."""
    if not has_waiting(study):
        point = space.segment_point(known)
        if point is not None:
            study.enqueue_trial(point)
        else:
            enqueue(study, space.first_points(), most=1)
    return study.ask()


def recover_merges(study: Study, records: Sequence[MergeRecord], utility_floor: float) -> None:
    """Tells the outcome of merges that a killed driver had scored, and queues those again that it was scoring."""
    known = {record.id: record for record in records}
    for trial in running(study):
        record = known.get(f"merge-{trial.number:04d}")
        if record is not None:
            tell(study, handle(study, trial), record.scores, utility_floor, {})
        else:
            queue_again(study, trial)
