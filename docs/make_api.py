"""Writes docs/api.md from the docstrings of what `ray_unlearn` exports: python docs/make_api.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import ray_unlearn

PAGE = Path(__file__).parent / "api.md"


def page() -> str:
    """The page: classes with their fields, functions with their signatures, in the order of their names."""
    parts = ["# Python API\n", "Made from the docstrings by `python docs/make_api.py`.\n", "```python"]
    parts += [line.removeprefix("    ") for line in (ray_unlearn.__doc__ or "").splitlines() if line.startswith("    ")]
    parts.append("```\n")
    for name in sorted(ray_unlearn.__all__, key=lambda name: (name[0].isupper(), name)):
        value = getattr(ray_unlearn, name)
        parts.append(f"## {name}\n")
        if inspect.isfunction(value):
            parts.append(f"```python\n{_signature(value)}\n```\n")
        parts.append(f"{inspect.getdoc(value)}\n")
        if dataclasses.is_dataclass(value):
            parts.append(_fields(value))
    return "\n".join(parts)


def _signature(function: object) -> str:
    """The source's own lines from `def` to its colon."""
    assert inspect.isfunction(function)
    source = inspect.getsource(function)
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    return "\n".join(source.splitlines()[: body[0].lineno - 1]).removesuffix(":")


def _fields(cls: type) -> str:
    lines = ["| field | type |", "|---|---|"]
    types = {field.name: str(field.type).replace("|", "\\|") for field in dataclasses.fields(cls)}
    lines += [f"| `{name}` | `{hint}` |" for name, hint in types.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
