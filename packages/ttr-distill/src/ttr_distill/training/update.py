"""One optimisation step of one student."""

import math
from dataclasses import dataclass

import torch
from attn_dispatch import AttentionCall
from torch import Tensor, nn

from ttr_distill.student.attention import StudentAttention
from ttr_distill.training.loss import DistillLoss, heldout_distance
from ttr_distill.training.replay import Queries, ReplaySample


@dataclass(frozen=True)
class UpdateConfig:
    """How students are optimised.

    Attributes:
        learning_rate: AdamW step of the feature networks.
        alpha_rate_factor: The blend's step is so many times larger.
        conditioner_rate_factor: The conditioner's step is so many times larger. At 1 it turns off the kernel branch,
            which is of no use at first, before that branch has learned anything.
        weight_decay: AdamW weight decay of matrices; vectors and scalars have none.
        huber_beta: Where the smooth L1 distance turns linear, in units of the values.
        clip_norm: Largest gradient norm of a layer; 0 = no limit.
    """

    learning_rate: float = 1e-3
    alpha_rate_factor: float = 5.0
    conditioner_rate_factor: float = 0.05
    weight_decay: float = 0.01
    huber_beta: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0.0 < self.huber_beta < math.inf:
            raise ValueError(f"huber_beta must be positive, got {self.huber_beta}")
        for name in ("alpha_rate_factor", "conditioner_rate_factor", "weight_decay", "clip_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class UpdateResult:
    """What one step did.

    Attributes:
        loss: What was minimised, before the step.
        huber: Mean smooth L1 distance on the training queries.
        cosine: Mean cosine distance on the training queries.
        gradient_norm: Before clipping.
        skipped: A number was not finite, and nothing was changed.
    """

    loss: float
    huber: float
    cosine: float
    gradient_norm: float
    skipped: bool


def make_optimizer(student: StudentAttention, loss: DistillLoss, config: UpdateConfig) -> torch.optim.AdamW:
    """Make the optimiser of a layer: matrices with weight decay; vectors, scalars and log-variances without."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    alpha: list[nn.Parameter] = []
    conditioner: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if name == "alpha":
            alpha.append(parameter)
        elif name.startswith("conditioner."):
            conditioner.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    rate = config.learning_rate
    groups: list[dict[str, list[nn.Parameter] | float]] = [
        {"params": matrices, "lr": rate, "weight_decay": config.weight_decay},
        {"params": [*vectors, *loss.parameters()], "lr": rate, "weight_decay": 0.0},
        {"params": alpha, "lr": rate * config.alpha_rate_factor, "weight_decay": 0.0},
        {"params": conditioner, "lr": rate * config.conditioner_rate_factor, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def update_student(
    student: StudentAttention,
    loss: DistillLoss,
    optimizer: torch.optim.Optimizer,
    sample: ReplaySample,
    config: UpdateConfig,
) -> UpdateResult:
    """Take one step on a sample's training queries; call it inside ``training_mode``.

    The step is skipped, leaving weights and optimiser as they were, if the loss or the gradient is not finite.

    Args:
        student: On the sample's device.
        loss: The layer's loss.
        optimizer: From ``make_optimizer``.
        sample: In float32; see ``ReplaySample.moved``.
        config: How to step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    student.train()
    try:
        output = student(sample.call(sample.train), query_positions=sample.train.positions, selection=sample.selection)
        terms = loss(output, sample.train.target, kept_queries(sample, sample.train))
        terms.total.backward()
        limit = config.clip_norm if config.clip_norm > 0.0 else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        total, huber, cosine, size = torch.stack([*(term.detach() for term in terms), norm.detach()]).tolist()
        skipped = not (math.isfinite(total) and math.isfinite(size))
        if not skipped:
            optimizer.step()
            loss.clamp()
    finally:
        optimizer.zero_grad(set_to_none=True)
        student.eval()
    return UpdateResult(total, huber, cosine, size, skipped)


def measure_heldout(student: StudentAttention, sample: ReplaySample) -> tuple[float, float]:
    """Measure a student on the queries of a sample that are never trained on.

    Args:
        student: On the sample's device.
        sample: In float32; see ``ReplaySample.moved``.

    Returns:
        Mean cosine distance and relative L2 distance to the teacher.
    """
    queries = sample.heldout
    call: AttentionCall = sample.call(queries)
    with torch.no_grad():
        output = student(call, query_positions=queries.positions, selection=sample.selection)
        return heldout_distance(output, queries.target, kept_queries(sample, queries))


def kept_queries(sample: ReplaySample, queries: Queries) -> Tensor | None:
    """Return which queries ``[B, Nq]`` are unmasked tokens; ``None`` without a mask."""
    return None if sample.key_mask is None else sample.key_mask[:, queries.positions]
