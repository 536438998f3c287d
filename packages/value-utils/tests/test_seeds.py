import pytest
from hypothesis import given
from hypothesis import strategies as st
from value_utils import MAX_SEED, seed_batch

SEEDS = st.integers(0, MAX_SEED)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [7758176404715800194, 15308084094301570617, 8791662011684601223]),
        (42, [2053695854357871005, 5073395517033431291, 10060236952204337488]),
        (1234, [14354624986284130233, 138193304849869414, 10740203138915481021]),
    ],
)
def test_known_batches(seed: int, expected: list[int]) -> None:
    assert seed_batch(seed, 3) == expected


@given(SEEDS, st.integers(1, 50), st.integers(1, 50))
def test_a_longer_batch_begins_with_the_shorter(seed: int, count: int, more: int) -> None:
    assert seed_batch(seed, count + more)[:count] == seed_batch(seed, count)


@given(SEEDS, st.integers(1, 50), SEEDS, SEEDS)
def test_seeds_stay_in_range(seed: int, count: int, one: int, other: int) -> None:
    low, high = sorted((one, other))
    batch = seed_batch(seed, count, min_value=low, max_value=high)
    assert len(batch) == count
    assert all(low <= drawn <= high for drawn in batch)


def test_both_ends_are_drawn() -> None:
    assert set(seed_batch(0, 200, min_value=3, max_value=5)) == {3, 4, 5}
    assert seed_batch(9, 2, min_value=7, max_value=7) == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1, "count": 1}, "seed must be 0 or more, got -1"),
        ({"seed": 1.5, "count": 1}, "seed must be a whole number, got 1.5"),
        ({"seed": 1, "count": True}, "count must be a whole number, got True"),
        ({"seed": 1, "count": 0}, "count must be 1 or more, got 0"),
        ({"seed": 1, "count": 1, "min_value": -1}, "min_value -1"),
        ({"seed": 1, "count": 1, "min_value": 5, "max_value": 4}, "min_value 5, max_value 4"),
    ],
)
def test_errors(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seed_batch(**arguments)
