"""Samples with students where a guard allows them, and compares the result with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from attn_dispatch.router import AttentionRouter, Backend, Guard, Route
from torch import Tensor

from ttr_controller.guard import ChoiceGuard, ScheduleGuard, routes
from ttr_controller.quality.objective import QualityObjective, QualityReport
from ttr_controller.rollout import Sampler
from ttr_controller.teacher import TeacherCache


class Judge:
    """Errors of rollouts against cached exact results.

    Args:
        sampler: Makes images.
        backends: What may stand in for full attention: the students, or several alternatives in the order of their
            numbers.
        objective: What an image's error is; ``None``: relative RMSE of the latent.
    """

    def __init__(
        self, sampler: Sampler, backends: Backend | Sequence[Backend], objective: QualityObjective | None = None
    ) -> None:
        self.sampler = sampler
        self.backends = tuple(backends) if isinstance(backends, Sequence) else (backends,)
        self.objective = objective or QualityObjective()
        self.teacher = TeacherCache(sampler)

    @property
    def backend(self) -> Backend:
        """The first alternative to full attention."""
        return self.backends[0]

    def router(self, guard: Guard) -> AttentionRouter:
        """A router in which a guard decides."""
        if isinstance(guard, ChoiceGuard):
            return AttentionRouter(routes(guard, self.backends))
        return AttentionRouter((Route(self.backend, (guard,)),))

    def rollout(self, guard: Guard, prompts: Sequence[str], seeds: Sequence[int]) -> QualityReport:
        """Sample with the students behind a guard and compare."""
        teacher = self.teacher.get(prompts, seeds)
        made = self.sampler.sample(prompts, seeds, self.router(guard))
        return self.objective(made.latent, teacher.latent, made.images, teacher.images, prompts=prompts)

    def mask_errors(self, mask: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Errors ``[B]`` of a fixed plan ``[steps, L]``: bool with True = full, or int64 number of the attention."""
        return self.rollout(ScheduleGuard(mask, self.sampler.layers), prompts, seeds).error
