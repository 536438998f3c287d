import json

import pytest
import torch
from attn_dispatch import AttentionRouter, Route
from ttr_controller.guard import PolicyGuard
from ttr_controller.routing_record import RoutingRecord
from ttr_controller.testing import ToyBackend, ToySampler


def test_one_line_per_step_of_what_ran():
    toy = ToySampler(torch.ones(3, 2), rows=2, columns=2)
    record = RoutingRecord(toy.layers)

    def policy(step):
        return torch.tensor([1.0, -1.0 if step.sigma > 0.5 else 2.0])

    guard = PolicyGuard(policy, toy.layers, on_step=record)
    toy.sample(["a"], [0], AttentionRouter((Route(ToyBackend(toy), (guard,)),)))
    lines = record.lines()
    assert lines[0] == "sigma 1.000: student in 1 of 2 layers (toy:1)"
    assert lines[2] == "sigma 0.333: student in 0 of 2 layers"
    rows = json.loads(json.dumps(record.to_dict()))
    assert [row["choices"]["toy:1"] for row in rows] == ["student", "student", "full"]
    record.clear()
    assert record.lines() == []


def test_old_steps_go_first():
    toy = ToySampler(torch.ones(4, 2))
    record = RoutingRecord(toy.layers, ("full", "near", "far"), max_steps=2)
    for number, step in enumerate(toy.contexts()):
        record(step, (number % 3, 2))
    assert [row["sigma"] for row in record.to_dict()] == [context.sigma for context in toy.contexts()[2:]]
    assert record.lines()[0].endswith("near in 0 of 2 layers; far in 2 of 2 layers (toy:0, toy:1)")
    with pytest.raises(ValueError, match="max_steps"):
        RoutingRecord(toy.layers, max_steps=0)
