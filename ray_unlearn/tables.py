"""The tables that everything is looked up in by name: what a row must be, and how third parties add theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ray_unlearn.errors import InputError, unknown_name

Row = TypeVar("Row")
_added: list[tuple[Table[Any], str]] = []


def _any(row: object) -> None:
    """Nothing to check beyond the row's type."""


class Table(dict[str, Row]):
    """Rows by name, in the order they are listed in."""

    def __init__(self, kind: str, row: type[Row], rows: Mapping[str, Row], check: Callable[[Row], None] = _any) -> None:
        super().__init__(rows)
        self.kind, self._row, self._check = kind, row, check

    def find(self, name: str) -> Row:
        """The row of that name; raises InputError naming the nearest known one."""
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return self[name]

    def add(self, name: str, row: Row) -> None:
        """Adds a row. Raises InputError for a name that is taken, what is no row of this table, or one that cannot
        work."""
        if name in self:
            raise InputError(f"there is a {self.kind} {name!r} already: give yours another name.")
        if not isinstance(row, self._row):
            raise InputError(f"the {self.kind} {name!r} must be a {self._row.__name__}, got {row!r:.80}.")
        self._check(row)
        self[name] = row
        _added.append((self, name))


def additions() -> int:
    """How many rows were added in this process; a mark for `take_back`."""
    return len(_added)


def take_back(mark: int) -> None:
    """Removes the rows that were added after the mark."""
    for table, name in _added[mark:]:
        del table[name]
    del _added[mark:]
