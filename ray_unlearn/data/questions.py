"""MMLU's files to questions."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ray_unlearn.data.rows import _read_text
from ray_unlearn.errors import InputError


@dataclass(frozen=True)
class Question:
    """One MMLU question with its subject; `answer` is an index into `options`."""

    subject: str
    question: str
    options: tuple[str, str, str, str]
    answer: int


def load_mmlu(directory: str | Path) -> tuple[dict[str, list[Question]], list[Question]]:
    """({subject: dev questions}, test questions) of a folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv."""
    directory = Path(directory)
    dev: dict[str, list[Question]] = {}
    test: list[Question] = []
    if not directory.is_dir() or not (directory / "test").is_dir():
        raise InputError(f"{directory} must hold test/SUBJECT_test.csv and dev/SUBJECT_dev.csv.")
    files = sorted((directory / "test").glob("*_test.csv"))
    if not files:
        raise InputError(f"{directory / 'test'} holds no SUBJECT_test.csv file.")
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        shots = directory / "dev" / f"{subject}_dev.csv"
        if not shots.exists():
            raise InputError(f"{file} has no dev file: {shots} is missing.")
        dev[subject] = _read_questions(shots, subject)
        questions = _read_questions(file, subject)
        if not questions:
            raise InputError(f"{file} has no questions; at least one is needed.")
        test += questions
    return dev, test


def _read_questions(path: Path, subject: str) -> list[Question]:
    questions = []
    with io.StringIO(_read_text(path), newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6 or row[5].strip() not in ("A", "B", "C", "D"):
                raise InputError(f"{path}:{number}: expected question, A, B, C, D, letter; got {row!r:.120}.")
            questions.append(Question(subject, row[0], (row[1], row[2], row[3], row[4]), "ABCD".index(row[5].strip())))
    return questions
