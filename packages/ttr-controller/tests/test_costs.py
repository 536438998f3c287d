import time

import pytest
import torch
from ttr_controller.budget import relative_cost
from ttr_controller.costs import AttentionCosts, as_choices, measure_costs
from ttr_controller.testing import ToyBackend, ToySampler


def test_cost_of_a_plan_is_the_sum_over_its_slots():
    costs = AttentionCosts(("full", "a", "b"), torch.tensor([[4.0, 2.0, 1.0], [8.0, 2.0, 1.0]]))
    choices = torch.tensor([[0, 1], [2, 0], [1, 2]])
    assert costs.total(choices) == pytest.approx((4 + 2 + 1 + 8 + 2 + 1) / 36)
    assert costs.total(choices, eligible=torch.tensor([True, False])) == pytest.approx((4 + 1 + 2) / 12)
    assert costs.total(torch.zeros_like(choices)) == 1.0
    assert costs.cheapest() == pytest.approx(2 / 12)


def test_a_mask_costs_what_the_students_of_a_layer_cost():
    student = torch.tensor([0.2, 0.5, 0.9])
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    eligible = torch.tensor([True, False, True])
    costs = AttentionCosts.of_student(student)
    for keep in (None, eligible):
        assert costs.total(mask, eligible=keep) == pytest.approx(relative_cost(mask, student, eligible=keep))
    assert as_choices(mask).tolist() == [[0 if full else 1 for full in row] for row in mask.tolist()]


def test_share_for_a_speed_up():
    costs = AttentionCosts.of_student([0.2, 0.2])
    assert costs.share_for(0.5) == pytest.approx(0.375)
    assert costs.share_for(0.1) == 0.0
    assert costs.share_for(2.0) == 1.0
    assert AttentionCosts.of_student([2.0]).share_for(0.5) == 1.0


class Slow(ToyBackend):
    """A student that takes a known time in one layer."""

    def __call__(self, call):
        if call.layer == self.sampler.layers[1]:
            time.sleep(0.02)
        return super().__call__(call)


def test_measured_milliseconds_are_those_of_each_layer():
    toy = ToySampler(torch.zeros(2, 3))
    costs = measure_costs(toy, [ToyBackend(toy), Slow(toy, name="slow")], ["a"], [0], repeats=2)
    assert costs.names == ("full", "student", "slow")
    assert costs.table.shape == (3, 3)
    assert 20.0 <= costs.table[1, 2] < 200.0
    others = costs.table.flatten()[[0, 1, 2, 3, 4, 6, 7, 8]]
    assert others.max() < costs.table[1, 2]


def test_wrong_costs_are_named():
    with pytest.raises(ValueError, match="positive and finite"):
        AttentionCosts(("full", "a"), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="first action 'full'"):
        AttentionCosts(("a", "full"), torch.ones(1, 2))
    costs = AttentionCosts.of_student([0.5])
    with pytest.raises(ValueError, match=r"choices must be \[steps, 1\]"):
        costs.total(torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no layer is eligible"):
        costs.total(torch.zeros(2, 1, dtype=torch.bool), eligible=torch.tensor([False]))
