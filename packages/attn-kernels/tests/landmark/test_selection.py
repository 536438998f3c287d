import itertools

import pytest
import torch
from attn_kernels import strided_landmarks
from attn_kernels.landmark import landmark_budget

SETTINGS = {"fraction": 0.08, "minimum": 64, "maximum": 512}


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (30, 30), (64, 64), (1024, 82), (2304, 184), (4096, 328), (10000, 512)]
)
def test_budget(tokens, expected):
    assert landmark_budget(tokens, **SETTINGS) == expected
    if tokens:
        assert len(strided_landmarks(tokens, (), **SETTINGS)) == expected


def test_no_cap_and_a_cap_that_beats_the_minimum():
    assert landmark_budget(10000, fraction=0.08, minimum=64, maximum=0) == 800
    assert landmark_budget(10000, fraction=0.08, minimum=64, maximum=10) == 10


@pytest.mark.parametrize("text", [0, 5, 77, 512])
def test_text_first_is_the_rule_of_the_first_published_students(text):
    length = text + 1024
    budget = landmark_budget(1024, **SETTINGS)
    expected = sorted({*range(text), *torch.linspace(text, length - 1, budget).round().long().tolist()})
    assert strided_landmarks(length, [(0, text)], **SETTINGS).tolist() == expected


def test_exact_ranges_are_whole_and_the_rest_is_spread_from_end_to_end():
    found = strided_landmarks(200, [(150, 160), (20, 30)], fraction=0.1, minimum=1, maximum=0)
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(set(found.tolist()))
    exact = [*range(20, 30), *range(150, 160)]
    others = [index for index in found.tolist() if index not in exact]
    assert len(found) == 20 + 18
    assert (others[0], others[-1]) == (0, 199)
    gaps = [b - a for a, b in itertools.pairwise(others)]
    assert max(gaps) <= 11 + 10
    assert min(gaps) >= 10


def test_edges():
    assert strided_landmarks(10, [(0, 10)], **SETTINGS).tolist() == list(range(10))
    assert strided_landmarks(10, (), fraction=0.0, minimum=0, maximum=0).tolist() == [0]
    assert strided_landmarks(10, [(0, 2)], fraction=0.0, minimum=1, maximum=0).tolist() == [0, 1, 2]
    assert strided_landmarks(10, (), **SETTINGS).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("length", "exact", "options", "message"),
    [
        (0, (), {}, "at least one key"),
        (10, [(5, 11)], {}, "outside the 10 keys"),
        (10, [(5, 4)], {}, "outside the 10 keys"),
        (10, (), {"fraction": 1.5}, "fraction in"),
        (10, (), {"minimum": -1}, "minimum"),
    ],
)
def test_wrong_arguments_are_named(length, exact, options, message):
    with pytest.raises(ValueError, match=message):
        strided_landmarks(length, exact, **{**SETTINGS, **options})
