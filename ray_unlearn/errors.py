"""The one exception that means: the user's input is wrong, and here is what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message states the rule, the offending value and what to do (exit code 2)."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The refusal for a name that is in no table, with the nearest known one and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
