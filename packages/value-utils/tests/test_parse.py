import array
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from value_utils import MAX_ENTRIES, parse_clock, parse_numbers

FINITE = st.floats(allow_nan=False, allow_infinity=False)


class FakeTensor:
    """What the parser may know of a tensor."""

    def __init__(self, nested: object) -> None:
        self.nested = nested

    def tolist(self) -> object:
        return self.nested


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        (" \n ", []),
        ([], []),
        ("[]", []),
        ("0.1, 0.2, 0.3", [0.1, 0.2, 0.3]),
        ("1 2\n3,4,\t5,,", [1, 2, 3, 4, 5]),
        ('[0.5, 2, "3"]', [0.5, 2, 3]),
        (" [1,\n2] ", [1, 2]),
        ("5", [5]),
        ("5.0", [5]),
        ("-3", [-3]),
        ("1e-3", [0.001]),
        (5, [5]),
        (0, [0]),
        (-2.5, [-2.5]),
        (Fraction(1, 4), [0.25]),
        ((1, 2.5, "3"), [1, 2.5, 3]),
        ([Decimal("0.5"), " 7 "], [0.5, 7]),
        (array.array("d", [1.5, 2.5]), [1.5, 2.5]),
        (FakeTensor([[1.0, 2.0], [3.0, 4.0]]), [1, 2, 3, 4]),
        (FakeTensor(7), [7]),
        ([FakeTensor(7), FakeTensor([[8.0]])], [7, 8]),
    ],
)
def test_numbers(value: object, expected: list[float]) -> None:
    numbers = parse_numbers(value)
    assert numbers == expected
    assert all(type(number) is float for number in numbers)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1, a, 3", r"sizes: entry 2 of 3 is not a number: 'a'; separate"),
        ("1;2", r"sizes: entry 1 of 1 is not a number: '1;2'; separate"),
        ("1, nan", r"sizes: entry 2 of 2 must be finite, got 'nan'"),
        ("[1, Infinity]", r"sizes: entry 2 of 2 must be finite, got inf"),
        ([1.0, 2.0, math.nan], r"sizes: entry 3 of 3 must be finite, got nan"),
        (-math.inf, r"sizes must be finite, got -inf"),
        ("[1, [2, 3]]", r"sizes: entry 2 of 2 is a list; lists must be flat"),
        ([[1], 2], r"sizes: entry 1 of 2 is a list"),
        ([1, FakeTensor([1.0, 2.0])], r"sizes: entry 2 of 2 is a list"),
        ("[1, 2", r"sizes starts with '\[' but is not a JSON list"),
        ("[1] 2", r"sizes starts with '\[' but is not a JSON list"),
        ("[" * 200_000, r"sizes is nested too deeply"),
        (f"[{'1' * 5000}]", r"sizes is nested too deeply or has a number too long"),
        ([1, None], r"sizes: entry 2 of 2 must be a number, got None of type NoneType"),
        ("[null]", r"sizes: entry 1 of 1 must be a number, got None"),
        ({"a": 1}, r"sizes must be a number, got \{'a': 1\} of type dict"),
        (1j, r"sizes must be a number, got 1j of type complex"),
        (b"12", r"sizes must be a number, got b'12' of type bytes"),
        (True, r"sizes is True; write 1 or 0"),
        ([1, False], r"sizes: entry 2 of 2 is False"),
        ("[true]", r"sizes: entry 1 of 1 is True"),
        (FakeTensor([True, False]), r"sizes: entry 1 of 2 is True"),
    ],
)
def test_what_is_not_a_number_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_numbers(value, "sizes")
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_clock(value, "sizes")


def test_numbers_beyond_a_float() -> None:
    with pytest.raises(ValueError, match="sizes must be finite, got 1000"):
        parse_numbers(10**400, "sizes")
    with pytest.raises(ValueError, match="sizes: entry 1 of 1 must be finite, got a very long number"):
        parse_numbers([10**5000], "sizes")
    with pytest.raises(ValueError, match="got a very long number"):
        parse_clock(10**5000)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", [1, 2, 3]),
        (" 7 ", [1, 2, 3, 4, 5, 6, 7]),
        ("003", [1, 2, 3]),
        ("0", []),
        (3, [1, 2, 3]),
        (0, []),
        (FakeTensor(2), [1, 2]),
        ("", []),
        (None, []),
        ("3.0", [3]),
        ("+3", [3]),
        ("-3", [-3]),
        ("[3]", [3]),
        (3.0, [3]),
        ([3], [3]),
        (FakeTensor([3]), [3]),
        (FakeTensor([[5, 6]]), [5, 6]),
        ("0, 1, 2", [0, 1, 2]),
    ],
)
def test_only_a_clock_counts(value: object, expected: list[float]) -> None:
    ticks = parse_clock(value)
    assert ticks == expected
    assert all(type(tick) is float for tick in ticks)


@pytest.mark.parametrize("value", [-1, MAX_ENTRIES + 1, str(MAX_ENTRIES + 1), "9" * 10_000, 10**400])
def test_a_count_out_of_range(value: object) -> None:
    with pytest.raises(ValueError, match="clock counts from 1 to a number between 0 and 1000000, got"):
        parse_clock(value)


@given(st.lists(FINITE))
def test_round_trips(numbers: list[float]) -> None:
    assert parse_numbers(numbers) == numbers
    assert parse_numbers(tuple(numbers)) == numbers
    assert parse_numbers(repr(numbers)) == numbers
    assert parse_numbers(", ".join(map(repr, numbers))) == numbers
    assert parse_numbers("\n".join(map(repr, numbers))) == numbers
    assert parse_numbers(FakeTensor([numbers, [numbers]])) == numbers * 2


@given(st.integers(-(10**15), 10**15))
def test_a_lone_number_is_that_number(number: int) -> None:
    assert parse_numbers(number) == parse_numbers(str(number)) == parse_numbers([number]) == [float(number)]


@given(st.text())
def test_any_text_gives_finite_numbers_or_a_value_error(text: str) -> None:
    for parse in (parse_numbers, parse_clock):
        try:
            assert all(math.isfinite(number) for number in parse(text, "field"))
        except ValueError as error:
            assert str(error).startswith("field")  # noqa: PT017
