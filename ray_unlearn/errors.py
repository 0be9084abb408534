"""The exceptions that say what the user can do: to the input, or to the disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SHOWN_PROBLEMS = 20


class InputError(ValueError):
    """Bad input: the message states the rule, the offending value and what to do (exit code 2)."""


class DiskFullError(RuntimeError):
    """A write that failed for want of room; the message says where, how much, and how to go on (exit code 1)."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The refusal for a name that is in no table, with the nearest known one and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def problem_list(what: str, problems: Sequence[str], advice: str) -> str:
    """A refusal that lists every problem: the first twenty, then how many more."""
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    return f"{len(problems)} {what}:\n  " + "\n  ".join(shown) + f"\n{advice}"
