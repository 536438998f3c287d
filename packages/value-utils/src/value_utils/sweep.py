"""Two ways of spreading values over runs: a balanced sweep along a clock, and every combination."""

import math
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

from value_utils.parse import MAX_ENTRIES, parse_clock, parse_numbers

T = TypeVar("T")


def clocked_sweep(clock: object, values: object) -> list[float]:
    """Hold each value for an equal share of the clock.

    With ``n`` clock entries and ``m`` values, each value is repeated ``n // m`` times in order, and the first
    ``n % m`` values once more: 7 entries and ``1, 2, 3`` give ``1, 1, 1, 2, 2, 3, 3``. What the clock's entries are
    does not matter, only how many there are.

    Args:
        clock: Read by `parse_clock`: ``30`` is thirty entries. Empty or 0 means one entry for each value.
        values: Read by `parse_numbers`: ``30`` is the one value 30.

    Returns:
        One value for each clock entry.

    Raises:
        ValueError: An input cannot be read, there are no values, or more values than clock entries.
    """
    swept = parse_numbers(values, "values")
    if not swept:
        raise ValueError("values is empty; write at least one number, for example 0.1, 0.2, 0.3")
    entries = len(parse_clock(clock, "clock")) or len(swept)
    if len(swept) > entries:
        raise ValueError(
            f"values has {len(swept)} numbers but clock only {entries} entries; give a longer clock or fewer values"
        )
    share, rest = divmod(entries, len(swept))
    return [value for i, value in enumerate(swept) for _ in range(share + (i < rest))]


def combinations(lists: Sequence[Sequence[T]]) -> list[list[T]]:
    """Pair every entry of each list with every entry of the others, each combination exactly once.

    **Order.** All lists step forward together, each starting again at its end: row ``i`` takes entry ``i mod n_j`` of
    list ``j``, which has ``n_j`` entries. If the lengths are pairwise coprime, that alone visits every combination:
    ``[1, 2, 3], [4, 5]`` gives ``[1, 2, 3, 1, 2, 3], [4, 5, 4, 5, 4, 5]``.

    Otherwise the rows would repeat after ``lcm(n_0, n_1, ...)`` of them. There the last list slips on by one entry, and
    when its slips are used up the list before it slips, like the digits of a counter: row ``i`` takes entry
    ``(i + slip_j) mod n_j``, and list ``j`` has ``gcd(n_j, lcm(n_0, ..., n_{j-1}))`` different slips (1 for coprime
    lengths). ``[1, 2], [3, 4]`` gives ``[1, 2, 1, 2], [3, 4, 4, 3]``.

    Args:
        lists: One or more lists, none of them empty.

    Returns:
        One column for each list, all of the length of the product of the lengths.

    Raises:
        ValueError: There is no list, one is empty, or there are more than ``MAX_ENTRIES`` combinations.
    """
    lengths = [len(entries) for entries in lists]
    if not lengths or 0 in lengths:
        empty = f"; list {lengths.index(0) + 1} of {len(lengths)} is empty" if lengths else ""
        raise ValueError(f"combinations needs at least one list, and an entry in each{empty}")
    total = math.prod(lengths)
    if total > MAX_ENTRIES:
        shape = " x ".join(str(length) for length in lengths)
        raise ValueError(f"{shape} = {total} combinations are more than {MAX_ENTRIES}; shorten a list")
    slips = [range(math.gcd(length, math.lcm(*lengths[:j]))) for j, length in enumerate(lengths)]
    period = math.lcm(*lengths)
    columns: list[list[T]] = [[] for _ in lists]
    for shifts in product(*slips):
        for column, entries, shift in zip(columns, lists, shifts, strict=True):
            column.extend(entries[(i + shift) % len(entries)] for i in range(period))
    return columns
