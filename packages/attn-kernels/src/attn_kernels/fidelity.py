"""How far an attention output is from exact attention."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fidelity(NamedTuple):
    """Distances of an output from its target; 0 = equal.

    Attributes:
        relative_l2: Norm of the difference over the norm of the target, over the whole tensor.
        cosine_distance: Mean over tokens and heads of one minus the cosine of the two vectors.
        nmse: Square of ``relative_l2``: mean squared error over the target's mean square.
    """

    relative_l2: float
    cosine_distance: float
    nmse: float


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between the vectors of each token and head.

    A vector of zeros has distance 1 to any other and 0 to another of zeros.

    Args:
        output: ``[B, H, N, Dv]``.
        target: ``[B, H, N, Dv]``.

    Returns:
        ``[B, H, N]`` in float32 (float64 for float64 input), from 0 to 2.

    Raises:
        ValueError: Shapes differ.
    """
    a, b = _wide(output, target)
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = (a * b).sum(dim=-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    both_zero = (a.abs().amax(dim=-1) == 0) & (b.abs().amax(dim=-1) == 0)
    return torch.where(both_zero, 0.0, 1.0 - cosine)


def relative_l2(output: Tensor, target: Tensor) -> Tensor:
    """Norm of the difference over the norm of the target, ``[]``.

    Args:
        output: Any shape.
        target: The same shape.

    Raises:
        ValueError: Shapes differ.
    """
    a, b = _wide(output, target)
    error: Tensor = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
    return error


def fidelity(output: Tensor, target: Tensor) -> Fidelity:
    """Measure an output against its target; waits for the device, so keep it off the attention path.

    Args:
        output: ``[B, H, N, Dv]``.
        target: ``[B, H, N, Dv]``.

    Raises:
        ValueError: Shapes differ.
    """
    error = relative_l2(output, target).item()
    return Fidelity(error, cosine_distance(output, target).mean().item(), error**2)


def _wide(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes agree and cast both to at least float32."""
    if output.shape != target.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} differ in shape")
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return output.to(wide), target.to(wide)
