"""How far a student's answer is from the teacher's, and what training minimises."""

from typing import NamedTuple

import torch
from attn_kernels import cosine_distance, relative_l2
from torch import Tensor, nn
from torch.nn import functional

LOG_VAR_RANGE = (-6.0, 3.0)
"""Bounds of the learned log-variances: without them a weight grows or vanishes without limit."""


class LossTerms(NamedTuple):
    """Loss of one update, each 0-d.

    Attributes:
        total: What is minimised.
        huber: Mean smooth L1 distance.
        cosine: Mean cosine distance per token and head.
        mse: Mean squared distance, without gradient; not part of the total.
    """

    total: Tensor
    huber: Tensor
    cosine: Tensor
    mse: Tensor


class DistillLoss(nn.Module):
    """Smooth L1 and cosine distance, weighted by learned log-variances.

    ``huber / (2 exp(s)) + s / 2`` and likewise for the cosine distance, after Kendall et al. 2018 ("Multi-task
    learning using uncertainty to weigh losses", eq. 7). Every layer has its own pair.

    Args:
        beta: Where smooth L1 turns from quadratic to linear, in units of the values.
    """

    def __init__(self, beta: float = 0.05) -> None:
        super().__init__()
        self.beta = beta
        self.log_var_huber = nn.Parameter(torch.tensor(0.0))
        self.log_var_cosine = nn.Parameter(torch.tensor(-1.0))

    def forward(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> LossTerms:
        """Compare.

        Args:
            output: ``[B, H, Nq, Dv]``, the student's answer, float32.
            target: ``[B, H, Nq, Dv]``, the teacher's.
            weight: ``[B, Nq]`` bool, which queries count; ``None`` means all.
        """
        huber = functional.smooth_l1_loss(output, target, beta=self.beta, reduction="none").mean(dim=-1)
        huber = weighted_mean(huber, weight)
        cosine = weighted_mean(1.0 - functional.cosine_similarity(output, target, dim=-1), weight)
        total = torch.zeros_like(huber)
        for term, log_var in ((huber, self.log_var_huber), (cosine, self.log_var_cosine)):
            total = total + 0.5 * (term * torch.exp(-log_var) + log_var)
        with torch.no_grad():
            mse = weighted_mean((output - target).square().mean(dim=-1), weight)
        return LossTerms(total, huber, cosine, mse)

    def clamp(self) -> None:
        """Bring the log-variances back into ``LOG_VAR_RANGE``; call it after every step."""
        with torch.no_grad():
            for log_var in self.parameters():
                log_var.clamp_(*LOG_VAR_RANGE)


def heldout_distance(output: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[float, float]:
    """Measure an answer ``[B, H, Nq, Dv]`` against the teacher's.

    Returns:
        Mean cosine distance per token and head, and relative L2 distance; only of queries with ``weight``
        ``[B, Nq]``, if given.
    """
    output, target = output.float(), target.float()
    cosine = weighted_mean(cosine_distance(output, target), weight)
    if weight is not None:
        keep = weight[:, None, :, None]
        output, target = output * keep, target * keep
    return float(cosine), float(relative_l2(output, target))


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of ``[B, H, Nq]`` values over queries with ``weight`` ``[B, Nq]``; zero if there is none."""
    if weight is None:
        return values.mean()
    share = weight[:, None, :].to(values.dtype).expand_as(values)
    return (values * share).sum() / share.sum().clamp_min(1.0)
