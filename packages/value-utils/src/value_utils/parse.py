"""Lists of numbers from typed text, JSON, Python sequences, scalars and tensors.

Tensors and arrays are recognised by their ``tolist`` method, so no array library is imported here.
"""

import json
import math
from typing import Protocol, SupportsFloat, SupportsIndex, runtime_checkable

MAX_ENTRIES = 1_000_000
"""The longest list that a count or a product may ask for; a typing error must not fill the memory."""


@runtime_checkable
class _ToList(Protocol):
    """A tensor or an array of any library."""

    def tolist(self) -> object: ...


def parse_numbers(value: object, name: str = "values") -> list[float]:
    """Read a list of finite numbers.

    ========================================  ==========================================
    ``value``                                 result
    ========================================  ==========================================
    ``None``, blank text, an empty list       ``[]``
    ``"0.1, 0.2 0.3"``, several lines         ``[0.1, 0.2, 0.3]``
    ``"[0.1, 0.2]"`` (JSON)                   ``[0.1, 0.2]``
    ``"30"``, ``30``                          ``[30.0]``
    list or tuple of numbers or their text    the numbers
    tensor or array of any shape              its numbers in storage order
    ========================================  ==========================================

    ``True`` and ``False`` are refused everywhere: a switch is not a number, and reading it as one hides a wrong link.

    Args:
        value: What to read, see the table.
        name: The input's name, for messages.

    Returns:
        The numbers as floats, in order.

    Raises:
        ValueError: Something is not a finite number; the message has the name, the position and what to write.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return _parse_text(value, name)
    if isinstance(value, list | tuple):
        return _numbers(value, name)
    if isinstance(value, _ToList):
        return _numbers(_flatten(value.tolist()), name)
    return [_number(value, name)]


def parse_clock(value: object, name: str = "clock") -> list[float]:
    """Read a clock: like `parse_numbers`, but a lone whole number ``n`` counts from 1 to n.

    ``"30"`` and ``30`` give ``1.0 .. 30.0``, ``0`` gives ``[]``. ``"30.0"``, ``"+30"`` and ``"[30]"`` stay one number.

    Args:
        value: What to read.
        name: The input's name, for messages.

    Returns:
        The entries as floats.

    Raises:
        ValueError: As for `parse_numbers`, or the count is negative or above ``MAX_ENTRIES``.
    """
    if isinstance(value, _ToList):
        value = value.tolist()
        value = _flatten(value) if isinstance(value, list) else value
    if isinstance(value, str) and value.strip().isdecimal():
        digits = value.strip().lstrip("0") or "0"
        # An int of thousands of digits is refused by Python with a message about itself.
        count = int(digits) if len(digits) <= len(str(MAX_ENTRIES)) else MAX_ENTRIES + 1
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        return parse_numbers(value, name)
    if not 0 <= count <= MAX_ENTRIES:
        raise ValueError(f"{name} counts from 1 to a number between 0 and {MAX_ENTRIES}, got {_shown(value)}")
    return [float(tick) for tick in range(1, count + 1)]


def _parse_text(text: str, name: str) -> list[float]:
    text = text.strip()
    if not text.startswith("["):
        return _numbers(text.replace(",", " ").split(), name)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} starts with '[' but is not a JSON list: {error}; write for example [0.1, 0.2] or 0.1, 0.2"
        ) from None
    except (RecursionError, ValueError):
        raise ValueError(f"{name} is nested too deeply or has a number too long to read; write one flat list") from None
    return _numbers(items, name)


def _numbers(items: list[object] | tuple[object, ...] | list[str], name: str) -> list[float]:
    return [_number(item, f"{name}: entry {i} of {len(items)}") for i, item in enumerate(items, 1)]


def _number(item: object, where: str) -> float:
    if isinstance(item, _ToList):
        values = _flatten(item.tolist())
        item = values[0] if len(values) == 1 else values
    if isinstance(item, list | tuple):
        raise ValueError(f"{where} is a list; lists must be flat, so write its numbers in the outer list")
    if isinstance(item, bool):
        raise ValueError(f"{where} is {item}; write 1 or 0 where a number is meant")
    if item is None or not isinstance(item, str | SupportsFloat | SupportsIndex):
        raise ValueError(f"{where} must be a number, got {_shown(item)} of type {type(item).__name__}")
    try:
        number = float(item)
    except OverflowError:
        number = math.inf
    except ValueError:
        raise ValueError(
            f"{where} is not a number: {_shown(item)}; separate numbers by commas, spaces or new lines"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"{where} must be finite, got {_shown(item)}")
    return number


def _flatten(nested: object) -> list[object]:
    if not isinstance(nested, list):
        return [nested]
    return [item for inner in nested for item in _flatten(inner)]


def _shown(item: object) -> str:
    try:
        text = repr(item)
    except ValueError:  # an int of more digits than Python prints
        return "a very long number"
    return text if len(text) <= 60 else f"{text[:57]}..."
