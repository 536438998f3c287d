import math

import pytest
from ttr_controller.pipeline.timing import break_even

SIZES = (256, 1024, 4096)


def test_break_even_is_found_where_two_power_laws_cross() -> None:
    exact = [n**2 * 1e-6 for n in SIZES]
    student = [n * 7e-4 for n in SIZES]
    assert break_even(SIZES, exact, student) == pytest.approx(700.0)


def test_no_break_even_when_slower_at_the_largest_size() -> None:
    assert break_even(SIZES, [1.0, 2.0, 3.0], [0.5, 1.0, 3.0]) is None


def test_faster_everywhere_gives_the_smallest_size() -> None:
    assert break_even(SIZES, [1.0, 2.0, 3.0], [0.9, 1.9, 2.9]) == 256.0


def test_a_lead_that_is_lost_again_does_not_count() -> None:
    found = break_even(SIZES, [1.0, 1.0, 1.0], [0.5, 2.0, 0.5])
    assert found is not None
    assert found == pytest.approx(math.sqrt(1024 * 4096))
