"""One optimisation step of one student."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from attn_dispatch import AttentionCall
from torch import Tensor, nn

from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.feature_map import drawing_keys
from ttr_distill.student.key_draw import KeyDraw
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
        key_count: Token positions whose keys teach the feature networks in an update, drawn anew for each; see
            ``KeyDraw``. 0 = all of a call.
        schedule: ``"constant"``, or ``"cosine"``: the steps of a layer shrink along half a cosine.
        schedule_updates: Updates of a layer until a cosine schedule has reached its end.
        final_rate: Share of the step that is left there.
        average_decay: Serve, measure and save a moving average of the weights with this decay; 0 = the weights.
    """

    learning_rate: float = 1e-3
    alpha_rate_factor: float = 5.0
    conditioner_rate_factor: float = 0.05
    weight_decay: float = 0.01
    huber_beta: float = 0.05
    clip_norm: float = 1.0
    key_count: int = 256
    schedule: Literal["constant", "cosine"] = "constant"
    schedule_updates: int = 1000
    final_rate: float = 0.1
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0.0 < self.huber_beta < math.inf:
            raise ValueError(f"huber_beta must be positive, got {self.huber_beta}")
        for name in ("alpha_rate_factor", "conditioner_rate_factor", "weight_decay", "clip_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.key_count < 0:
            raise ValueError(f"key_count must not be negative, got {self.key_count}; 0 = all keys")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be constant or cosine, got {self.schedule!r}")
        if self.schedule_updates < 1 or not 0.0 <= self.final_rate <= 1.0 or not 0.0 <= self.average_decay < 1.0:
            raise ValueError(
                "need schedule_updates >= 1, final_rate in [0, 1] and average_decay in [0, 1), got "
                f"{self.schedule_updates}, {self.final_rate} and {self.average_decay}"
            )

    def rate(self, updates: int) -> float:
        """Return by what the steps of a layer are multiplied after so many updates of it."""
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, updates / self.schedule_updates)
        return self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class UpdateResult:
    """What one step did.

    Attributes:
        loss: What was minimised, before the step.
        huber: Mean smooth L1 distance on the training queries.
        cosine: Mean cosine distance on the training queries.
        mse: Mean squared distance on the training queries.
        gradient_norm: Before clipping.
        skipped: A number was not finite, and nothing was changed.
    """

    loss: float
    huber: float
    cosine: float
    mse: float
    gradient_norm: float
    skipped: bool


def make_optimizer(student: StudentAttention, loss: DistillLoss, config: UpdateConfig) -> torch.optim.AdamW:
    """Make the optimiser of a layer: matrices with weight decay; vectors, scalars and log-variances without.

    One fused kernel updates all tensors of a group where the device has it.
    """
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
    used = [group | {"base_lr": group["lr"]} for group in groups if group["params"]]
    devices = {parameter.device.type for parameter in (*student.parameters(), *loss.parameters())}
    return torch.optim.AdamW(used, fused=True if devices <= {"cpu", "cuda"} else None)


def update_student(
    student: StudentAttention,
    loss: DistillLoss,
    optimizer: torch.optim.Optimizer,
    sample: ReplaySample,
    config: UpdateConfig,
    *,
    rate: float = 1.0,
    query_chunk: int | None = None,
    key_draw: KeyDraw | None = None,
) -> UpdateResult:
    """Take one step on a sample's training queries; call it inside ``training_mode``.

    The step is skipped, leaving weights and optimiser as they were, if the loss or the gradient is not finite.

    Args:
        student: On the sample's device.
        loss: The layer's loss.
        optimizer: From ``make_optimizer``.
        sample: In float32; see ``ReplaySample.moved``.
        config: How to step.
        rate: Multiplies the learning rates; see ``UpdateConfig.rate``.
        query_chunk: Add up the gradient over so many queries at a time, to save memory; ``None`` = all at once.
        key_draw: Which keys teach the feature networks; ``None`` = all.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    optimizer.zero_grad(set_to_none=True)
    student.train()
    try:
        sums = torch.zeros(4, device=sample.k.device)
        for share, queries in _chunks(sample, query_chunk):
            with drawing_keys(student, key_draw):
                output = student(sample.call(queries), query_positions=queries.positions, selection=sample.selection)
            terms = loss(output, queries.target, kept_queries(sample, queries))
            (terms.total * share).backward()
            sums += torch.stack([term.detach() * share for term in terms])
        limit = config.clip_norm if config.clip_norm > 0.0 else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        total, huber, cosine, mse, size = torch.cat([sums, norm.detach()[None]]).tolist()
        skipped = not (math.isfinite(total) and math.isfinite(size))
        if not skipped:
            optimizer.step()
            loss.clamp()
    finally:
        optimizer.zero_grad(set_to_none=True)
        student.eval()
    return UpdateResult(total, huber, cosine, mse, size, skipped)


def _chunks(sample: ReplaySample, size: int | None) -> Iterator[tuple[Tensor | float, Queries]]:
    """Yield the training queries in parts, each with its share of the queries that count."""
    whole = sample.train
    count = whole.positions.numel()
    if size is None or size >= count:
        yield 1.0, whole
        return
    keep = kept_queries(sample, whole)
    for start in range(0, count, size):
        part = slice(start, start + size)
        queries = Queries(whole.q[:, :, part], whole.target[:, :, part], whole.positions[part])
        if keep is None:
            yield queries.positions.numel() / count, queries
        else:
            yield keep[:, part].sum() / keep.sum().clamp_min(1), queries


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
