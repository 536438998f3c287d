"""The objects that the phases of a run work with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from attn_dispatch import AttentionHandler, AttentionRouter, DispatchReport, Guard, Route
from ttr_distill.distributed import World
from ttr_distill.metrics import QueuedSink
from ttr_distill.student import ReadinessTracker, StudentBackend, StudentBank, StudentConfig, preset
from ttr_distill.tiny import TinyTeacher, heldout_prompts, load_teacher, training_prompts

from ttr_controller.pipeline.differentiable import DifferentiableTinySampler
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import Plan, RunError, make_plan

Tick = Callable[[float], None]
"""Called with the amount of work done, in images, for the progress bar."""

PROMPT_SEED = 1_000
HELDOUT_SEED = 2_000


@dataclass
class Workbench:
    """Teacher, sampler and students of one run.

    Attributes:
        run: The run's folder.
        teacher: The embedded teacher.
        sampler: Samples the teacher at the run's size, steps and guidance.
        config: The student's configuration.
        world: The processes that work on the run together.
        trackers: Get the metric rows of a training beside its file, and are closed when it ends.
    """

    run: RunDirectory
    teacher: TinyTeacher
    sampler: DifferentiableTinySampler
    config: StudentConfig
    world: World = field(default_factory=World)
    trackers: tuple[QueuedSink, ...] = ()

    @classmethod
    def open(cls, run: RunDirectory) -> Workbench:
        """Load the teacher and note its facts in the run."""
        settings = run.settings
        try:
            teacher = load_teacher(settings.device)
        except ImportError as error:
            raise RunError(str(error)) from error
        sampler = DifferentiableTinySampler(
            teacher, rows=settings.rows, columns=settings.columns, steps=settings.steps, guidance=settings.guidance
        )
        bench = cls(run, teacher, sampler, preset(settings.preset))
        if not run.has("teacher"):
            run.record("teacher", bench._teacher_facts())
        elif run.section("teacher").get("fingerprint") != teacher.fingerprint:
            raise RunError(f"{run.path} was made with another embedded teacher; start again in another folder")
        return bench

    def _teacher_facts(self) -> dict[str, object]:
        settings = self.run.settings
        return {
            "parameters": sum(parameter.numel() for parameter in self.teacher.transformer.parameters()),
            "layers": [str(layer) for layer in self.sampler.layers],
            "heads": self.sampler.heads,
            "width": self.sampler.width,
            "tokens": settings.rows * settings.columns,
            "text_tokens": self.sampler.text_tokens,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "fingerprint": self.teacher.fingerprint,
        }

    def plan(self) -> Plan:
        """The run's amounts of work and its number of threads; decided at the first call by timing the models here."""
        if self.run.plan is None:
            self.run.threads = spare_threads()
            torch.set_num_threads(self.run.threads)
            forward = self._seconds(None)
            student = self._seconds(self.route(self.new_bank(), ()))
            plan = make_plan(self.run.settings, len(self.sampler.layers), forward, student)
            self.run.record("plan", asdict(plan))
        plan_now = self.run.plan
        assert plan_now is not None
        torch.set_num_threads(self.run.threads)
        return plan_now

    def _seconds(self, handler: AttentionHandler | None) -> float:
        prompts, seeds = self.train_set(1)
        latent = self.sampler.noise(prompts, seeds)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            self.sampler.velocity(latent, 0, prompts, handler)
            best = min(best, time.perf_counter() - start)
        return best

    def new_bank(self, config: StudentConfig | None = None) -> StudentBank:
        """Untrained students for every layer; equal seeds give equal students."""
        bank = StudentBank.for_layers(
            config or self.config,
            self.sampler.layers,
            self.sampler.heads,
            self.sampler.width,
            seed=self.run.settings.seed,
        )
        return bank.to(self.run.settings.device)

    def route(
        self, bank: StudentBank, guards: tuple[Guard, ...], report: DispatchReport | None = None
    ) -> AttentionRouter:
        """Send every call that all guards allow to its layer's student, the rest to exact attention."""
        return AttentionRouter((Route(StudentBackend(bank), guards),), report)

    def train_set(self, count: int) -> tuple[list[str], list[int]]:
        """Training prompts and seeds; the prompts repeat with new noise when there are more images than prompts."""
        prompts = training_prompts()
        return [prompts[i % len(prompts)] for i in range(count)], [PROMPT_SEED + i for i in range(count)]

    def heldout_set(self, count: int) -> tuple[list[str], list[int]]:
        """Held-out prompts and seeds; neither is ever used to distil or to learn routing."""
        prompts = heldout_prompts()
        return [prompts[i % len(prompts)] for i in range(count)], [HELDOUT_SEED + i for i in range(count)]


def spare_threads() -> int:
    """Threads for tensor operations: half the cores, or what ``OMP_NUM_THREADS`` says.

    The operations are small and every one ends with all threads waiting for the last: a thread whose core is busy with
    something else costs far more than it brings (measured on two cores: five times the time of one thread).
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, (os.cpu_count() or 1) // 2)


@dataclass
class Students:
    """Trained students and whether each layer may be served.

    Attributes:
        bank: Student of each layer.
        readiness: Held-out errors and readiness of each layer.
    """

    bank: StudentBank
    readiness: ReadinessTracker
