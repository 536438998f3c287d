"""What a run compares at equal cost, and what it says of methods that it lacks."""

import pytest
import torch
from ttr_controller import budget
from ttr_controller.methods import METHODS
from ttr_controller.pipeline import comparing
from ttr_controller.pipeline.routing import DEFAULT_ROLLOUTS, Routing
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.testing import ToySampler

ALL = ("layer error", "budget", "probe", "flips", "pairs")


@pytest.fixture
def routing():
    toy = ToySampler(torch.ones(4, 3))
    generator = torch.Generator().manual_seed(3)
    rankings = {name: torch.rand(4, 3, generator=generator) for name in ALL}
    policy = RoutingPolicy(3, PolicyConfig(embed_dim=16, hidden_dim=16), seed=1)
    return Routing(policy, toy.contexts(), rankings["probe"], rankings)


def test_every_rule_and_every_ranking_stands_at_each_cost_with_the_same_number_of_full_slots(routing):
    settings = list(comparing.settings_to_compare(routing, 0.2, 2, seed=0))
    assert [one.method for one in settings[:2]] == ["all full", "all student"]
    methods = (*comparing.RULES, "probe", "flips", "pairs", "policy")
    assert len(methods) == comparing.METHODS_PER_LEVEL
    for level, share in enumerate((0.375, 7 / 12)):
        own = [one for one in settings if one.level == level]
        assert [one.method for one in own] == list(methods)
        count = round(share * 12)
        assert {int(one.mask.sum()) for one in own} == {count}
        masks = {one.method: one.mask for one in own}
        assert torch.equal(masks["pairs"], budget.top_k_mask(routing.rankings["pairs"], count))
        assert torch.equal(
            masks["distillation error by layer"], budget.top_k_mask(routing.rankings["layer error"], count)
        )


def test_rankings_that_were_not_measured_are_left_out(routing):
    few = Routing(routing.policy, routing.contexts, routing.scores, {"probe": routing.scores})
    found = {one.method for one in comparing.settings_to_compare(few, 0.2, 1, seed=0)}
    assert found == {"all full", "all student", "random", "first steps full", "last steps full", "probe", "policy"}


def test_methods_that_are_missing_are_named_with_the_minutes_they_take():
    points = [{"method": name, "seconds": 10.0} for name in ("random", *ALL)]
    said = comparing.not_run(points, 4, "auto")
    assert set(said) == {"relaxed", "reinforce"}
    assert said["relaxed"] == f"{DEFAULT_ROLLOUTS} rollouts each, about 4 min on this machine"
    assert set(comparing.not_run(points, 4, "relaxed")) == {"reinforce"}
    assert set(comparing.not_run([], 4, "probe")) == set(METHODS) - {"probe"}


def test_rules_without_rollouts_are_the_simple_ones():
    points = [
        {"method": name, "full_share": 0.5, "latent_rmse": error}
        for name, error in (("random", 0.3), ("budget", 0.2), ("pairs", 0.1), ("first steps full", 0.25))
    ]
    assert comparing.best_simple_baseline(points, 0.5) == ("budget", 0.2)
