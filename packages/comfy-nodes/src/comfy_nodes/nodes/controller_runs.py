"""What the controller trainer does: sample with and without students, learn, show, save."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from attn_dispatch import AttentionRouter, FiniteBackend, Route
from attn_dispatch.adapters.comfyui import installed
from torch import Tensor
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.reward import RewardConfig
from ttr_controller.trainer import ControllerConfig, ControllerTrainer
from ttr_distill import JsonlSink, StudentBackend
from ttr_distill.adapters.comfyui import DistillHandler, check_writable
from ttr_distill.adapters.comfyui_session import METRICS, place
from ttr_distill.grad import training_mode

from ..sampling import ComfySampler, SamplerSettings
from .controller_files import TrainedController, load_training, routing_guard, save_training
from .controller_quality import needs_images, quality_objective
from .distill_checkpoint import TTR, CheckpointPlace, ServingHandler, Students
from .distill_sinks import sink_maker
from .training_config import TrainingParameters

if TYPE_CHECKING:
    from .controller_training import ControllerTrainingSettings

logger = logging.getLogger(__name__)

SAVE_EVERY = 10
"""Updates between two saves; the training is saved at its end too, also when it is stopped."""

_COMPARED = 2
"""Entries of the latent batch on which candidates are compared."""


@dataclass(frozen=True)
class TrainedResult:
    """What a training gives back.

    Attributes:
        original: Images ``[B, H, W, 3]`` with exact attention.
        patched: The same as the controller makes them.
        controller: What was learned.
        text: One line about it.
    """

    original: Tensor
    patched: Tensor
    controller: TrainedController
    text: str


def train_controller(
    original: Any,
    patched: Any,
    inputs: Mapping[str, Any],
    settings: "ControllerTrainingSettings",
    parameters: TrainingParameters,
    found: CheckpointPlace,
    sampler: tuple[str, str],
) -> TrainedResult:
    """Train a controller.

    Args:
        original: ComfyUI's ``ModelPatcher`` without students.
        patched: One with students; see ``students_of``.
        inputs: ``positive``, ``negative``, ``latent`` and ``vae``.
        settings: Of the node.
        parameters: Weights, schedule, optimiser.
        found: Where the training is kept.
        sampler: Names of sampler and scheduler.

    Raises:
        ValueError: No student is ready, the latent is empty, or the folder cannot be written.
    """
    students = students_of(patched)
    ready = students.ready()
    check_writable(found.folder)
    place(students.bank, original.load_device)
    bar = Progress()
    comfy_sampler = ComfySampler(
        original,
        inputs["positive"],
        inputs["negative"],
        inputs["latent"],
        layers=students.bank.layers,
        settings=SamplerSettings(settings.steps, settings.cfg, *sampler, settings.denoise),
        key=TTR,
        decode=inputs["vae"].decode,
        decode_rollouts=needs_images(parameters),
        per_step=settings.sigma_aware_training,
        on_step=bar.step,
    )
    work = _Work(comfy_sampler, students, settings, parameters, found)
    work.start(torch.tensor([layer in set(ready) for layer in students.bank.layers]))
    bar.begin(work.diffusion_steps())
    sinks = sink_maker(parameters, "controller", found.folder)
    found.folder.mkdir(parents=True, exist_ok=True)
    work.trainer.sinks = (JsonlSink(found.folder / METRICS), *(sinks() if sinks is not None else ()))
    try:
        work.run(bar)
    finally:
        work.save()
        for sink in work.trainer.sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                close()
    return work.result(bar)


def students_of(patched: Any) -> Students:
    """Return the students that are installed on a model.

    Raises:
        ValueError: There are none.
    """
    handler = installed(patched).get(TTR)
    if isinstance(handler, DistillHandler):
        session = handler.session
        session.refresh()
        return Students(session.plan.model, session.bank, session.readiness, session.plan.path, session.changed)
    if isinstance(handler, ServingHandler):
        return handler.students
    raise ValueError("model_ttr has no students; link the model output of Flux2TTRTrainer to it")


class Progress:
    """The bar of the node, and the host's stop button."""

    def __init__(self) -> None:
        from comfy import model_management, utils

        self._bar = utils.ProgressBar(1)
        self._check: Callable[[], None] = model_management.throw_exception_if_processing_interrupted
        self._done = self._total = 0

    def begin(self, total: int) -> None:
        """Expect so many diffusion steps in all."""
        self._total = max(total, self._done + 1)

    def step(self) -> None:
        """Count a diffusion step; raises the host's interrupt."""
        self._done += 1
        self._check()
        self._bar.update_absolute(min(self._done, self._total), self._total or None)

    def finish(self) -> None:
        """Everything is done, though it may have been less than expected."""
        self._total = self._done

    def stopped(self) -> bool:
        """Raise the host's interrupt, or answer False."""
        self._check()
        return False

    def show(self, teacher: Tensor, student: Tensor) -> None:
        """Show two images ``[3, H, W]`` in [0, 1] side by side."""
        from PIL import Image

        pair = torch.cat([teacher, student], dim=2).mul(255).round().to(torch.uint8)
        picture = Image.fromarray(pair.movedim(0, -1).contiguous().numpy())
        self._bar.update_absolute(min(self._done, self._total), self._total, ("JPEG", picture, 512))


class _Work:
    """One training in the node.

    Args:
        sampler: Makes images.
        students: Who may answer.
        settings: Of the node.
        parameters: Weights, schedule, optimiser.
        found: Where the training is kept.
    """

    def __init__(
        self,
        sampler: ComfySampler,
        students: Students,
        settings: "ControllerTrainingSettings",
        parameters: TrainingParameters,
        found: CheckpointPlace,
    ) -> None:
        self.sampler = sampler
        self.students = students
        self.settings = settings
        self.parameters = parameters
        self.found = found
        self.trainer: ControllerTrainer
        self.backend = FiniteBackend(StudentBackend(students.bank, mixed_precision=True))

    def start(self, eligible: Tensor) -> None:
        """Make the trainer, and go on with the training that is on disk, if there is one.

        Args:
            eligible: ``[L]`` bool, layers whose students are ready.
        """
        # A host runs nodes in inference mode: an optimiser whose state was loaded there could never step again.
        with training_mode():
            saved = load_training(self.found, self.students.model.fingerprint)
            policy_config = PolicyConfig(**saved["manifest"]["policy"]) if saved else PolicyConfig()  # type: ignore[arg-type]
            policy = RoutingPolicy(len(self.students.bank.layers), policy_config, seed=self.settings.seed % 2**32)
            self.trainer = ControllerTrainer(
                self.sampler,
                self.backend,
                policy,
                controller_config(self.parameters, self.settings.rollouts),
                seed=self.settings.seed,
                eligible=eligible,
                objective=quality_objective(self.parameters),
            )
            if saved is not None:
                self.trainer.load_state_dict(saved)
        self._first = self.trainer.updates

    def diffusion_steps(self) -> int:
        """How many diffusion steps the training will take, about."""
        per_image = max(1, int(self.settings.steps * self.settings.denoise))
        updates, entries = self._updates(), len(self.sampler.entries)
        compared = min(_COMPARED, entries)
        comparisons = 4 + updates // self.trainer.config.validate_every
        images = updates * (self.settings.rollouts + 1) + comparisons * compared + 2 * entries
        return images * per_image

    def run(self, bar: Progress) -> None:
        """Make the updates."""
        trainer, entries = self.trainer, self.sampler.entries
        compared = entries[:_COMPARED]
        if not trainer.best.weights:
            trainer.prepare(compared, [self.settings.seed + index for index in range(len(compared))])
            steps = len(trainer.contexts)
            # The first steps matter most: a ranking that needs no measurement, and is hard to beat.
            first = torch.linspace(1.0, 0.0, steps).unsqueeze(1).repeat(1, len(self.sampler.layers))
            trainer.initialise_from_probe(first)
        for number in range(self._updates()):
            trainer.config = replace(trainer.config, temperature=self._temperature(number))
            entry = entries[number % len(entries)]
            row = trainer.step([entry], [self._seed(number)], should_stop=bar.stopped)
            if row is None:
                return
            if (number + 1) % SAVE_EVERY == 0:
                self.save()
            self._show(bar, entry, self._seed(number))
        trainer.validate()

    def save(self) -> None:
        """Save the training; a disk that refuses costs the files, not the controller on the link."""
        try:
            save_training(self.found, self.trainer.state_dict(), self.students.model.fingerprint)
        except OSError as error:
            logger.warning("the controller could not be saved to %s: %s", self.found.folder, error.strerror or error)

    def result(self, bar: Progress) -> TrainedResult:
        """Sample every entry once more, exactly and with what was learned."""
        controller = self._controller()
        entries = self.sampler.entries
        seeds = [self.settings.seed + index for index in range(len(entries))]
        exact = self.trainer.judge.teacher.get(entries, seeds)
        made = self.sampler.sample(entries, seeds, self._router(controller))
        teacher, student = self.sampler.decoded(exact.latent), self.sampler.decoded(made.latent)
        bar.finish()
        bar.show(teacher[0], student[0])
        text = (
            f"{self.trainer.updates} updates, error {self.trainer.best.error:.4g} at "
            f"{1 - self.trainer.config.target_full:.0%} of the calls answered by students"
        )
        return TrainedResult(teacher.movedim(1, -1), student.movedim(1, -1), controller, text)

    def _controller(self) -> TrainedController:
        policy = self.trainer.best_policy() if self.trainer.best.weights else self.trainer.policy
        return TrainedController(
            policy, self.students.bank.layers, self.students.model.fingerprint, str(self.found.folder)
        )

    def _router(self, controller: TrainedController) -> AttentionRouter:
        return AttentionRouter([Route(self.backend, (routing_guard(controller, self.students.ready()),))])

    def _show(self, bar: Progress, entry: str, seed: int) -> None:
        """Show the teacher's image of an update beside the one that the policy makes of it now."""
        exact = self.trainer.judge.teacher.get([entry], [seed])
        student = self.sampler.last_latent
        if student is not None:
            pair = self.sampler.decoded(torch.cat([exact.latent, student]))
            bar.show(pair[0], pair[1])

    def _updates(self) -> int:
        return self.settings.training_iterations * len(self.sampler.entries)

    def _seed(self, number: int) -> int:
        """Noise of an update: another one in every update, also after a restart."""
        return (self.settings.seed + self._first + number) % 2**64

    def _temperature(self, number: int) -> float:
        begin, end = self.parameters.gumbel_temperature_start, self.parameters.gumbel_temperature_end
        return begin + (end - begin) * number / max(1, self._updates() - 1)


def controller_config(parameters: TrainingParameters, rollouts: int) -> ControllerConfig:
    """Make the settings of learning."""
    return ControllerConfig(
        target_full=min(0.99, max(0.01, 1.0 - parameters.target_ttr_ratio)),
        rollouts=rollouts,
        learning_rate=parameters.learning_rate,
        entropy_weight=parameters.lambda_entropy,
        grad_clip_norm=parameters.grad_clip_norm or 1e9,
        temperature=parameters.gumbel_temperature_start,
        reward=RewardConfig(lambda_eff=parameters.lambda_eff),
    )
