import pytest
import torch
from ttr_controller import budget
from ttr_controller.judge import Judge
from ttr_controller.testing import ToyBackend, ToySampler


def test_mask_errors_are_those_of_the_mask_per_image():
    toy = ToySampler(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    judge = Judge(toy, ToyBackend(toy))
    mask = budget.first_steps_full(4, 3, 5)
    errors = judge.mask_errors(mask, ["a", "bb"], [0, 1])
    expected = [toy.expected_error(mask, "a", 0), toy.expected_error(mask, "bb", 1)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-4)
    assert judge.mask_errors(budget.all_full(4, 3), ["a"], [0]).tolist() == [0.0]
