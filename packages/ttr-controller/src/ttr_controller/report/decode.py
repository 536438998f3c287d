"""JSON values into dataclasses, by their annotations, with errors that name the place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ResultsError(ValueError):
    """The results of a run cannot be read; the message is one line that says why and what to do."""


def finite_or_none(text: str) -> float | None:
    """Read a JSON number; ``None`` where it is too large for a float."""
    value = float(text)
    return value if math.isfinite(value) else None


def describe(value: object) -> str:
    """A value for an error message: short, on one line."""
    if value is None:
        return "null"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def decode_object(kind: type[T], value: object, where: str, unread: list[str]) -> T:
    """Make a dataclass from a JSON object, its fields by their annotations.

    A field with a default may be missing or ``null``.

    Args:
        kind: The dataclass.
        value: What JSON gave.
        where: Path of the object in the file, for messages.
        unread: Gets the paths of keys that the dataclass does not have.

    Returns:
        The value.

    Raises:
        ResultsError: A field is missing or of another type; the message starts with its path.
    """
    if not isinstance(value, Mapping):
        raise ResultsError(f"{where} must be an object, got {describe(value)}")
    hints = get_type_hints(kind)
    chosen: dict[str, object] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{item.name}" if where else item.name
        if item.name in value:
            given = value[item.name]
            optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
            if given is None and optional:
                continue
            chosen[item.name] = _decode(hints[item.name], given, place, unread)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ResultsError(f"{place} is missing")
    names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unread.extend(f"{where}.{name}" if where else str(name) for name in value if name not in names)
    try:
        return kind(**chosen)
    except ResultsError as error:
        raise ResultsError(f"{where}: {error}") from None


def _decode(kind: object, value: object, where: str, unread: list[str]) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _decode_union([option for option in arguments if option is not NoneType], value, where, unread)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ResultsError(f"{where} must be a list, got {describe(value)}")
        return tuple(_decode(arguments[0], item, f"{where}[{index}]", unread) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ResultsError(f"{where} must be an object, got {describe(value)}")
        return {str(key): _decode(arguments[1], item, f"{where}.{key}", unread) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return decode_object(kind, value, where, unread)
    return _decode_scalar(kind, value, where)


def _decode_union(options: list[object], value: object, where: str, unread: list[str]) -> object:
    for option in options[:-1]:
        try:
            return _decode(option, value, where, unread)
        except ResultsError:
            continue
    return _decode(options[-1], value, where, unread)


def _decode_scalar(kind: object, value: object, where: str) -> bool | int | float | str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is float and is_number and abs(value) < 1e300:  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if kind is int and is_number and value == int(value):  # type: ignore[call-overload]
        return int(value)  # type: ignore[call-overload,no-any-return]
    expected = {bool: "true or false", str: "a text", float: "a number", int: "a whole number"}
    name = expected[kind] if isinstance(kind, type) and kind in expected else str(kind)
    raise ResultsError(f"{where} must be {name}, got {describe(value)}")
