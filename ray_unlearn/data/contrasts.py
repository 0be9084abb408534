"""The right and wrong answers that a truth ratio compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_unlearn.errors import InputError
from ray_unlearn.records import Example, document_id

WRONG_ANSWERS = 3
"""Other rows' answers that a row is compared with, where the data bring no perturbed answers."""


@dataclass(frozen=True)
class Contrasts:
    """What the truth ratios of a split are made of, an entry for each row."""

    right: Sequence[Sequence[str]]
    wrong: Sequence[Sequence[str]]
    facts: Mapping[str, str]
    """`answers` and `wrong_answers`: where they are from."""


def contrasts(rows: Sequence[Example], split: str) -> Contrasts:
    """The paraphrased answers of a split's rows, or the trained ones where no row has others, and the perturbed
    answers, or other rows' answers where no row has any.

    A paraphrase is TOFU's: a truth ratio is to measure what is known, not a text that was learnt by heart. Raises
    InputError where some rows have such answers and others none, and for a row that no other contradicts.
    """
    right = _all_or_none("paraphrased", [row.paraphrased for row in rows], rows, split)
    wrong = _all_or_none("perturbed", [row.perturbed for row in rows], rows, split)
    return Contrasts(
        right=right or [[row.output] for row in rows],
        wrong=wrong or other_answers(rows),
        facts={
            "answers": "paraphrased" if right else "trained",
            "wrong_answers": "perturbed" if wrong else "of other rows",
        },
    )


def _all_or_none(
    what: str, answers: Sequence[Sequence[str]], rows: Sequence[Example], split: str
) -> Sequence[Sequence[str]] | None:
    """The answers, or None where no row has any."""
    bare = [row.id for row, given in zip(rows, answers, strict=True) if not given]
    if not bare:
        return answers
    if len(bare) < len(rows):
        raise InputError(
            f"{len(bare)} of the {split} set's {len(rows)} rows have no {what} answer ({bare[0]!r} the first); "
            "give at least one for every row of a set, or none at all."
        )
    return None


def other_answers(rows: Sequence[Example], count: int = WRONG_ANSWERS) -> list[list[str]]:
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
