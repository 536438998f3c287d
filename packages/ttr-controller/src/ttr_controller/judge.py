"""Samples with students where a guard allows them, and compares the result with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from attn_dispatch.router import AttentionRouter, Backend, Guard, Route
from torch import Tensor

from ttr_controller.guard import ScheduleGuard
from ttr_controller.quality.objective import QualityObjective, QualityReport
from ttr_controller.rollout import Sampler
from ttr_controller.teacher import TeacherCache


class Judge:
    """Errors of rollouts against cached exact results.

    Args:
        sampler: Makes images.
        backend: The students.
        objective: What an image's error is; ``None``: relative RMSE of the latent.
    """

    def __init__(self, sampler: Sampler, backend: Backend, objective: QualityObjective | None = None) -> None:
        self.sampler = sampler
        self.backend = backend
        self.objective = objective or QualityObjective()
        self.teacher = TeacherCache(sampler)

    def rollout(self, guard: Guard, prompts: Sequence[str], seeds: Sequence[int]) -> QualityReport:
        """Sample with the students behind a guard and compare."""
        teacher = self.teacher.get(prompts, seeds)
        made = self.sampler.sample(prompts, seeds, AttentionRouter((Route(self.backend, (guard,)),)))
        return self.objective(made.latent, teacher.latent, made.images, teacher.images)

    def mask_errors(self, mask: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Errors ``[B]`` of a fixed mask ``[steps, L]``, True = full attention."""
        return self.rollout(ScheduleGuard(mask, self.sampler.layers), prompts, seeds).error
