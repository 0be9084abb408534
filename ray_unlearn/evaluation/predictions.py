"""Generations and losses in files: what `evaluate` writes and `score` reads, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray_unlearn.data.rows import find_file, kind_of, kind_problem, load_pair, read_rows, row_problem
from ray_unlearn.errors import InputError, problem_list
from ray_unlearn.evaluation.spec import EvalSet


def prediction_rows(data: EvalSet, texts: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of predictions.jsonl."""
    for index, (row, text) in enumerate(zip([*data.forget, *data.retain], texts, strict=True)):
        yield {
            "id": row.id,
            "task": row.task,
            "kind": row.kind,
            "split": "forget" if index < len(data.forget) else "retain",
            "expected_output": row.output,
            "model_output": text,
        }


def check_complete(name: str, places: dict[tuple[str, str], str], files: dict[str, str]) -> None:
    """Refuses predictions that miss a row of the files they answer, have one more, or expect another output."""
    pair = dict(zip(files, load_pair(files["forget"], files["retain"]), strict=True))
    asked = {(split, row.id): row.output for split, loaded in pair.items() for row in loaded.examples}
    problems = [f"{split} row {row!r} is missing" for split, row in asked if (split, row) not in places]
    problems += [f"{split} row {row!r} is not in {files[split]}" for split, row in places if (split, row) not in asked]
    problems += [
        f"{split} row {row!r} expects {expected!r:.60}, and {files[split]} has {asked[split, row]!r:.60}"
        for (split, row), expected in places.items()
        if asked.get((split, row), expected) != expected
    ]
    if problems:
        raise InputError(problem_list(f"problems with the rows of {name}", problems, "Predict each row once."))


def read_predictions(
    given: str | Path,
) -> tuple[list[tuple[str, str, str, str, str]], dict[tuple[str, str], str]]:
    """(split, task, kind, expected, generated) of each row, and its expected output by (split, id)."""
    path = find_file(given, "predictions")
    good, problems = [], []
    seen: dict[tuple[str, str], int] = {}
    for number, row in read_rows(path):
        problem = _prediction_problem(row, seen)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        else:
            seen[row["split"], row["id"]] = number
            good.append((row["split"], row["task"], kind_of(row) or "", row["expected_output"], row["model_output"]))
    if problems:
        raise InputError(problem_list("bad rows", problems, "Mend them."))
    if not good:
        raise InputError(f"{path} has no rows; at least one is needed.")
    return good, {key: row[3] for key, row in zip(seen, good, strict=True)}


def _prediction_problem(row: Any, seen: dict[tuple[str, str], int]) -> str | None:
    fields = ("id", "task", "split", "expected_output", "model_output")
    problem = row_problem(row, fields, may_be_empty=("model_output",))  # an empty generation is a generation
    if problem:
        return problem
    if row["split"] not in ("forget", "retain"):
        return f"split must be forget or retain, got {row['split']!r}"
    if (row["split"], row["id"]) in seen:
        return f"id {row['id']!r} is already used in row {seen[row['split'], row['id']]}"
    return kind_problem(row)


def read_losses(path: Path) -> tuple[list[float], list[float]]:
    """The members' and the other documents' losses of a losses.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("member", "nonmember")):
        raise InputError(f'{path} must be {{"member": [..], "nonmember": [..]}}, got {str(data)[:80]}.')
    for name in ("member", "nonmember"):
        if not data[name]:
            raise InputError(f"{path}: {name!r} is empty; an AUC needs at least one loss on each side.")
    return data["member"], data["nonmember"]
