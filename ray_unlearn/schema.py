"""Strict dataclasses: from plain values and back, unknown keys and wrong types refused by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from typing import Any, TypeVar

from ray_unlearn.errors import InputError, unknown_name

T = TypeVar("T")


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """Builds the dataclass `cls` from plain values, checking every key and type.

    `where` is the dotted path used in messages. A class may say by `gathered` how a looser mapping becomes one of
    its fields. Raises InputError for an unknown key (naming the
    nearest known one), a wrong type, or a value that `__post_init__` refuses.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where or cls.__name__} must be a mapping of keys to values, got {data!r}.")
    data = getattr(cls, "gathered", dict)(data)
    hints = _hints(cls)  # type: ignore[arg-type]  # a class hashes
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise unknown_name(f"key in {where or cls.__name__}", key, known)
    values = {key: checked_value(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    missing = [name for name in required_keys(cls) if name not in values]
    if missing:
        raise InputError(f"{where or cls.__name__} lacks {', '.join(map(repr, missing))}.")
    return cls(**values)


def required_keys(cls: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is absent and f.default_factory is absent]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)  # slow, and asked again for each of a run's snapshots


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of from_dict: plain values, defaults filled in."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def digest(value: Any) -> str:
    """Sixteen hex characters that change when any part of a config or plain value changes."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def checked_value(hint: Any, value: Any, where: str) -> Any:
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
        return value
    return _check_scalar(hint, value, where)


def _check_scalar(hint: type, value: Any, where: str) -> Any:
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
