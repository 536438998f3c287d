"""Distances between latents."""

import torch
from torch import Tensor


def relative_rmse(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean square difference relative to the root mean square of the teacher, per batch item.

    Args:
        student: ``[B, ...]``.
        teacher: ``[B, ...]``, the same shape.

    Returns:
        ``[B]`` float32: 0 = equal, 1 = as far away as zero is.

    Raises:
        ValueError: Shapes differ.
    """
    left, right = _flatten_pair(student, teacher)
    scale = torch.linalg.vector_norm(right, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.div(torch.linalg.vector_norm(left - right, dim=1), scale)


def cosine_error(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between the flattened latents, ``[B]`` float32.

    Args:
        student: ``[B, ...]``.
        teacher: ``[B, ...]``, the same shape.

    Raises:
        ValueError: Shapes differ.
    """
    left, right = _flatten_pair(student, teacher)
    return 1.0 - torch.nn.functional.cosine_similarity(left, right, dim=1)


def _flatten_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            f"student and teacher must be [B, ...] of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return student.float().flatten(1), teacher.float().flatten(1)
