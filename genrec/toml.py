"""A TOML file and ``key=value`` assignments, as a checked dataclass. Knows no recipe."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from genrec.errors import ConfigError, suggestion

T = TypeVar("T")


def _value(kind: Any, value: Any, where: str) -> Any:
    """``value`` checked against, and where needed built into, the annotated type ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _value(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}. {suggestion(str(value), arguments)}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_table(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} is {value!r}. It takes a list.")
        return tuple(_value(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}. It takes a table of keys and values.")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}. It takes a value of type {kind.__name__}.")
    return value


def from_table(cls: type[T], table: Any, where: str) -> T:
    """Build the dataclass ``cls`` from a TOML table. ``where`` begins every message.

    Raises:
        ConfigError: An unknown key (with the closest known one), a missing key or a value of the wrong type.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {table!r}. It takes a table of keys and values.")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}. {suggestion(key, fields)}")
    for name, item in fields.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and name not in table:
            raise ConfigError(f"{where}: the key {name!r} is missing.")
    return cls(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in table.items()})


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: There is no such file, or it is not TOML (with line and column).
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder = Path(path).parent
        there = sorted(str(other) for other in folder.glob("*.toml")) if folder.is_dir() else []
        raise ConfigError(f"{path}: no such file. {suggestion(str(path), there) if there else ''}".strip()) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a .toml file is wanted here.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def override(
    table: dict[str, Any], assignments: Iterable[str], example: str = "training.learning_rate=1e-3"
) -> dict[str, Any]:
    """``table`` with ``key=value`` assignments applied; keys may be dotted, values are TOML (a bare word is text).

    ``example`` is an assignment that an error may name.

    Raises:
        ConfigError: An assignment without ``=``, or a dotted key that goes through something that is not a table.
    """
    result = dict(table)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{assignment!r} is no assignment. Write key=value, such as {example}.")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        inner = result
        *parents, last = key.split(".")
        for parent in parents:
            below = inner.get(parent, {})
            if not isinstance(below, dict):
                raise ConfigError(f"{assignment!r}: {parent!r} is no table, its value is {below!r}.")
            inner[parent] = dict(below)
            inner = inner[parent]
        inner[last] = value
    return result


def check_choices(config: Any, where: str) -> None:
    """Refuse a value that is none of its field's ``Literal``: a misspelt one would act as another."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value, choices = getattr(config, name), typing.get_args(kind)
        if typing.get_origin(kind) is Literal and value not in choices:
            raise ConfigError(f"{where}: {name} is {value!r}. {suggestion(str(value), choices)}")


def as_table(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested tables, for hashes and reports."""
    return dataclasses.asdict(config)
