import pytest
import torch
from ttr_controller import methods
from ttr_controller.budget import top_k_mask
from ttr_controller.costs import AttentionCosts
from ttr_controller.layer_errors import measure_layer_errors
from ttr_controller.policy import PolicyConfig
from ttr_controller.relaxed import RelaxedConfig
from ttr_controller.testing import ToyBackend, ToySampler
from ttr_controller.trainer import ControllerConfig

IMAGES = (["a", "bb"], [0, 1])


@pytest.fixture(scope="module")
def ranked():
    damage = torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) ** 2 + 0.05
    toy = ToySampler(damage, rows=2, columns=2, growth=3.0)
    backend = ToyBackend(toy)
    counted = {}

    def count(name, work):
        before = toy.calls
        found = work()
        counted[name] = (toy.calls - before) / (toy.steps * len(toy.layers))
        return found

    by_layer = count("layer error", lambda: methods.rank_by_layer_error(toy, IMAGES, backend))
    budget = methods.rank_by_budget(toy, IMAGES, backend, AttentionCosts.of_student([0.5] * 4))
    path = toy.trajectory(*IMAGES)
    probe = count("probe", lambda: methods.rank_by_probe(toy, IMAGES, backend, path=path))
    flips = count("flips", lambda: methods.rank_by_flips(toy, IMAGES, backend, path=path))
    pairs = count("pairs", lambda: methods.rank_by_pairs(toy, IMAGES, backend, (0.25, 0.5, 0.75), path=path))
    relaxed = methods.rank_by_relaxed_gates(toy, IMAGES, backend, flips, RelaxedConfig(iterations=12))
    config = ControllerConfig(learning_rate=3e-3, validate_every=1)
    small = PolicyConfig(embed_dim=16, hidden_dim=32)
    reinforce = methods.rank_by_reinforce(toy, IMAGES, IMAGES, backend, probe, config, 6, policy=small)
    return toy, {one.method: one for one in (by_layer, budget, probe, flips, pairs, relaxed, reinforce)}, counted


def error(toy, ranking, count=6):
    return toy.expected_error(top_k_mask(ranking.scores, count), "a", 0)


def test_flips_and_gates_find_the_best_mask_and_the_others_do_not_beat_it(ranked):
    toy, found, _ = ranked
    generator = torch.Generator().manual_seed(0)
    random = [toy.expected_error(methods.simple_rules(3, 4, 6, generator)["random"], "a", 0) for _ in range(20)]
    for other in ("relaxed", "pairs"):
        assert error(toy, found["flips"]) == pytest.approx(error(toy, found[other]))
    assert error(toy, found["flips"]) <= min(error(toy, one) for one in found.values()) + 1e-6
    assert error(toy, found["flips"]) < 0.8 * sum(random) / 20


def test_reinforce_ends_no_worse_than_the_probe_that_it_starts_from(ranked):
    toy, found, _ = ranked
    assert error(toy, found["reinforce"]) <= error(toy, found["probe"]) + 1e-6


def test_rollouts_are_what_was_sampled(ranked):
    _, found, counted = ranked
    images = len(IMAGES[0])
    # The toy counts evaluations of a whole batch.
    assert found["probe"].rollouts == counted["probe"] * images == 4 * 2
    assert found["flips"].rollouts >= counted["flips"] * images > found["probe"].rollouts
    assert found["budget"].rollouts == found["layer error"].rollouts == 0.0
    assert found["pairs"].rollouts == counted["pairs"] * images
    assert found["relaxed"].rollouts == found["flips"].rollouts + 12 * 2 * 4
    assert found["reinforce"].rollouts > found["probe"].rollouts + 6 * 4


def test_the_layer_rule_is_one_score_per_layer(ranked):
    _, found, _ = ranked
    scores = found["layer error"].scores
    assert torch.equal(scores, scores[:1].expand(scores.shape))
    assert not torch.equal(found["budget"].scores, scores)


def test_budget_weighs_errors_against_costs_and_joins_the_errors_of_long_schedules():
    toy = ToySampler(torch.tensor([[0.3, 0.6], [0.9, 0.1]]), rows=2, columns=2)
    even = AttentionCosts.of_student([0.5, 0.5])
    by_error = methods.rank_by_budget(toy, IMAGES, ToyBackend(toy), even)
    errors = measure_layer_errors(toy, *IMAGES, ToyBackend(toy)).errors()
    assert (by_error.method, by_error.rollouts) == ("budget", 0.0)
    assert torch.equal(by_error.scores.flatten().argsort(), errors.flatten().argsort())
    dear = AttentionCosts(("full", "student"), torch.tensor([[100.0, 1.0], [2.0, 1.0]]))
    by_cost = methods.rank_by_budget(toy, IMAGES, ToyBackend(toy), dear).scores
    assert by_cost[:, 1].min() > by_cost[:, 0].max(), "a slot of the first layer costs as much as 99 of the second"
    long = ToySampler(torch.rand(20, 1, generator=torch.Generator().manual_seed(0)), rows=2, columns=2)
    scores = methods.rank_by_budget(long, IMAGES, ToyBackend(long), AttentionCosts.of_student([0.5])).scores
    assert scores.shape == (20, 1)
    # Equal errors within a bucket: the knapsack may take either slot, their order by worth is shared.
    assert len((scores % 1.0).round(decimals=4).unique()) == methods.SIGMA_BUCKETS


@pytest.mark.parametrize("shares", [(), (1.2,)])
def test_pairs_need_shares(shares):
    toy = ToySampler(torch.ones(2, 2))
    with pytest.raises(ValueError, match="shares between 0 and 1"):
        methods.rank_by_pairs(toy, IMAGES, ToyBackend(toy), shares)


def test_simple_rules_have_the_exact_count():
    rules = methods.simple_rules(3, 4, 5, torch.Generator().manual_seed(0))
    assert {name: int(mask.sum()) for name, mask in rules.items()} == dict.fromkeys(rules, 5)
    assert set(methods.METHODS) == {"pairs", "relaxed", "reinforce", "flips", "probe", "budget"}
