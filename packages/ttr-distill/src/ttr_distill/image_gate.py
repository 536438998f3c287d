"""Judging students by images: how far what is drawn with them lies from what exact attention draws.

A held-out distance says how well one layer answers. Errors of many layers and steps add up in the image, by how much
depends on the model: a gate measures that instead of assuming it.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from attn_dispatch import AttentionCall, AttentionHandler, AttentionRouter, LayerKey, Route
from torch import Tensor

from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessTracker

Draw = Callable[[AttentionHandler | None], Tensor]
"""Draws the same images every time, with exact attention or through a handler: latents ``[B, ...]``."""


@dataclass(frozen=True)
class ImageGate:
    """What is asked of images before students serve.

    Attributes:
        limit: Largest relative L2 distance of a latent drawn with students from the exact one.
        images: Images to measure; the farthest counts.
        prompts: What they show; the prompts learned from if empty.
    """

    limit: float
    images: int = 2
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.limit < math.inf:
            raise ValueError(f"the limit of an image gate must be positive and finite, got {self.limit}")
        if self.images < 1:
            raise ValueError(f"an image gate needs at least one image, got {self.images}")


def gate_on_images(bank: StudentBank, readiness: ReadinessTracker, draw: Draw) -> dict[LayerKey, float]:
    """Measure images drawn with the students that are ready by their held-out distances, and keep back the others.

    If the images drawn with all of them are too far from the exact ones, the largest group of the closest students is
    sought whose images are not: by bisection, so that a model of 64 layers is drawn with at most eight times. A student
    that is ready for part of the calls is measured serving all of them.

    Args:
        bank: The students.
        readiness: Whose students are ready; its ``image_limit`` says how far images may be. Gets the errors.
        draw: Draws the images.

    Returns:
        By layer the error with which it was let through or kept back; layers that are not ready are left out.

    Raises:
        ValueError: The readiness has no limit.
    """
    limit = readiness.config.image_limit
    if limit is None:
        raise ValueError("the readiness asks for no images; give it a ReadinessConfig with an image_limit")
    ready = [layer for layer in bank.layers if readiness.distance_level(layer) != "unready"]
    ready.sort(key=lambda layer: readiness[layer].ema_cosine or 0.0)
    if not ready:
        return {}
    exact = draw(None)

    @cache
    def error(count: int) -> float:
        return image_error(draw(students_of(bank, ready[:count])), exact)

    enough, tested = 0, [len(ready)]
    if error(len(ready)) <= limit:
        enough = len(ready)
    too_many = len(ready)
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        tested.append(middle)
        if error(middle) <= limit:
            enough = middle
        else:
            too_many = middle
    found = {}
    for place, layer in enumerate(ready):
        # The smallest group measured that the layer was a member of, among those let through or those kept back.
        group = enough if place < enough else min(count for count in tested if count > max(place, enough))
        found[layer] = error(group)
        readiness.observe_image(layer, found[layer])
    return found


def students_of(bank: StudentBank, layers: Collection[LayerKey]) -> AttentionRouter:
    """Return a handler in which the students of some layers answer every call, and exact attention all others."""

    def only(call: AttentionCall) -> str | None:
        return None if call.layer in layers else "exact attention answers in this layer"

    return AttentionRouter([Route(StudentBackend(bank), (only,))])


def image_error(latent: Tensor, exact: Tensor) -> float:
    """Return the largest relative L2 distance ``|latent - exact| / |exact|`` of the images of a batch.

    Args:
        latent: ``[B, ...]``.
        exact: ``[B, ...]``, the same shape.

    Returns:
        Infinite where a number is not finite.

    Raises:
        ValueError: The shapes differ.
    """
    if latent.shape != exact.shape or latent.ndim < 2:
        raise ValueError(f"latents must be [B, ...] of one shape, got {tuple(latent.shape)} and {tuple(exact.shape)}")
    left, right = latent.flatten(1).double(), exact.flatten(1).double()
    sizes = torch.linalg.vector_norm(right, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    worst = float((torch.linalg.vector_norm(left - right, dim=1) / sizes).max())
    return worst if math.isfinite(worst) else math.inf
