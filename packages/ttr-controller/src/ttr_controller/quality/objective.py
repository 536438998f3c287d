"""The number that a rollout is judged by: a weighted sum of distances to the teacher's result."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ttr_controller.quality.latent import cosine_error, relative_rmse
from ttr_controller.quality.perceptual import ssim


@dataclass(frozen=True)
class QualityWeights:
    """Weights of the built-in distances; a weight of 0 switches a distance off.

    Attributes:
        rmse_weight: Weight of the relative root mean square difference of the latents.
        cosine_weight: Weight of one minus the cosine between the latents.
        ssim_weight: Weight of one minus SSIM between the images.
    """

    rmse_weight: float = 1.0
    cosine_weight: float = 0.0
    ssim_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.rmse_weight, self.cosine_weight, self.ssim_weight)
        if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights):
            raise ValueError(f"quality weights must be finite and >= 0, got {self}")


@dataclass(frozen=True)
class QualityTerm:
    """A further distance, for example a learnt perceptual metric.

    Attributes:
        weight: Weight in the sum.
        distance: ``(student, teacher)`` images ``[B, 3, H, W]`` in [0, 1] to ``[B]``; 0 = equal.
    """

    weight: float
    distance: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QualityReport:
    """Distances of one rollout from the teacher.

    Attributes:
        error: ``[B]``, the weighted sum; lower is better.
        terms: Unweighted distances by name, each ``[B]``.
    """

    error: Tensor
    terms: dict[str, Tensor]


class QualityObjective:
    """Weighted sum of distances.

    Args:
        weights: Weights of the built-in distances.
        extra: Further distances by name.

    Raises:
        ValueError: Every weight is 0.
    """

    def __init__(
        self, weights: QualityWeights | None = None, *, extra: Mapping[str, QualityTerm] | None = None
    ) -> None:
        self.weights = weights or QualityWeights()
        self.extra = dict(extra or {})
        total = self.weights.rmse_weight + self.weights.cosine_weight + self.weights.ssim_weight
        if total + sum(term.weight for term in self.extra.values()) <= 0.0:
            raise ValueError("at least one quality weight must be positive; there is nothing to judge a rollout by")

    @torch.no_grad()
    def __call__(
        self, student_latent: Tensor, teacher_latent: Tensor, student_images: Tensor, teacher_images: Tensor
    ) -> QualityReport:
        """Compare a rollout with the teacher.

        Args:
            student_latent: ``[B, ...]``.
            teacher_latent: ``[B, ...]``.
            student_images: ``[B, 3, H, W]`` in [0, 1]; read only where a weight asks for images.
            teacher_images: ``[B, 3, H, W]`` in [0, 1].

        Raises:
            ValueError: Shapes differ.
        """
        terms = {"rmse": relative_rmse(student_latent, teacher_latent)}
        error = self.weights.rmse_weight * terms["rmse"]
        if self.weights.cosine_weight > 0.0:
            terms["cosine_distance"] = cosine_error(student_latent, teacher_latent)
            error = error + self.weights.cosine_weight * terms["cosine_distance"]
        if self.weights.ssim_weight > 0.0:
            terms["ssim_distance"] = 1.0 - ssim(student_images, teacher_images)
            error = error + self.weights.ssim_weight * terms["ssim_distance"].to(error.device)
        for name, term in self.extra.items():
            terms[name] = term.distance(student_images, teacher_images)
            error = error + term.weight * terms[name].to(error.device)
        return QualityReport(error, terms)
