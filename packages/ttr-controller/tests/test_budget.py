import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ttr_controller import budget


@st.composite
def problems(draw):
    steps, layers = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    eligible = torch.tensor(draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))
    count = draw(st.integers(0, steps * int(eligible.sum())))
    return steps, layers, eligible, count


@given(problems(), st.integers(0, 100))
def test_every_baseline_meets_the_count_exactly(problem, seed):
    steps, layers, eligible, count = problem
    generator = torch.Generator().manual_seed(seed)
    ties = torch.randint(0, 3, (steps, layers), generator=generator).float()
    masks = [
        budget.random_mask(steps, layers, count, generator, eligible=eligible),
        budget.first_steps_full(steps, layers, count, eligible=eligible),
        budget.last_steps_full(steps, layers, count, eligible=eligible),
        budget.top_k_mask(ties, count, eligible=eligible),
    ]
    for mask in masks:
        assert mask.shape == (steps, layers)
        assert mask[:, ~eligible].all()
        assert int(mask[:, eligible].sum()) == count


def test_first_and_last_steps_fill_in_running_order():
    first = budget.first_steps_full(3, 4, 6)
    assert first.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]
    last = budget.last_steps_full(3, 4, 6)
    assert last.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


def test_top_k_takes_the_highest_scores():
    scores = torch.tensor([[0.1, 5.0, -2.0], [3.0, 0.2, 4.0]])
    assert budget.top_k_mask(scores, 3).tolist() == [[False, True, False], [True, False, True]]
    eligible = torch.tensor([True, False, True])
    assert budget.top_k_mask(scores, 1, eligible=eligible).tolist() == [[False, True, False], [False, True, True]]


def test_ties_go_to_the_earlier_slot():
    assert budget.top_k_mask(torch.zeros(2, 2), 3).tolist() == [[True, True], [True, False]]


def test_random_mask_depends_on_the_generator_alone():
    draws = [budget.random_mask(8, 6, 24, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_mask_is_uniform_over_slots():
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([budget.random_mask(3, 4, 4, generator) for _ in range(3000)]).float().mean(dim=0)
    standard_error = (1 / 3 * 2 / 3 / 3000) ** 0.5
    assert (mean - 1 / 3).abs().max() < 4 * standard_error


def test_all_full_and_all_student():
    eligible = torch.tensor([True, False, True])
    assert budget.all_full(2, 3).all()
    assert budget.all_student(2, 3, eligible=eligible).tolist() == [[False, True, False]] * 2
    assert not budget.all_student(2, 3).any()


def test_share_and_cost_count_eligible_slots_only():
    eligible = torch.tensor([True, True, False])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert budget.full_share(mask, eligible=eligible) == 0.25
    assert budget.full_share(mask) == 0.5
    student = torch.tensor([0.2, 0.4, 0.9])
    assert budget.relative_cost(mask, student, eligible=eligible) == pytest.approx((1 + 0.4 + 0.2 + 0.4) / 4)
    assert budget.relative_cost(budget.all_full(2, 3), student, eligible=eligible) == 1.0


def test_slot_count_rounds_to_the_nearest():
    assert budget.slot_count(8, torch.ones(6, dtype=torch.bool), 0.5) == 24
    assert budget.slot_count(3, torch.tensor([True, False, True]), 0.3) == 2
    with pytest.raises(ValueError, match="between 0 and 1"):
        budget.slot_count(3, torch.ones(1, dtype=torch.bool), 1.5)


def test_logits_for_scores_keep_the_ranking_whatever_the_distribution():
    scores = torch.exp(3.0 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    eligible = torch.tensor([True] * 5 + [False] * 2)
    logits = budget.logits_for_scores(scores, spread=2.0, eligible=eligible)
    inner = logits[:, :5]
    assert torch.equal(inner.flatten().argsort(), scores[:, :5].flatten().argsort())
    assert (logits[:, 5:] == 0).all()
    assert inner.mean().abs() < 1e-5
    assert 1.7 < inner.std() < 2.1


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
def test_shift_to_share_reaches_the_expected_share(share):
    logits = 6.0 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1)) + 11.0
    eligible = torch.tensor([True, True, False, True, False, True])
    shift = budget.shift_to_share(logits, share, eligible=eligible)
    assert torch.sigmoid(logits + shift)[:, eligible].mean().item() == pytest.approx(share, abs=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="6 eligible slots, got 7"):
        budget.top_k_mask(torch.zeros(2, 3), 7)
    with pytest.raises(ValueError, match="NaN"):
        budget.top_k_mask(torch.tensor([[float("nan"), 1.0]]), 1)
    with pytest.raises(ValueError, match="eligible must be bool"):
        budget.top_k_mask(torch.zeros(2, 3), 1, eligible=torch.ones(3))
    with pytest.raises(ValueError, match="no layer is eligible"):
        budget.full_share(torch.ones(2, 3, dtype=torch.bool), eligible=torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_a_tilt_meets_the_expected_cost_and_moves_dear_attentions_most(target):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 3, generator=generator)
    logits[..., 2] = 0.0
    costs = torch.tensor([[4.0, 2.0, 0.4], [1.0, 0.5, 0.1], [1.0, 0.5, 0.1]])
    eligible = torch.tensor([True, True, False])
    tilt = budget.tilt_to_cost(logits, costs, target, eligible=eligible)
    p = torch.softmax(logits + tilt, dim=2)[:, eligible]
    assert ((p * costs[eligible]).sum() / (5 * 5.0)).item() == pytest.approx(target, abs=1e-4)
    assert (tilt[:, 2] == 0.0).all()
    assert torch.allclose(tilt[0], 4 * tilt[1])
    two = budget.tilt_to_cost(logits[..., 0], costs[:, [0, 2]], target)
    p = torch.sigmoid(logits[..., 0] + two[:, 0])
    spent = (p * costs[:, 0] + (1 - p) * costs[:, 2]).sum() / (5 * 6.0)
    assert spent.item() == pytest.approx(target, abs=1e-4)
