import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from value_utils import MAX_ENTRIES, clocked_sweep, combinations

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("clock", "values", "expected"),
    [
        ("7", "1, 2, 3", [1, 1, 1, 2, 2, 3, 3]),
        (6, [1, 2, 3], [1, 1, 2, 2, 3, 3]),
        ("5", "1 2 3", [1, 1, 2, 2, 3]),
        (7, [1, 2, 3, 4], [1, 1, 2, 2, 3, 3, 4]),
        ("0, 0, 0", "[4, 5]", [4, 4, 5]),
        ("", "0.1, 0.2", [0.1, 0.2]),
        (None, (3, 3), [3, 3]),
        ("0", "3 4", [3, 4]),
        ("4", "30", [30, 30, 30, 30]),
        ("", 30, [30]),
        ("4", 2.5, [2.5, 2.5, 2.5, 2.5]),
    ],
)
def test_sweep(clock: object, values: object, expected: list[float]) -> None:
    assert clocked_sweep(clock, values) == expected


def test_sweep_of_a_hundred() -> None:
    assert list(Counter(clocked_sweep(100, [1, 2, 3])).values()) == [34, 33, 33]


@pytest.mark.parametrize(
    ("clock", "values", "message"),
    [
        ("3", "", "values is empty"),
        ("", None, "values is empty"),
        ("2", "1, 2, 3", "values has 3 numbers but clock only 2 entries"),
        ("3.0", "1, 2", "values has 2 numbers but clock only 1 entries"),
        ("a, 2", "1", "clock: entry 1 of 2 is not a number"),
        ("2", "1, b", "values: entry 2 of 2 is not a number"),
    ],
)
def test_sweep_errors(clock: object, values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clocked_sweep(clock, values)


@given(st.integers(1, 40), st.integers(0, 200))
def test_sweep_is_balanced_and_in_order(values: int, more: int) -> None:
    entries = values + more
    swept = clocked_sweep(entries, list(range(values)))
    counts = Counter(swept)
    assert swept == sorted(swept)
    assert len(swept) == entries
    assert set(counts) == set(range(values))
    shares = [counts[value] for value in range(values)]
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


def _lists(lengths: list[int]) -> list[list[tuple[int, int]]]:
    return [[(j, entry) for entry in range(length)] for j, length in enumerate(lengths)]


@given(LENGTHS)
def test_combinations_are_the_whole_product_once(lengths: list[int]) -> None:
    lists = _lists(lengths)
    rows = list(zip(*combinations(lists), strict=True))
    assert sorted(rows) == sorted(product(*lists))


@given(LENGTHS)
def test_the_first_rows_step_together(lengths: list[int]) -> None:
    lists = _lists(lengths)
    columns = combinations(lists)
    period = math.lcm(*lengths)
    for column, entries in zip(columns, lists, strict=True):
        assert column[:period] == [entries[i % len(entries)] for i in range(period)]


@given(LENGTHS)
def test_coprime_lengths_keep_the_modular_order(lengths: list[int]) -> None:
    assume(math.lcm(*lengths) == math.prod(lengths))
    lists = _lists(lengths)
    for column, entries in zip(combinations(lists), lists, strict=True):
        assert column == [entries[i % len(entries)] for i in range(math.prod(lengths))]


@given(LENGTHS, st.integers(0, 3), st.integers(1, 6))
def test_every_entry_is_used_equally_often(lengths: list[int], which: int, start: int) -> None:
    lists = [[start * entry for entry in range(length)] for length in lengths]
    column = combinations(lists)[which % len(lists)]
    assert len(set(Counter(column).values())) == 1


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([[1, 2, 3], [4, 5]], [[1, 2, 3, 1, 2, 3], [4, 5, 4, 5, 4, 5]]),
        ([[1, 2], [3, 4]], [[1, 2, 1, 2], [3, 4, 4, 3]]),
        ([[1, 2], [3, 4], [5]], [[1, 2, 1, 2], [3, 4, 4, 3], [5, 5, 5, 5]]),
        ([[1, 2, 3]], [[1, 2, 3]]),
        ([[7, 7], [8, 9]], [[7, 7, 7, 7], [8, 9, 9, 8]]),
        ([[1, 2], [3, 4], [5, 6]], [[1, 2, 1, 2, 1, 2, 1, 2], [3, 4, 3, 4, 4, 3, 4, 3], [5, 6, 6, 5, 5, 6, 6, 5]]),
    ],
)
def test_combinations(lists: list[list[int]], expected: list[list[int]]) -> None:
    assert combinations(lists) == expected


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "at least one list"),
        ([[1], []], "list 2 of 2 is empty"),
        ([range(MAX_ENTRIES), [1, 2]], "1000000 x 2 = 2000000 combinations are more than 1000000; shorten a list"),
    ],
)
def test_combinations_errors(lists: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combinations(lists)
