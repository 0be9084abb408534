"""What a configuration may hold: options with their rules, dataclasses that declare them, the way from plain values.

An `Option` says type, default, bounds and choices of a value, and what a search draws it from. A method's parameters
and a merge method's are rows of such; the fields of a dataclass declare theirs by `option`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.protocols import Suggests

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both ends are ints."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


Search: TypeAlias = "Range | tuple[Any, ...]"
"""What a search draws a value from: a range, or a tuple of choices."""


def suggest(search: Search, trial: Suggests, name: str) -> object:
    """Asks a trial for the value of that name."""
    if isinstance(search, tuple):
        return trial.suggest_categorical(name, search)
    low, high = search.low, search.high
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, step=int(search.step or 1), log=search.log)
    return trial.suggest_float(name, low, high, step=search.step, log=search.log)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A value that a configuration may set. Bounds and choices hold for each entry of a list or mapping too."""

    hint: object = None
    """Its type, as in an annotation; a field's own where `declared` gives it."""
    default: object
    meaning: str = ""
    """A field's docstring says it instead."""
    choices: Collection[Any] = ()
    above: float | None = None
    """The value must be above this. A bounded number must also be finite."""
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    never: Mapping[float, str] = field(default_factory=dict)
    """Single numbers that are refused, and why."""
    if_empty: str = ""
    """An empty list, mapping or text is refused with this advice."""
    search: Search | None = None
    """What a search space draws it from; None for its default."""
    searched_if: tuple[str, object] | None = None
    """Another field and the value it must have for this one to matter, as in `("tuning", "lora")`."""

    @property
    def rule(self) -> str:
        """The bounds in words: `at least 1`, `in (0, 1]`, `from 0 to 3`."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        starts, ends = self.at_least is not None, self.at_most is not None
        if low is not None and high is not None:
            if starts and ends:
                return f"from {low:g} to {high:g}"
            return f"in {'[' if starts else '('}{low:g}, {high:g}{']' if ends else ')'}"
        if low is not None:
            return f"{'at least' if starts else 'above'} {low:g}"
        return "" if high is None else f"{'at most' if ends else 'below'} {high:g}"

    def check(self, name: str, value: object) -> None:
        """Raises InputError where a value of the right type breaks the rule: `name must be RULE, got VALUE`."""
        if self.if_empty and value in ("", [], (), {}):
            raise InputError(f"{name} is empty: {self.if_empty}.")
        if isinstance(value, Mapping):
            for key, entry in value.items():
                self.check(f"{name}.{key}", entry)
        elif isinstance(value, (list, tuple)):
            for place, entry in enumerate(value):
                self.check(f"{name}[{place}]", entry)
        elif value is not None:
            self._check_one(name, value)

    def _check_one(self, name: str, value: object) -> None:
        if self.choices and value not in self.choices:
            raise unknown_name(f"value for {name}:", value, self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if value in self.never:
            raise InputError(f"{name} must not be {value}, {self.never[value]}.")
        if self.rule and not self._holds(value):
            finite = "" if math.isfinite(value) else "finite and "
            null = " or null" if type(None) in typing.get_args(self.hint) else ""
            raise InputError(f"{name} must be {finite}{self.rule}{null}, got {value}.")

    def _holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def option(default: T, **rules: Any) -> T:
    """A dataclass field with an Option: `epochs: int = option(5, at_least=1, search=Range(2, 10))`."""
    metadata = {Option: Option(default=default, **rules)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(cls: type[object]) -> Mapping[str, Option]:
    """An Option for each field that a dataclass is built from, with its type; without rules where it states none."""
    return _declared(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable


@functools.cache
def _declared(cls: type[Any]) -> Mapping[str, Option]:
    hints = typing.get_type_hints(cls)  # slow, and asked again for each of a run's snapshots
    rows = {}
    for entry in dataclasses.fields(cls):
        if entry.init:
            row = entry.metadata.get(Option) or Option(default=entry.default)
            rows[entry.name] = dataclasses.replace(row, hint=hints[entry.name])
    return types.MappingProxyType(rows)


def check_fields(config: object, where: str = "") -> None:
    """Checks the fields of a dataclass, and of dataclasses within, by their rules; `where` is its path in messages."""
    for name, row in declared(type(config)).items():
        value, path = getattr(config, name), f"{where}.{name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            check_fields(value, path)
        else:
            row.check(path, value)


# -- plain values -----------------------------------------------------------------------------------


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """Builds the dataclass `cls` from plain values, checking every key and type.

    `where` is the dotted path used in messages. A class may say by `gathered` how a looser mapping becomes one of
    its fields. Raises InputError for an unknown key (naming the nearest known one), a wrong type, or a value that
    its `option` or `__post_init__` refuses.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where or cls.__name__} must be a mapping of keys to values, got {data!r}.")
    data = getattr(cls, "gathered", dict)(data)
    known = declared(cls)
    for key in data:
        if key not in known:
            raise unknown_name(f"key in {where or cls.__name__}", key, known)
    values = {key: checked(known[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    missing = [name for name in required_keys(cls) if name not in values]
    if missing:
        raise InputError(f"{where or cls.__name__} lacks {', '.join(map(repr, missing))}.")
    return cls(**values)


def required_keys(cls: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is absent and f.default_factory is absent]


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of from_dict: plain values, defaults filled in."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def digest(value: object) -> str:
    """Sixteen hex characters that change when any part of a config or plain value changes."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def checked(option: Option, value: object, where: str) -> object:
    """`value` as the option's type, within its bounds and choices; else InputError with the rule and the value."""
    value = checked_value(option.hint, value, where)
    option.check(where, value)
    return value


def checked_value(hint: Any, value: object, where: str) -> Any:
    """`value` as the annotated type; ints pass for floats, and numbers as text (YAML's 1e-4) too."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in [option for option in options if option is not type(None)]:
            try:
                return checked_value(option, value, where)
            except InputError as error:
                errors.append(str(error))
        raise InputError(errors[0])
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, got {value!r}.")
        return origin(checked_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, got {value!r}.")
        entries = arguments[1] if arguments else Any
        return {key: checked_value(entries, item, f"{where}.{key}") for key, item in value.items()}
    return _check_scalar(hint, value, where)


def _check_scalar(hint: type, value: object, where: str) -> object:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where} must be {hint.__name__}, got {value!r}.")


def require(condition: bool, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is one of the choices."""
    if value not in choices:
        raise unknown_name(f"value for {name}:", value, choices)
