"""What training keeps of one layer."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from attn_dispatch import LayerKey, StepContext
from torch import Tensor

from ttr_distill.metrics import MetricValue
from ttr_distill.seeding import stream
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.key_draw import KeyDraw
from ttr_distill.student.readiness import LayerReadiness
from ttr_distill.training.loss import DistillLoss
from ttr_distill.training.memory import MemoryLadder
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.state import integer, load_optimizer, optimizer_tensors
from ttr_distill.training.update import UpdateConfig, UpdateResult, make_optimizer, measure_heldout, update_student

COUNTERS = ("updates", "skipped", "refused", "held_back")
_STREAMS = ("queries", "replay", "keys")
_WARM_UP = 10

LayerState = tuple[dict[str, Tensor], dict[str, int]]
"""Tensors and counters of a layer's training; see ``LayerTraining.restore``."""


@dataclass(eq=False)
class LayerTraining:
    """Loss, optimiser, random streams and counters of a layer.

    Attributes:
        layer: Which layer.
        student: Serves, and is measured and saved.
        learner: Takes the optimiser's steps: the student itself, or its twin when the student is their average.
        loss: With its learned log-variances.
        optimizer: Of the learner and the loss.
        config: How the learner is updated.
        generators: The layer's own streams, so that what it learns does not depend on which others learn beside it.
        ladder: What the layer gave up for memory in this run.
        updates: Steps taken.
        skipped: Steps not taken because a number was not finite.
        refused: Calls not captured because a number was not finite.
        held_back: Calls of held-out diffusion steps: measured, never trained on.
        results: Steps of the current run.
        heldout: ``(cosine, relative_l2)`` measured in the current run.
        step: Diffusion step of the sample trained or measured on last, if the host told.
    """

    layer: LayerKey
    student: StudentAttention
    learner: StudentAttention
    loss: DistillLoss
    optimizer: torch.optim.AdamW
    config: UpdateConfig
    generators: dict[str, torch.Generator]
    ladder: MemoryLadder = field(default_factory=MemoryLadder)
    updates: int = 0
    skipped: int = 0
    refused: int = 0
    held_back: int = 0
    results: list[UpdateResult] = field(default_factory=list)
    heldout: list[tuple[float, float]] = field(default_factory=list)
    step: StepContext | None = None

    @classmethod
    def start(
        cls, layer: LayerKey, student: StudentAttention, config: UpdateConfig, *, seed: int = 0, worker: int = 0
    ) -> "LayerTraining":
        """Begin training a student; call it inside ``training_mode``.

        Args:
            layer: Which layer.
            student: Trained in place.
            config: How.
            seed: Which queries and samples are drawn.
            worker: Which of several processes that learn from different images; each draws for itself.

        Raises:
            ValueError: The student's parameters were made in inference mode.
        """
        frozen = [name for name, parameter in student.named_parameters() if parameter.is_inference()]
        if frozen:
            raise ValueError(
                f"{frozen[0]} of layer {layer} was made in inference mode and cannot be trained; "
                "make the bank with StudentBank.for_layers"
            )
        learner = deepcopy(student) if config.average_decay > 0.0 else student
        loss = DistillLoss(config.huber_beta).to(next(student.parameters()).device)
        own = (worker,) if worker else ()
        generators = {name: stream(seed, name, layer, *own) for name in _STREAMS}
        return cls(layer, student, learner, loss, make_optimizer(learner, loss, config), config, generators)

    def start_run(self) -> None:
        """Forget what belongs to the run before."""
        self.ladder = MemoryLadder()
        self.step = None
        self.results.clear()
        self.heldout.clear()

    def measure(self, sample: ReplaySample) -> tuple[float, float]:
        """Measure the student on a sample's held-out queries; see ``measure_heldout``."""
        distance = measure_heldout(self.student, sample)
        self.heldout.append(distance)
        self.step = sample.step
        return distance

    def update(self, sample: ReplaySample) -> None:
        """Take one step on a sample; call it inside ``training_mode``.

        Args:
            sample: In float32 on the student's device, all rows.
        """
        rows = self.ladder.rows(sample.k.shape[0], self.generators["replay"])
        if rows != slice(None):
            sample = sample.moved(sample.k.device, rows)
        count = self.config.key_count
        with self.ladder.fewer_landmarks(self.learner):
            result = update_student(
                self.learner,
                self.loss,
                self.optimizer,
                sample,
                self.config,
                rate=self.config.rate(self.updates),
                query_chunk=self.ladder.query_chunk,
                key_draw=KeyDraw(count, self.generators["keys"]) if count else None,
            )
        self.results.append(result)
        self.step = sample.step
        self.updates += not result.skipped
        self.skipped += result.skipped
        if self.learner is not self.student and not result.skipped:
            self._average()

    def state(self) -> LayerState:
        """Return ``tensors`` and ``COUNTERS`` as ``restore`` takes them, on the CPU."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors().items()}
        return tensors, {name: getattr(self, name) for name in COUNTERS}

    def shared_tensors(self) -> list[Tensor]:
        """Return weights, log-variances and moments themselves, always in one order and number."""
        learned = [*self.student.parameters(), *self.loss.parameters()]
        if self.learner is not self.student:
            learned += self.learner.parameters()
        moments = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    # As the optimiser begins it at the first step.
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state.update(step=step, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                moments += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
        return [*learned, *moments]

    def tensors(self) -> dict[str, Tensor]:
        """Return log-variances, optimiser moments, random streams and the learner's weights by name."""
        named = {f"loss.{name}": value for name, value in self.loss.state_dict().items()}
        named |= {f"adam.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        named |= {f"rng.{name}": generator.get_state() for name, generator in self.generators.items()}
        if self.learner is not self.student:
            named |= {f"live.{name}": value for name, value in self.learner.state_dict().items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, object]) -> None:
        """Take over what ``tensors`` gave, and the ``COUNTERS``; learning rates stay.

        Raises:
            ValueError: A name or shape does not fit.
        """
        parts: dict[str, dict[str, Tensor]] = {"loss": {}, "adam": {}, "rng": {}, "live": {}}
        for name, tensor in tensors.items():
            part, _, entry = name.partition(".")
            if part not in parts:
                raise ValueError(f"the state of layer {self.layer} has an unknown tensor {name!r}")
            parts[part][entry] = tensor
        if set(parts["loss"]) != set(self.loss.state_dict()):
            raise ValueError(f"the loss of layer {self.layer} has {sorted(parts['loss'])}")
        self.loss.load_state_dict(parts["loss"])
        load_optimizer(self.optimizer, parts["adam"])
        for name, state in parts["rng"].items():
            if name not in self.generators:
                raise ValueError(f"the state of layer {self.layer} has an unknown random stream {name!r}")
            self.generators[name].set_state(state.cpu())
        if self.learner is not self.student:
            # A state saved without averages: the average begins at the weights saved.
            self.learner.load_state_dict(parts["live"] or self.student.state_dict())
        elif parts["live"]:
            self.student.load_state_dict(parts["live"])
        for name in COUNTERS:
            setattr(self, name, integer({name: 0, **counters}, name))

    def row(self, judged: LayerReadiness) -> dict[str, MetricValue]:
        """Return the metrics of the current run; at least one held-out measurement was made in it."""
        count = len(self.heldout)
        row: dict[str, MetricValue] = {
            "kind": "distill",
            "layer": str(self.layer),
            **{name: getattr(self, name) for name in COUNTERS},
            "heldout_cosine": sum(pair[0] for pair in self.heldout) / count,
            "heldout_relative_l2": sum(pair[1] for pair in self.heldout) / count,
            "ema_cosine": judged.ema_cosine,
            "ema_relative_l2": judged.ema_relative_l2,
            "level": judged.level,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "sigma": None if self.step is None else self.step.sigma,
            "cfg_scale": None if self.step is None else self.step.cfg_scale,
            "log_var_huber": float(self.loss.log_var_huber.detach()),
            "log_var_cosine": float(self.loss.log_var_cosine.detach()),
        }
        alpha = dict(self.student.named_parameters()).get("alpha")
        if alpha is not None:
            row["alpha_sigmoid"] = float(alpha.detach().sigmoid())
        for name in ("loss", "huber", "cosine", "mse", "gradient_norm"):
            values = [getattr(result, name) for result in self.results if not result.skipped]
            row[name] = sum(values) / len(values) if values else None
        return row

    def _average(self) -> None:
        # A short memory at first: the average must not remember the initial weights for long.
        decay = min(self.config.average_decay, self.updates / (self.updates + _WARM_UP))
        with torch.no_grad():
            for mean, weight in zip(self.student.parameters(), self.learner.parameters(), strict=True):
                mean.lerp_(weight, 1.0 - decay)
