"""Files to examples to batches. The one place where rows are checked and prompt and answer are joined."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_unlearn.errors import InputError, problem_list, unknown_name
from ray_unlearn.files import file_digest
from ray_unlearn.records import Example

KINDS = ("sc", "qa")
ROW_FIELDS = ("id", "input", "output", "task")
ALTERNATE, PERTURBED, PARAPHRASED = "alternate", "perturbed", "paraphrased"
"""Optional columns: another answer to the row, for methods that prefer it to the one to be forgotten; for truth ratios
wrong answers, and the right one in other words."""


@dataclass(frozen=True)
class Loaded:
    """Examples of one file, and how many bad rows were dropped."""

    examples: list[Example]
    dropped: int
    digest: str


# -- reading and checking ------------------------------------------------------------------------


def find_file(path: str | Path, stem: str) -> Path:
    """The data file that `path` names: itself, or `stem`.jsonl / `stem`.parquet in that directory."""
    path = Path(path)
    if path.is_dir():
        found = [path / f"{stem}{suffix}" for suffix in (".jsonl", ".parquet")]
        for candidate in found:
            if candidate.exists():
                return candidate
        raise InputError(f"{path} holds no {stem}.jsonl or {stem}.parquet; it has: {_file_names(path)}.")
    if not path.exists():
        raise InputError(f"no such file: {path}. Give a .jsonl or .parquet file, or a directory with {stem}.*.")
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{path} must end in .jsonl or .parquet, got {path.suffix or 'no suffix'!r}.")
    return path


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """(row number from 1, row or the JSON error) of a .jsonl or .parquet file; blank lines are skipped."""
    if path.suffix == ".parquet":
        import datasets

        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=None, keep_in_memory=True)
        except Exception as error:  # pyarrow and datasets raise many kinds for a broken file
            raise InputError(f"{path} is not a readable parquet file: {error}.") from error
        return [(number, dict(row)) for number, row in enumerate(table, start=1)]
    rows: list[tuple[int, object]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:  # broken, nested too deep, or a number too long
                rows.append((number, error))
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error


def _file_names(directory: Path) -> str:
    return ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"


def row_problem(row: object, fields: Sequence[str], may_be_empty: Sequence[str] = ()) -> str | None:
    """What is wrong with a row's fields, or None."""
    if isinstance(row, json.JSONDecodeError):
        return f"broken JSON: {row.msg} at column {row.colno}"
    if isinstance(row, Exception):
        return f"broken JSON: {type(row).__name__}: {row}"
    if not isinstance(row, dict):
        return f"a row must be a JSON object, got {row!r:.60}"
    for name in fields:
        if name not in row:
            return f"field {name!r} is missing; the row has {sorted(row)}"
        if not isinstance(row[name], str):
            return f"field {name!r} must be text, got {row[name]!r:.60}"
        if name not in may_be_empty and not row[name].strip():
            return f"field {name!r} is empty"
        if not row[name].isascii() and any("\ud800" <= letter <= "\udfff" for letter in row[name]):
            return f"field {name!r} holds half of a surrogate pair, which is no text"
    return None


def kind_problem(row: dict[str, object]) -> str | None:
    """Why a row's kind is not known, or None."""
    if kind_of(row) in KINDS:
        return None
    if row.get("kind") is not None:
        return f"kind must be sc or qa, got {row['kind']!r}"
    return f"id {row['id']!r} does not end in sc or qa and a digit, and there is no column 'kind' saying sc or qa"


def kind_of(row: dict[str, Any]) -> str | None:
    """`sc` or `qa`: the column `kind` where present, else the end of id[:-1]."""
    stated = row.get("kind")
    if stated is not None:
        return stated if stated in KINDS else None
    return row["id"][:-1][-2:] if row["id"][:-1][-2:] in KINDS else None


def _alternate_problem(row: dict[str, Any]) -> str | None:
    """Why a row's alternative answer cannot be used, or None."""
    if row.get(ALTERNATE) is None:
        return None
    problem = row_problem(row, (ALTERNATE,))
    return problem or ("alternate is the output itself" if row[ALTERNATE] == row["output"] else None)


def _perturbed_problem(row: dict[str, Any]) -> str | None:
    """Why a row's wrong answers cannot be used, or None."""
    stated = row.get(PERTURBED)
    if stated is None:
        return None
    if not isinstance(stated, list):
        return f"perturbed must be a list of texts, got {stated!r:.60}"
    return _texts_problem(row, PERTURBED, stated)


def _paraphrased_problem(row: dict[str, Any]) -> str | None:
    """Why a row's right answers in other words cannot be used, or None."""
    stated = row.get(PARAPHRASED)
    if stated is None:
        return None
    if not isinstance(stated, (str, list)):
        return f"paraphrased must be a text or a list of texts, got {stated!r:.60}"
    both = [text for text in _paraphrased(row) if text in (row.get(PERTURBED) or ())]
    return _texts_problem(row, PARAPHRASED, _paraphrased(row)) or (
        f"perturbed holds the paraphrased answer {both[0]!r:.60}" if both else None
    )


def _texts_problem(row: dict[str, object], column: str, texts: Sequence[object]) -> str | None:
    problem = next(filter(None, (row_problem({column: text}, (column,)) for text in texts)), None)
    return problem or (f"{column} holds the output itself" if row["output"] in texts else None)


def _paraphrased(row: dict[str, Any]) -> tuple[Any, ...]:
    stated = row.get(PARAPHRASED) or ()
    return (stated,) if isinstance(stated, str) else tuple(stated)


@dataclass(frozen=True)
class _Scanned:
    """A file's good rows with their numbers, and the problems of the others."""

    path: Path
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[str]


def _scan(path: Path, fields: Sequence[str]) -> _Scanned:
    good: list[tuple[int, dict[str, object]]] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, row in read_rows(path):
        problem = row_problem(row, fields)
        if problem is None and "input" in fields:
            checks = (kind_problem, _alternate_problem, _perturbed_problem, _paraphrased_problem)
            problem = next(filter(None, (check(row) for check in checks)), None)
        if problem is None and row["id"] in seen:
            problem = f"id {row['id']!r} is already used in row {seen[row['id']]}"
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        else:
            seen[row["id"]] = number
            good.append((number, row))
    return _Scanned(path, good, problems)


def _refuse(problems: Sequence[str], files: Sequence[_Scanned], skip_bad: bool) -> None:
    if problems and not skip_bad:
        raise InputError(problem_list("bad rows", problems, "Mend them, or drop them with --skip-bad-rows."))
    if problems:
        names = " and ".join(str(file.path) for file in files)
        logging.getLogger(__name__).warning(
            "%d bad rows of %s dropped; the first: %s", len(problems), names, problems[0]
        )
    for file in files:
        if not file.rows:
            raise InputError(f"{file.path} has no {'good ' if problems else ''}rows; at least one is needed.")


def load_pair(forget: str | Path, retain: str | Path, skip_bad: bool = False) -> tuple[Loaded, Loaded]:
    """Examples of a forget and a retain file, in file order; all bad rows of both are listed, or dropped and counted.

    A row that is in both files is bad in both: it is to be forgotten or kept. Raises InputError for
    those too, and for splits that differ in their tasks and kinds.
    """
    files = [_scan(find_file(forget, "forget"), ROW_FIELDS), _scan(find_file(retain, "retain"), ROW_FIELDS)]
    there = {_content(row): number for number, row in files[1].rows}
    clashing = {_content(row) for _, row in files[0].rows} & set(there)
    problems = files[0].problems + files[1].problems
    problems += [
        f"{files[0].path}:{number}: the same row is in {files[1].path}:{there[_content(row)]}"
        for number, row in files[0].rows
        if _content(row) in clashing
    ]
    kept = [
        _Scanned(file.path, [(n, row) for n, row in file.rows if _content(row) not in clashing], file.problems)
        for file in files
    ]
    _refuse(problems, kept, skip_bad)
    left, right = (
        Loaded(
            [_example(row) for _, row in clean.rows],
            len(file.problems) + len(file.rows) - len(clean.rows),
            file_digest(file.path),
        )
        for file, clean in zip(files, kept, strict=True)
    )
    check_cells(left.examples, right.examples)
    return left, right


def _content(row: dict[str, Any]) -> tuple[str, str]:
    return row["input"], row["output"]


def _example(row: dict[str, Any]) -> Example:
    return Example(
        **{name: row[name] for name in ("id", "input", "output", "task")},
        kind=kind_of(row) or "",
        alternate=row.get(ALTERNATE),
        perturbed=tuple(row.get(PERTURBED) or ()),
        paraphrased=_paraphrased(row),
    )


def load_membership(member: str | Path, nonmember: str | Path, skip_bad: bool = False) -> tuple[list[str], list[str]]:
    """Documents of a member and a non-member file; raises InputError where a document is in both."""
    members, nonmembers = load_documents(member, skip_bad), load_documents(nonmember, skip_bad)
    known = set(members)
    both = [number for number, document in enumerate(nonmembers, start=1) if document in known]
    if both:
        raise InputError(
            f"{len(both)} documents of {nonmember} are in {member} too, the first is document {both[0]}: nobody could "
            "tell them apart, and the MIA score would flatter. Give unseen documents as non-members."
        )
    return members, nonmembers


def load_documents(path: str | Path, skip_bad: bool = False) -> list[str]:
    """Documents of an MIA file, in file order."""
    file = _scan(find_file(path, "mia"), ("id", "document"))
    _refuse(file.problems, [file], skip_bad)
    return [row["document"] for _, row in file.rows]


def check_cells(forget: Iterable[Example], retain: Iterable[Example]) -> None:
    """Refuses two splits that do not have the same tasks and kinds, naming the missing cells."""
    left, right = ({(example.task, example.kind) for example in split} for split in (forget, retain))
    missing = [f"retain lacks {task}/{kind}" for task, kind in sorted(left - right)]
    missing += [f"forget lacks {task}/{kind}" for task, kind in sorted(right - left)]
    if missing:
        raise InputError(f"both splits must have the same tasks and kinds: {'; '.join(missing)}.")


def limit_documents(examples: Sequence[Example], limits: int | dict[str, int] | None) -> list[Example]:
    """The rows of the first documents of each task, in file order; a document is an id without its last 3 characters.

    `limits` is one number for all tasks, or a number for each.
    """
    if limits is None:
        return list(examples)
    if isinstance(limits, dict):
        tasks = {example.task for example in examples}
        for task in limits:
            if task not in tasks:
                raise unknown_name("task in data.limit:", task, tasks)
    taken: dict[str, list[str]] = {}
    kept = []
    for example in examples:
        limit = limits if isinstance(limits, int) else limits.get(example.task, 0)
        documents = taken.setdefault(example.task, [])
        document = example.id[:-3]
        if document not in documents and len(documents) < limit:
            documents.append(document)
        if document in documents:
            kept.append(example)
    if not kept:
        raise InputError(f"limit {limits!r} keeps no rows; tasks in the file: {sorted({e.task for e in examples})}.")
    return kept


# -- tokens --------------------------------------------------------------------------------------
