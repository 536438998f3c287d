from itertools import product

import pytest
import torch
from ttr_controller.budget import top_k_mask
from ttr_controller.costs import as_choices
from ttr_controller.knapsack import (
    bucket_errors,
    choices_from_logits,
    knapsack_choices,
    knapsack_scores,
    layer_threshold_scores,
)


def brute_force(errors, costs, limit):
    steps, layers, count = errors.shape
    flat, prices = errors.reshape(-1, count).double(), costs.expand(errors.shape).reshape(-1, count).double()
    best = None
    for picks in product(range(count), repeat=steps * layers):
        index = torch.tensor(picks)[:, None]
        if prices.gather(1, index).sum() <= limit * (1 + 1e-6):
            total = flat.gather(1, index).square().sum().item()
            best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_trying_everything_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(2, 3, 3, generator=generator)
    errors[..., 0] = 0.0
    costs = torch.rand(3, 3, generator=generator) + 0.1
    costs[:, 0] += 1.0
    cheapest = costs.amin(dim=1).sum().item() * 2
    for limit in (cheapest, 0.5 * (cheapest + costs[:, 0].sum().item() * 2), costs[:, 0].sum().item() * 2):
        choices = knapsack_choices(errors, costs, limit)
        spent = costs.expand(2, 3, 3).gather(2, choices[..., None]).sum().item()
        found = errors.gather(2, choices[..., None]).square().sum().item()
        assert spent <= limit * (1 + 1e-6)
        assert found <= brute_force(errors, costs, limit) * 1.02 + 1e-9


def test_scores_at_equal_costs_stand_in_the_order_of_the_errors():
    errors = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    scores = knapsack_scores(errors, torch.tensor([3.0, 1.0]).expand(5, 2))
    assert torch.equal(scores.flatten().argsort(), errors.flatten().argsort())


def test_scores_count_the_plans_and_break_ties_by_what_a_cost_buys():
    # The first buys most for its cost, but does not fit most limits.
    large = knapsack_scores(
        torch.tensor([[11.0, 1.0, 0.9]]).sqrt(), torch.tensor([[11.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    )
    assert large[0, 1] > large[0, 2] > large[0, 0]
    # One limit: the first two are both in its plan; the second buys more for its cost, the first more in all.
    costs = torch.tensor([[5.0, 1.0], [2.0, 1.0], [11.0, 1.0]])
    alike = knapsack_scores(torch.tensor([[1.0, 0.9, 0.1]]), costs, limits=1)
    assert alike[0, 1] > alike[0, 0] > 1.0 > alike[0, 2]


def test_scores_weigh_errors_against_what_a_student_saves():
    # Per unit of cost the second layer is worth more; the third one's student is dearer than full attention.
    errors = torch.tensor([[1.0, 0.9, 0.5], [0.2, 0.18, 0.1]])
    costs = torch.tensor([[5.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    scores = knapsack_scores(errors, costs)
    assert scores[0, 1] > scores[0, 0] > scores[1, 0]
    assert (scores[:, 2] >= scores[:, :2].max()).all()
    half = 0.5 * (costs.amin(dim=1).sum() + costs[:, 0].sum()).item() * 2
    plan = knapsack_choices(torch.stack([torch.zeros_like(errors), errors], dim=2), costs, half) == 0
    assert scores[plan].min() >= scores[~plan].max(), "here the best plan of a budget is a threshold of the scores"
    with pytest.raises(ValueError, match="non-negative"):
        knapsack_scores(-errors, costs)


def test_with_equal_costs_it_keeps_the_largest_errors_full():
    scores = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    errors = torch.stack([torch.zeros_like(scores), scores], dim=2)
    costs = torch.tensor([1.0, 0.19]).expand(6, 2)
    for count in (0, 1, 17, 18, 35, 36):
        limit = count + 0.19 * (36 - count)
        assert torch.equal(knapsack_choices(errors, costs, limit + 1e-9), as_choices(top_k_mask(scores, count)))


def test_a_dear_layer_has_to_be_worth_its_price():
    errors = torch.zeros(1, 3, 2)
    errors[0, :, 1] = torch.tensor([1.5, 0.8, 0.8])
    costs = torch.tensor([[2.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    assert knapsack_choices(errors, costs, 2.2).tolist() == [[0, 1, 1]]
    assert knapsack_choices(errors, costs, 2.15).tolist() == [[1, 0, 0]]


def test_what_is_not_allowed_is_not_chosen_and_too_little_is_an_error():
    errors = torch.tensor([[[0.0, 0.1], [0.0, torch.inf]]])
    costs = torch.tensor([[1.0, 0.2], [1.0, 0.2]])
    assert knapsack_choices(errors, costs, 1.3).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"cheapest choices cost 1\.2, more than the limit of 1\.1"):
        knapsack_choices(errors, costs, 1.1)
    with pytest.raises(ValueError, match=r"errors must be \[steps, L, A\]"):
        knapsack_choices(errors, costs[:1], 1.1)
    with pytest.raises(ValueError, match="non-negative"):
        knapsack_choices(errors, -costs, 1.1)


def test_choices_from_logits_take_the_likeliest_plan_within_the_cost():
    logits = torch.tensor([[3.0, -1.0, 0.5, 2.0]])
    costs = torch.tensor([1.0, 0.5]).expand(4, 2)
    assert choices_from_logits(logits, costs, 1.0).tolist() == [[0, 1, 0, 0]]
    assert choices_from_logits(logits, costs, 0.75).tolist() == [[0, 1, 1, 0]]
    assert choices_from_logits(logits, costs, 0.5).tolist() == [[1, 1, 1, 1]]
    three = torch.tensor([[[0.0, 1.0, 0.9], [0.0, 1.0, -5.0]]])
    prices = torch.tensor([1.0, 0.6, 0.2]).expand(2, 3)
    assert choices_from_logits(three, prices, 0.6).tolist() == [[1, 1]]
    assert choices_from_logits(three, prices, 0.4).tolist() == [[2, 1]]


def test_the_threshold_rule_keeps_whole_layers_full():
    scores = layer_threshold_scores(torch.tensor([0.2, 0.9, 0.5]), 4)
    assert top_k_mask(scores, 4).tolist() == [[False, True, False]] * 4
    more = top_k_mask(scores, 6)
    assert more[:, 1].all()
    assert more[:, 2].tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"layer_errors must be \[L\]"):
        layer_threshold_scores(scores, 4)


def test_errors_of_a_bucket_are_joined_and_empty_buckets_take_the_nearest():
    measured = torch.tensor([[3.0], [4.0], [1.0]])
    spread = bucket_errors([1.0, 0.9, 0.5, 0.05], [1.0, 0.95, 0.1], measured, 4)
    assert spread[:, 0].tolist() == pytest.approx([12.5**0.5, 12.5**0.5, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"measured must be \[1, L\]"):
        bucket_errors([1.0], [1.0], measured, 2)
    with pytest.raises(ValueError, match="buckets"):
        bucket_errors([1.0], [1.0, 0.5, 0.1], measured, 0)


def test_rounded_costs_never_break_the_limit():
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        errors = torch.rand(6, 4, 3, generator=generator)
        errors[..., 0] = 0.0
        costs = torch.rand(4, 3, generator=generator) + torch.tensor([1.0, 0.2, 0.1])
        limit = 6 * float(0.6 * costs.amin(dim=1).sum() + 0.4 * costs[:, 0].sum())
        choices = knapsack_choices(errors, costs, limit, resolution=40)
        assert costs.expand(6, 4, 3).gather(2, choices[..., None]).sum() <= limit * (1 + 2e-6)
