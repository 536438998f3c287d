import math

import pytest
from ttr_controller.report import units

NBSP, TIMES, MINUS = "\u00a0", "\u00d7", "\u2212"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0044, "0.00440"),
        (0.09996, "0.100"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (26.6, "26.6"),
        (999.6, "1,000"),
        (1234567, "1,230,000"),
        (-0.2, f"{MINUS}0.200"),
        (1.234e-7, f"1.23{NBSP}{TIMES}{NBSP}10\u207b\u2077"),
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (math.inf, "\u2013"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert units.significant(value) == text


def test_units_stay_with_their_number_and_never_with_a_dash() -> None:
    assert units.quantity(12.34, "ms") == f"12.3{NBSP}ms"
    assert units.percent(0.665) == f"66.5{NBSP}%"
    assert units.quantity(None, "ms") == units.percent(math.nan) == "\u2013"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.400 s"), (119.6, "120 s"), (120, "2 min 0 s"), (187.1, "3 min 7 s"), (None, "\u2013")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert units.duration(seconds).replace(NBSP, " ") == text


def test_words() -> None:
    assert units.large(1_151_488) == f"1.15{NBSP}million"
    assert units.large(4096) == "4,096"
    assert units.anything(True) == "yes"
    assert units.anything("12 of 12") == "12 of 12"
    assert units.pretty("near_far") == "near-far"
    assert units.capital("hkr") == "HKR"
    assert units.listing(["a", "b", "c"]) == "a, b and c"
    assert units.listing([]) == ""
