"""One distillation session: the students of a checkpoint while they learn, and what is kept of them on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from attn_dispatch import LayerKey

from ttr_distill.adapters.comfyui_model import ComfyModel
from ttr_distill.checkpoint import CheckpointError, load_checkpoint
from ttr_distill.grad import training_mode
from ttr_distill.metrics import JsonlSink, MetricSink
from ttr_distill.saved_students import load_students, save_students
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import StudentConfig
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.distiller import DistillConfig, Distiller

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""File of metric rows in a checkpoint's folder."""

_TAIL = 1 << 16

SinkMaker = Callable[[], Sequence[MetricSink]]


@dataclass(frozen=True)
class SessionPlan:
    """What is trained, how, and where it is kept; equal plans share a session.

    Attributes:
        path: The checkpoint's folder.
        model: The teacher.
        layers: Layers to train.
        student: Which student.
        distill: How it is trained; ``maximum_updates`` is set by each handler.
        readiness: When a student may serve.
        seed: Of every random draw.
        device: Where the teacher runs.
    """

    path: Path
    model: ComfyModel
    layers: tuple[LayerKey, ...]
    student: StudentConfig
    distill: DistillConfig
    readiness: ReadinessConfig
    seed: int = 0
    device: str = "cpu"


class DistillSession:
    """Students of one checkpoint while they learn.

    Args:
        plan: What is trained.
        sinks: Makes further sinks for the metrics of a run, which are closed after it.
    """

    def __init__(self, plan: SessionPlan, sinks: SinkMaker | None = None) -> None:
        self.plan = plan
        self.sinks = sinks
        self.problems: tuple[str, ...] = ()
        self.changed: tuple[str, ...] = ()
        self._distiller: Distiller | None = None
        self._stamp: bytes | None = None
        self._open: list[MetricSink] = []

    @property
    def distiller(self) -> Distiller:
        """The training; ``refresh`` was called before."""
        if self._distiller is None:
            self.refresh()
        assert self._distiller is not None
        return self._distiller

    @property
    def bank(self) -> StudentBank:
        """The students."""
        return self.distiller.bank

    @property
    def readiness(self) -> ReadinessTracker:
        """Who is ready."""
        return self.distiller.readiness

    @property
    def loss(self) -> float | None:
        """Mean loss of the latest run with updates, also of an earlier session; ``None`` before the first."""
        rows = list(self._distiller.metrics) if self._distiller is not None else []
        return mean_loss(rows) if rows else mean_loss(read_metrics(self.plan.path / METRICS))

    def refresh(self) -> None:
        """Load the checkpoint where it is newer than what is here.

        Raises:
            CheckpointError: It is damaged, of another model, or of other students.
        """
        stamp = checkpoint_stamp(self.plan.path)
        if self._distiller is not None and stamp == self._stamp:
            return
        plan = self.plan
        with training_mode():
            self._distiller = self._fresh() if stamp is None else self._loaded()
            self._distiller.bank.to(plan.device)
        self._stamp = stamp

    def begin_run(self, updates: int) -> None:
        """Start a run that makes at most so many updates."""
        self.refresh()
        self.problems = ()
        distiller = self.distiller
        distiller.config = replace(distiller.config, maximum_updates=distiller.updates + updates)
        try:
            self._open = [JsonlSink(self.plan.path / METRICS), *(self.sinks() if self.sinks is not None else ())]
        except OSError as error:
            self._note(f"metrics cannot be written to {self.plan.path}: {error.strerror or error}")
        distiller.sinks = tuple(self._open)
        distiller.begin_run()

    def end_run(self, before: int) -> None:
        """End a run: save if anything was learned, and note what went wrong.

        Args:
            before: Updates when the run began.
        """
        distiller = self.distiller
        try:
            distiller.end_run()
            if distiller.updates > before:
                self.save()
        finally:
            for sink in self._open:
                close = getattr(sink, "close", None)
                if close is not None:
                    close()
            self._open = []
            distiller.sinks = ()
            try:
                distiller.raise_pending()
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                OSError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                self._note(f"training stopped: {error}")

    def save(self) -> None:
        """Save students and training; a disk that refuses is noted, and the students stay in memory."""
        distiller, plan = self.distiller, self.plan
        try:
            save_students(
                plan.path,
                distiller.bank,
                distiller.readiness,
                distiller,
                fingerprint=plan.model.fingerprint,
                include_replay=False,
            )
        except OSError as error:
            self._note(f"the students could not be saved to {plan.path}: {error.strerror or error}")
        else:
            self._stamp = checkpoint_stamp(plan.path)

    def release(self) -> None:
        """Give up the memory; the next use loads the checkpoint again."""
        self._distiller = None
        self._stamp = None

    def progress(self) -> str:
        """How far training is, in a few words."""
        ready = sum(self.readiness.ready(layer) for layer in self.plan.layers)
        return f"{self.distiller.updates} updates, {ready} of {len(self.plan.layers)} layers ready"

    def summary(self) -> str:
        """One line for a user: updates, ready layers, loss, and what went wrong."""
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        return "\n".join([f"{self.progress()}{loss}", *self.changed, *self.problems])

    def _note(self, problem: str) -> None:
        self.problems = (*self.problems, problem)
        logger.warning("%s", problem)

    def _fresh(self) -> Distiller:
        plan = self.plan
        bank = StudentBank.for_layers(plan.student, plan.layers, plan.model.heads, plan.model.width, seed=plan.seed)
        return Distiller(bank, ReadinessTracker(plan.readiness), plan.distill, seed=plan.seed, layers=plan.layers)

    def _loaded(self) -> Distiller:
        plan = self.plan
        saved = load_students(
            plan.path,
            fingerprint=plan.model.fingerprint,
            config=plan.student,
            readiness=plan.readiness,
            training=True,
        )
        self.changed = saved.changed
        bank = with_layers(saved.bank, plan.layers, seed=plan.seed)
        distiller = Distiller(bank, saved.readiness, plan.distill, seed=plan.seed, layers=plan.layers)
        if saved.training is not None:
            bank.to(plan.device)
            distiller.load_state_dict(saved.training)
        return distiller


def with_layers(bank: StudentBank, layers: Iterable[LayerKey], *, seed: int) -> StudentBank:
    """Return a bank that also has these layers, with fresh students where there was none."""
    missing = [layer for layer in layers if layer not in bank]
    if not missing:
        return bank
    fresh = StudentBank.for_layers(bank.config, missing, bank.heads, bank.width, seed=seed)
    return StudentBank(
        bank.config, {layer: (bank if layer in bank else fresh)[layer] for layer in {*bank.layers, *missing}}
    )


def saved_student(path: Path) -> StudentConfig | None:
    """Settings of the students that a checkpoint holds; ``None`` if there is none.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds no students.
    """
    if checkpoint_stamp(path) is None:
        return None
    student = load_checkpoint(path, groups=()).manifest.get("student")
    if not isinstance(student, dict):
        raise CheckpointError(f"checkpoint {path} holds no students")
    try:
        return StudentConfig.from_dict(student)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def checkpoint_stamp(path: Path) -> bytes | None:
    """Return what changes with every save of a checkpoint; ``None`` if there is none."""
    try:
        return (path / "LATEST").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the latest rows of a metrics file; a torn line is passed over."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - _TAIL))
            lines = handle.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def mean_loss(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean loss over the layers of the latest run that has one."""
    found = [row for row in rows if isinstance(row.get("loss"), int | float)]
    if not found:
        return None
    latest = max(int(row.get("run", 0)) for row in found)
    losses = [float(row["loss"]) for row in found if int(row.get("run", 0)) == latest]
    return sum(losses) / len(losses)


def place(bank: StudentBank, device: torch.device | str) -> None:
    """Move students to a device, where they are not there yet."""
    if next(bank.parameters()).device != torch.device(device):
        bank.to(device)
