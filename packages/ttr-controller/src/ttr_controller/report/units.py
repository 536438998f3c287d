"""Numbers as text: significant digits, thousands separators and units, the same everywhere on the page."""

from __future__ import annotations

import math

DASH = "\u2013"
NBSP = "\u00a0"
TIMES = "\u00d7"
MINUS = "\u2212"
_SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def significant(value: float | None, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits; a dash for ``None`` and for what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    magnitude = int(exponent)
    if not -5 <= magnitude <= 12:
        text = f"{mantissa}{NBSP}{TIMES}{NBSP}10{str(magnitude).translate(_SUPERSCRIPTS)}"
    else:
        text = f"{float(f'{mantissa}e{exponent}'):,.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", MINUS)


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """Write a number and its unit, joined so that no line break parts them."""
    text = significant(value, digits)
    return text if text == DASH else f"{text}{NBSP}{unit}"


def percent(share: float | None, digits: int = 3) -> str:
    """Write a share (1.0 = all) in percent."""
    return quantity(None if share is None else 100 * share, "%", digits)


def whole(value: float | None) -> str:
    """Write a whole number with thousands separators."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.0f}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Write seconds; from two minutes on as minutes and seconds."""
    if seconds is None or not math.isfinite(seconds) or seconds < 120:
        return quantity(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,}{NBSP}min {rest}{NBSP}s"


def large(value: float | None) -> str:
    """Write a count in words where it is long: ``2.30 million``."""
    if value is None or not math.isfinite(value):
        return DASH
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{significant(value / size)}{NBSP}{name}"
    return whole(value)


def anything(value: bool | float | str | None) -> str:
    """Write a value of a check, whatever its type."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return significant(value)


def pretty(name: str) -> str:
    """Write a name from the data as words: ``near_far`` becomes ``near-far``, an abbreviation capitals."""
    return name.upper() if len(name) <= 3 else name.replace("_", "-")


def capital(name: str) -> str:
    """Write a name from the data at the start of a sentence."""
    text = pretty(name)
    return text[:1].upper() + text[1:]


def listing(names: list[str] | tuple[str, ...], joint: str = "and") -> str:
    """Join names as in a sentence: ``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {joint} {names[-1]}"
