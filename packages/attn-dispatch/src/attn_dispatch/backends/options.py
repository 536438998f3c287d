"""Options of a backend: name, type, default, range and meaning stand once, in the dataclass that is read.

A user interface makes its inputs from ``options_of``, so that nothing is written twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from dataclasses import Field

Value = bool | int | float | str
"""What an option may hold."""

_V = TypeVar("_V", bool, int, float, str)
_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name and default.

    Attributes:
        help: What it does, for a tooltip.
        minimum: Smallest value of a number.
        maximum: Largest value of a number.
        step: By how much a user interface changes a number.
        choices: The allowed texts.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()

    def misfit(self, value: object, default: Value) -> str | None:
        """Say what is wrong with a value, or ``None``.

        Args:
            value: The value.
            default: The default, whose type the value must have; an int will do for a float.
        """
        if isinstance(default, bool) or isinstance(value, bool):
            return None if isinstance(default, bool) and isinstance(value, bool) else "must be " + _noun(default)
        if isinstance(default, str):
            if isinstance(value, str) and value in self.choices:
                return None
            return f"must be one of {', '.join(map(repr, self.choices))}"
        if not isinstance(value, int) and not (isinstance(default, float) and isinstance(value, float)):
            return "must be " + _noun(default)
        if not math.isfinite(value):
            return "must be finite"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum:g}"
        return None


class NamedOption(NamedTuple):
    """An option of a configuration.

    Attributes:
        name: Name of the field.
        default: Its default, of the type that it takes.
        option: What else is known of it.
    """

    name: str
    default: Value
    option: Option


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


def option(
    default: _V,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    step: float | None = None,
    choices: tuple[str, ...] = (),
) -> _V:
    """Make a dataclass field that carries an ``Option``; the arguments are those of ``Option``."""
    return field(default=default, metadata={_KEY: Option(help, minimum, maximum, step, choices)})


def options_of(config: _Dataclass | type[_Dataclass]) -> tuple[NamedOption, ...]:
    """Return the options of a configuration, in the order of its fields."""
    known = (one for one in fields(config) if _KEY in one.metadata)
    return tuple(NamedOption(one.name, cast(Value, one.default), one.metadata[_KEY]) for one in known)


def check_options(config: _Dataclass) -> None:
    """Check every option of a configuration against its type and range.

    Raises:
        ValueError: Naming the option, its value and what it must be.
    """
    for name, default, known in options_of(config):
        value = getattr(config, name)
        misfit = known.misfit(value, default)
        if misfit is not None:
            raise ValueError(f"{name} {misfit}, got {value!r}")


def _noun(default: Value) -> str:
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return kinds[type(default)]
