"""The number that a rollout is judged by: a weighted sum of distances to the teacher's result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ttr_controller.quality.embedded import RetrievalScorer
from ttr_controller.quality.iqa import IqaModels, iqa_penalties
from ttr_controller.quality.latent import cosine_error, relative_rmse
from ttr_controller.quality.learned import DreamSimDistance, DreamSimType, LpipsDistance, LpipsNet
from ttr_controller.quality.models import Penalty, release
from ttr_controller.quality.perceptual import image_error, ssim
from ttr_controller.quality.preference import HpsScorer, third_party_scorer


@dataclass(frozen=True)
class QualityWeights:
    """Weights of the distances and penalties; what has weight 0 is neither loaded nor measured.

    Attributes:
        rmse_weight: Weight of the relative root mean square difference of the latents.
        cosine_weight: Weight of one minus the cosine between the latents.
        ssim_weight: Weight of one minus SSIM between the images.
        psnr_weight: Weight of the root mean square difference between the images, ``10 ** (-PSNR / 20)``.
        retrieval_weight: Weight of pictures that no longer show what their prompt names (embedded teacher only).
        lpips_weight: Weight of LPIPS.
        dreamsim_weight: Weight of DreamSim.
        hps_weight: Weight of the loss in human preference score.
        biqa_quality_weight: Weight of the loss in image quality.
        biqa_aesthetic_weight: Weight of the loss in aesthetics.
    """

    rmse_weight: float = 1.0
    cosine_weight: float = 0.0
    ssim_weight: float = 0.0
    psnr_weight: float = 0.0
    retrieval_weight: float = 0.0
    lpips_weight: float = 0.0
    dreamsim_weight: float = 0.0
    hps_weight: float = 0.0
    biqa_quality_weight: float = 0.0
    biqa_aesthetic_weight: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) and weight >= 0.0 for weight in self.all()):
            raise ValueError(f"quality weights must be finite and >= 0, got {self}")

    def all(self) -> tuple[float, ...]:
        """Return every weight."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class QualityModels:
    """Which networks judge, and where their weights are.

    Attributes:
        lpips_net: See ``LpipsDistance``.
        dreamsim: See ``DreamSimDistance``.
        dreamsim_folder: Likewise.
        iqa: See ``iqa_scorer``.
        hps_checkpoint: See ``HpsScorer``.
        device: Where they run; ``None`` follows the images.
        offload: Move them to the CPU after every use.
    """

    lpips_net: LpipsNet = "alex"
    dreamsim: DreamSimType = "open_clip_vitb32"
    dreamsim_folder: Path | None = None
    iqa: IqaModels = "liqe_mix+nima"
    hps_checkpoint: Path | None = None
    device: str | None = None
    offload: bool = False


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
        terms: Unweighted distances and scores by name, each ``[B]``.
    """

    error: Tensor
    terms: dict[str, Tensor]


class QualityObjective:
    """Weighted sum of distances, and of penalties where the student scores lower than the teacher.

    Args:
        weights: Weights of the built-in distances and penalties.
        extra: Further distances by name.
        models: Which networks judge; loaded at the first call.
        scorers: Weights of scorers of other packages, by the name of their entry point.

    Raises:
        ValueError: Every weight is 0.
        QualityError: A weight is positive whose package is missing.
    """

    def __init__(
        self,
        weights: QualityWeights | None = None,
        *,
        extra: Mapping[str, QualityTerm] | None = None,
        models: QualityModels | None = None,
        scorers: Mapping[str, float] | None = None,
    ) -> None:
        self.weights = weights or QualityWeights()
        self.models = models or QualityModels()
        self.extra = dict(extra or {})
        named = dict(scorers or {})
        if not all(math.isfinite(weight) and weight >= 0.0 for weight in named.values()):
            raise ValueError(f"weights of scorers must be finite and >= 0, got {named}")
        if sum(self.weights.all()) + sum(term.weight for term in self.extra.values()) + sum(named.values()) <= 0.0:
            raise ValueError("at least one quality weight must be positive; there is nothing to judge a rollout by")
        self._distances = {**self._built_in_distances(), **self.extra}
        self._penalties = self._built_in_penalties()
        self._penalties |= {
            name: (weight, Penalty(third_party_scorer(name))) for name, weight in named.items() if weight > 0.0
        }

    @property
    def needs_prompts(self) -> bool:
        """Whether images are judged by their prompts."""
        return any(penalty.scorer.needs_prompts for _, penalty in self._penalties.values())

    @torch.no_grad()
    def __call__(
        self,
        student_latent: Tensor,
        teacher_latent: Tensor,
        student_images: Tensor,
        teacher_images: Tensor,
        prompts: Sequence[str] | None = None,
    ) -> QualityReport:
        """Compare a rollout with the teacher.

        Args:
            student_latent: ``[B, ...]``.
            teacher_latent: ``[B, ...]``.
            student_images: ``[B, 3, H, W]`` in [0, 1]; read only where a weight asks for images.
            teacher_images: ``[B, 3, H, W]`` in [0, 1].
            prompts: B prompts; read only where a weight asks for them.

        Raises:
            ValueError: Shapes differ, or prompts are missing.
            QualityError: A network cannot be loaded.
        """
        terms = {"rmse": relative_rmse(student_latent, teacher_latent)}
        error = self.weights.rmse_weight * terms["rmse"]
        if self.weights.cosine_weight > 0.0:
            terms["cosine_distance"] = cosine_error(student_latent, teacher_latent)
            error = error + self.weights.cosine_weight * terms["cosine_distance"]
        if self.models.device is not None and (self._distances or self._penalties):
            student_images = student_images.to(self.models.device)
            teacher_images = teacher_images.to(self.models.device)
        for name, term in self._distances.items():
            terms[name] = term.distance(student_images, teacher_images).to(error.device)
            error = error + term.weight * terms[name]
        if prompts is None and self.needs_prompts:
            raise ValueError("images are judged by their prompts; give the objective the prompts")
        for name, (weight, penalty) in self._penalties.items():
            scored = penalty(student_images, teacher_images, prompts or ())
            names = (f"{name}_penalty", f"{name}_student", f"{name}_teacher")
            terms |= {key: value.to(error.device) for key, value in zip(names, scored, strict=True)}
            error = error + weight * terms[f"{name}_penalty"]
        if self.models.offload:
            self.release()
        return QualityReport(error, terms)

    def release(self) -> None:
        """Move all networks to the CPU; the next call brings them back."""
        release(*(term.distance for term in self._distances.values()))
        release(*(penalty.scorer for _, penalty in self._penalties.values()))

    def _built_in_distances(self) -> dict[str, QualityTerm]:
        weights, models = self.weights, self.models
        found: dict[str, QualityTerm] = {}
        if weights.ssim_weight > 0.0:
            found["ssim_distance"] = QualityTerm(weights.ssim_weight, lambda a, b: 1.0 - ssim(a, b))
        if weights.psnr_weight > 0.0:
            found["image_rmse"] = QualityTerm(weights.psnr_weight, image_error)
        if weights.lpips_weight > 0.0:
            found["lpips"] = QualityTerm(weights.lpips_weight, LpipsDistance(models.lpips_net))
        if weights.dreamsim_weight > 0.0:
            distance = DreamSimDistance(models.dreamsim, models.dreamsim_folder)
            found["dreamsim"] = QualityTerm(weights.dreamsim_weight, distance)
        return found

    def _built_in_penalties(self) -> dict[str, tuple[float, Penalty]]:
        weights, models = self.weights, self.models
        found: dict[str, tuple[float, Penalty]] = {}
        if weights.retrieval_weight > 0.0:
            found["retrieval"] = weights.retrieval_weight, Penalty(RetrievalScorer())
        if weights.hps_weight > 0.0:
            found["hps"] = weights.hps_weight, Penalty(HpsScorer(models.hps_checkpoint))
        named = iqa_penalties(weights.biqa_quality_weight, weights.biqa_aesthetic_weight, models.iqa)
        return found | {name: (getattr(weights, f"{name}_weight"), penalty) for name, penalty in named.items()}
