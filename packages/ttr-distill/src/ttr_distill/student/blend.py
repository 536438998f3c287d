"""How the ``hkr`` student joins its two branches, written for gradients and for speed."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024
"""Tokens of one head handled at a time on a CPU: both branches of them fit the second-level cache."""


class ConvexBlend(NamedTuple):
    """How much of the landmark branch a token gets, at most ``most``.

    Attributes:
        alpha: 0-d, in logit space.
        most: Largest share.
        gamma: How much the share of a token rises with the disagreement of its branches; ``None`` = not at all.
    """

    alpha: Tensor
    most: float
    gamma: float | None

    def weight(self, distance: Tensor | None) -> Tensor:
        """Return the share of the landmark branch.

        Args:
            distance: ``[B, H, Nq]``, cosine distance between the branches, without history; needed with ``gamma``.

        Returns:
            ``[B, H, Nq, 1]``, or 0-d without ``gamma``.
        """
        if self.gamma is None or distance is None:
            return self.most * torch.sigmoid(self.alpha)
        mean = distance.mean().clamp_min(1e-6)
        disagreement = (distance / mean).clamp_max(3.0) / 3.0
        return self.most * torch.sigmoid(self.alpha + self.gamma * (disagreement - 0.5)).unsqueeze(-1)


def convex(
    kernel: Tensor, landmark: Tensor, modulation: Tensor | None, served: Tensor | None, blend: ConvexBlend
) -> Tensor:
    """Return ``kernel + share * (landmark - kernel)`` of the modulated branches.

    Without a gradient, on a CPU, the inputs are overwritten.

    Args:
        kernel: ``[B, H, Nq, Dv]``.
        landmark: ``[B, H, Nq, Dv]``.
        modulation: ``[4]``: scale and bias of the kernel branch, then of the landmark branch; ``None`` = none.
        served: ``[B, H, Nq, 1]`` bool, which queries have a landmark; the others keep the kernel. ``None`` = all.
        blend: The share.

    Returns:
        ``[B, H, Nq, Dv]`` in the dtype of ``kernel``.
    """
    gradient = torch.is_grad_enabled() and (kernel.requires_grad or landmark.requires_grad)
    if not gradient and kernel.device.type == "cpu" and kernel.dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            return _overwrite(kernel, landmark, modulation, served, blend)
    if modulation is not None:
        kernel, landmark = modulated(kernel, landmark, modulation)
    distance = None
    if blend.gamma is not None:
        with torch.no_grad():
            wide = torch.promote_types(kernel.dtype, torch.float32)
            distance = cosine_distance(kernel.to(wide), landmark.to(wide))
    weight = blend.weight(distance).to(kernel.dtype)
    return torch.lerp(kernel, landmark, weight if served is None else weight * served)


def modulated(kernel: Tensor, landmark: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift both branches by ``[4]`` scalars: ``branch * (1 + scale) + bias``."""
    scale_kernel, bias_kernel, scale_landmark, bias_landmark = modulation.to(kernel.dtype).unbind()
    return (
        torch.addcmul(bias_kernel, kernel, 1.0 + scale_kernel),
        torch.addcmul(bias_landmark, landmark, 1.0 + scale_landmark),
    )


def cosine_distance(left: Tensor, right: Tensor) -> Tensor:
    """Return one minus the cosine similarity of left and right, both ``[..., Dv]``, as ``[...]``."""
    sizes = torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
    distance: Tensor = 1.0 - torch.linalg.vecdot(left, right) / sizes.clamp_min(1e-8)
    return distance


def _overwrite(
    kernel: Tensor, landmark: Tensor, modulation: Tensor | None, served: Tensor | None, blend: ConvexBlend
) -> Tensor:
    """Blend into ``kernel``, some rows at a time: passes over whole branches cost more than their arithmetic."""
    batch, heads, queries = kernel.shape[:3]
    rows = [slice(start, start + _ROWS) for start in range(0, queries, _ROWS)]
    places = list(product(range(batch), range(heads), rows))
    distance = kernel.new_empty(batch, heads, queries) if blend.gamma is not None else None
    scalars = None if modulation is None else modulation.to(kernel.dtype).unbind()
    for place in places:
        left, right = kernel[place], landmark[place]
        if scalars is not None:
            left.mul_(1.0 + scalars[0]).add_(scalars[1])
            right.mul_(1.0 + scalars[2]).add_(scalars[3])
        if distance is not None:
            distance[place] = cosine_distance(left, right)
    weight = blend.weight(distance).to(kernel.dtype)
    weight = (weight if served is None else weight * served).expand(batch, heads, queries, 1)
    for place in places:
        kernel[place].lerp_(landmark[place], weight[place])
    return kernel
