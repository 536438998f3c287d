import math

import pytest
import torch
from ttr_distill.training.loss import LOG_VAR_RANGE, DistillLoss, heldout_distance


def pair(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(batch, 3, 5, 4, generator=generator)
    return target + 0.3 * torch.randn(target.shape, generator=generator), target


def by_hand(output: torch.Tensor, target: torch.Tensor, beta: float) -> tuple[float, float]:
    huber, cosine = [], []
    for a, b in zip(output.reshape(-1, 4).tolist(), target.reshape(-1, 4).tolist(), strict=True):
        gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
        huber += [gap * gap / (2 * beta) if gap < beta else gap - beta / 2 for gap in gaps]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosine.append(1 - dot / (math.hypot(*a) * math.hypot(*b)))
    return sum(huber) / len(huber), sum(cosine) / len(cosine)


def test_loss_equals_the_formula() -> None:
    output, target = pair()
    loss = DistillLoss(beta=0.2)
    with torch.no_grad():
        loss.log_var_huber.fill_(0.7)
    terms = loss(output, target)
    huber, cosine = by_hand(output, target, 0.2)
    expected = huber / (2 * math.exp(0.7)) + 0.7 / 2 + cosine / (2 * math.exp(-1)) - 1 / 2
    mse = sum((a - b) ** 2 for a, b in zip(output.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert [float(term.detach()) for term in terms] == pytest.approx(
        [expected, huber, cosine, mse / output.numel()], rel=1e-4
    )
    assert not terms.mse.requires_grad


def test_log_variances_start_at_zero_and_minus_one_and_stay_in_range() -> None:
    loss = DistillLoss()
    assert [float(value) for value in loss.state_dict().values()] == [0.0, -1.0]
    with torch.no_grad():
        loss.log_var_huber.fill_(-50.0)
        loss.log_var_cosine.fill_(50.0)
    loss.clamp()
    assert [float(value) for value in loss.state_dict().values()] == list(LOG_VAR_RANGE)


def test_queries_without_weight_do_not_count() -> None:
    output, target = pair()
    keep = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    spoiled = torch.where(keep[:, None, :, None], output, 99.0)
    expected, _ = by_hand(
        output.transpose(1, 2)[keep].reshape(-1, 4), target.transpose(1, 2)[keep].reshape(-1, 4), 0.05
    )
    terms = DistillLoss()(spoiled, target, keep)
    assert float(terms.huber) == pytest.approx(expected, rel=1e-4)
    assert float(terms.mse) < 90.0, "the spoiled queries are 99 off"
    assert heldout_distance(spoiled, target, keep) == pytest.approx(
        heldout_distance(torch.where(keep[:, None, :, None], output, -7.0), target, keep)
    )
    assert heldout_distance(output, target, torch.ones_like(keep)) == pytest.approx(heldout_distance(output, target))
    assert float(DistillLoss()(output, target, torch.zeros_like(keep)).huber) == 0.0


def test_heldout_distance_is_cosine_and_relative_l2() -> None:
    output, target = pair()
    _, cosine = by_hand(output, target, 1.0)
    l2 = math.sqrt(float((output - target).square().sum() / target.square().sum()))
    assert heldout_distance(output, target) == pytest.approx((cosine, l2), rel=1e-4)
    assert heldout_distance(0.1 * target, target) == pytest.approx((0.0, 0.9), abs=1e-6)
