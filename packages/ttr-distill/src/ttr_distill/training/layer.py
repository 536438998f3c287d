"""What training keeps of one layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from attn_dispatch import LayerKey
from torch import Tensor

from ttr_distill.metrics import MetricValue
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.readiness import LayerReadiness
from ttr_distill.training.loss import DistillLoss
from ttr_distill.training.state import integer, load_optimizer, optimizer_tensors
from ttr_distill.training.update import UpdateConfig, UpdateResult, make_optimizer

COUNTERS = ("updates", "skipped", "refused")


@dataclass(eq=False)
class LayerTraining:
    """Loss, optimiser and counters of a layer.

    Attributes:
        layer: Which layer.
        loss: With its learned log-variances.
        optimizer: Of the student and the loss.
        updates: Steps taken.
        skipped: Steps not taken because a number was not finite.
        refused: Calls not captured because a number was not finite.
        results: Steps of the current run.
        heldout: ``(cosine, relative_l2)`` measured in the current run.
    """

    layer: LayerKey
    loss: DistillLoss
    optimizer: torch.optim.AdamW
    updates: int = 0
    skipped: int = 0
    refused: int = 0
    results: list[UpdateResult] = field(default_factory=list)
    heldout: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def start(cls, layer: LayerKey, student: StudentAttention, config: UpdateConfig) -> "LayerTraining":
        """Begin training a student; call it inside ``training_mode``.

        Raises:
            ValueError: The student's parameters were made in inference mode.
        """
        frozen = [name for name, parameter in student.named_parameters() if parameter.is_inference()]
        if frozen:
            raise ValueError(
                f"{frozen[0]} of layer {layer} was made in inference mode and cannot be trained; "
                "make the bank with StudentBank.for_layers"
            )
        loss = DistillLoss(config.huber_beta).to(next(student.parameters()).device)
        return cls(layer, loss, make_optimizer(student, loss, config))

    def start_run(self) -> None:
        """Forget what belongs to the run before."""
        self.results.clear()
        self.heldout.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return log-variances and optimiser moments by name."""
        named = {f"loss.{name}": value for name, value in self.loss.state_dict().items()}
        return named | {f"adam.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, object]) -> None:
        """Take over what ``tensors`` gave, and the ``COUNTERS``; learning rates stay.

        Raises:
            ValueError: A name or shape does not fit.
        """
        parts: dict[str, dict[str, Tensor]] = {"loss": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, entry = name.partition(".")
            if part not in parts:
                raise ValueError(f"the state of layer {self.layer} has an unknown tensor {name!r}")
            parts[part][entry] = tensor
        if set(parts["loss"]) != set(self.loss.state_dict()):
            raise ValueError(f"the loss of layer {self.layer} has {sorted(parts['loss'])}")
        self.loss.load_state_dict(parts["loss"])
        load_optimizer(self.optimizer, parts["adam"])
        for name in COUNTERS:
            setattr(self, name, integer(counters, name))

    def row(self, judged: LayerReadiness) -> dict[str, MetricValue]:
        """Return the metrics of the current run; at least one held-out measurement was made in it."""
        count = len(self.heldout)
        row: dict[str, MetricValue] = {
            "kind": "distill",
            "layer": str(self.layer),
            "updates": self.updates,
            "skipped": self.skipped,
            "refused": self.refused,
            "heldout_cosine": sum(pair[0] for pair in self.heldout) / count,
            "heldout_relative_l2": sum(pair[1] for pair in self.heldout) / count,
            "ema_cosine": judged.ema_cosine,
            "ema_relative_l2": judged.ema_relative_l2,
            "level": judged.level,
        }
        for name in ("loss", "huber", "cosine", "gradient_norm"):
            values = [getattr(result, name) for result in self.results if not result.skipped]
            row[name] = sum(values) / len(values) if values else None
        return row
