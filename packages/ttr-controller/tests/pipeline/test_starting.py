from types import SimpleNamespace

import pytest
import torch
from ttr_controller.costs import AttentionCosts
from ttr_controller.pipeline import starting
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_distill.distributed import World


class Second(World):
    """The second of two processes, whose first one measured a student at half the time."""

    def gather(self, value):
        return [value / torch.tensor([1.0, 8.0]), value]


@pytest.mark.parametrize(
    ("student", "world", "unit"),
    [(1.0, World(), "milliseconds"), (3.0, World(), "operations"), (8.0, Second(1, 2), "milliseconds")],
)
def test_milliseconds_count_where_students_are_faster_and_those_of_the_first_process(monkeypatch, student, world, unit):
    toy = ToySampler(torch.ones(2, 3))
    asked = []

    def measure(sampler, backends, prompts, seeds):
        asked.append((sampler, len(backends), prompts, seeds))
        return AttentionCosts(("full", "student"), torch.tensor([2.0, student]).repeat(3, 1))

    monkeypatch.setattr(starting, "measure_costs", measure)
    modelled = AttentionCosts.of_student([0.3, 0.3, 0.3])
    bench = SimpleNamespace(sampler=toy, world=world)
    said, costs = starting.cost_table(bench, (["a", "b"], [0, 1]), ToyBackend(toy), modelled)
    assert said == unit
    assert (costs is modelled) == (unit == "operations")
    assert asked == [(toy, 1, ["a"], [0])]
    if world.size == 2:
        assert costs.table.tolist() == [[2.0, 1.0]] * 3
