"""MMLU's files to questions."""

from __future__ import annotations

import csv
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from ray_unlearn.errors import InputError

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One MMLU question with its subject; `answer` is an index into `options`."""

    subject: str
    question: str
    options: tuple[str, str, str, str]
    answer: int
    place: str = ""
    """Its file and row, for messages."""
    printed: tuple[str, ...] = ()
    """Question and options as the official prompts print them, where that is not what the file says: those are made of
    pandas' reading, in which None and NA are `nan`, and a column of numbers may get decimal points."""


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
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends within a field stay as they are
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error
    rows = list(csv.reader(io.StringIO(text, newline="")))
    for number, row in enumerate(rows, start=1):
        if len(row) != 6 or row[5].strip() not in tuple(LETTERS):
            raise InputError(f"{path}:{number}: expected question, A, B, C, D, letter; got {row!r:.120}.")
    questions = []
    for number, (row, printed) in enumerate(zip(rows, _as_pandas_reads(path, rows), strict=True), start=1):
        question, a, b, c, d, letter = row
        place = f"{path.name}, row {number}"
        other = () if list(printed) == row[:5] else printed
        questions.append(Question(subject, question, (a, b, c, d), LETTERS.index(letter.strip()), place, other))
    return questions


def _as_pandas_reads(path: Path, rows: list[list[str]]) -> list[tuple[str, ...]]:
    """Questions and options as `pandas.read_csv(path, header=None)` has them, each as text."""
    import pandas

    if not rows:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pandas.errors.DtypeWarning)  # of mixed columns, which are read as they are
        frame = pandas.read_csv(path, header=None)
    if len(frame) != len(rows):
        raise InputError(
            f"{path} has {len(rows)} rows as CSV says, and {len(frame)} as pandas does, which the official prompts are "
            "made with; put double quotes around fields that hold quotes, commas or line ends."
        )
    columns = [[format(value) for value in frame[column]] for column in range(5)]
    return list(zip(*columns, strict=True))
