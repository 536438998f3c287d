"""Where students are kept, and students that serve."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from attn_dispatch import AttentionCall, AttentionRouter, Backend, FiniteBackend, Guard, LayerKey, Route
from attn_dispatch.adapters.comfyui import install
from torch import Tensor
from ttr_distill import ReadinessConfig, ReadinessTracker, ReadyGuard, StudentBackend, StudentBank, StudentConfig
from ttr_distill.adapters.comfyui_model import ComfyModel, describe_model
from ttr_distill.adapters.comfyui_session import METRICS, mean_loss, place, read_metrics
from ttr_distill.checkpoint import CheckpointError, load_checkpoint
from ttr_distill.legacy import LegacyStudents, read_legacy_students
from ttr_distill.saved_students import load_students

from ..measured import Measured
from ..paths import file_fingerprint, model_file

TTR = "ttr"
"""Key under which students are installed on a model."""

OLD_SUFFIXES = frozenset({".pt", ".pth", ".ckpt"})
"""Endings of checkpoint files of older versions."""


@dataclass(frozen=True)
class CheckpointPlace:
    """Where a checkpoint is.

    Attributes:
        folder: Of the checkpoint; need not exist.
        old: File of an older version under this name, where nothing newer is in the folder; ``None`` without one.
    """

    folder: Path
    old: Path | None = None

    @classmethod
    def named(cls, text: str, default: str = "") -> "CheckpointPlace":
        """Find what a user means by a path.

        Raises:
            ValueError: Nothing is named, or the path leads out of the folder of this pack.
        """
        path = model_file(text, default)
        if path.suffix.lower() not in OLD_SUFFIXES or path.is_dir():
            return cls(path)
        folder = path.with_suffix("")
        return cls(folder, path if path.is_file() and not (folder / "LATEST").exists() else None)

    def fingerprint(self) -> str:
        """What changes when one of the files does."""
        return ";".join(file_fingerprint(path) for path in (self.folder, self.old) if path is not None)

    def require(self) -> "CheckpointPlace":
        """Return this place if something is there.

        Raises:
            FileNotFoundError: Neither form of the checkpoint exists.
        """
        if self.old is None and not (self.folder / "LATEST").exists():
            raise FileNotFoundError(
                f"there is no checkpoint at {self.folder}; train one with Flux2TTRTrainer, or correct the path"
            )
        return self


L2_TO_COSINE = 8.0
"""How much larger a squared relative L2 distance may be than the cosine limit; see ``ReadinessConfig``."""


def check_path(text: str | None, default: str = "") -> bool | str:
    """Answer the host before a run: True, or what is wrong with a path; linked values are not known yet."""
    if text is None or not (text.strip() or default):
        return True
    try:
        CheckpointPlace.named(text, default)
    except ValueError as error:
        return str(error)
    return True


def fingerprints(*texts: object, default: str = "") -> object:
    """What changes when one of these checkpoints does; a path that comes by a link is always read.

    Args:
        *texts: Paths as a user wrote them; ``None`` = linked.
        default: What an empty first path means.
    """
    if any(text is None for text in texts):
        return float("nan")
    found = []
    for number, text in enumerate(texts):
        meant = str(text).strip() or (default if number == 0 else "")
        try:
            found.append(CheckpointPlace.named(meant).fingerprint() if meant else "")
        except ValueError:
            found.append("unreadable")
    return "|".join(found)


@dataclass(frozen=True)
class Students:
    """Trained students of a model.

    Attributes:
        model: The teacher.
        bank: The students.
        readiness: Who is ready.
        source: Where they come from, for messages.
        changed: One sentence per setting that differs from the checkpoint.
    """

    model: ComfyModel
    bank: StudentBank
    readiness: ReadinessTracker
    source: Path
    changed: tuple[str, ...] = ()

    def ready(self, layers: Sequence[LayerKey] | None = None) -> tuple[LayerKey, ...]:
        """Return the layers whose students may serve.

        Args:
            layers: Of these; ``None`` = all.

        Raises:
            ValueError: There is none; the message says how far they are.
        """
        wanted = self.bank.layers if layers is None else layers
        found = tuple(layer for layer in wanted if layer in self.bank and self.readiness.ready(layer))
        if found:
            return found
        measured = [self.readiness[layer].ema_cosine for layer in wanted]
        best = min((value for value in measured if value is not None), default=None)
        far = "none was measured" if best is None else f"the closest layer is at a distance of {best:.3g}"
        hint = f"; {'; '.join(self.changed)}" if self.changed else ""
        raise ValueError(
            f"no student of {self.source} is ready: {far}, {self.readiness.config.threshold:g} is needed{hint}; "
            "train longer with Flux2TTRTrainer, or choose another student"
        )

    def loss(self) -> float:
        """Mean loss of the latest run that trained them; 0 if it is not known."""
        return mean_loss(read_metrics(self.source / METRICS)) or 0.0


def load_trained(
    patcher: Any,
    found: CheckpointPlace,
    *,
    readiness: ReadinessConfig | None = None,
    config: StudentConfig | None = None,
) -> Students:
    """Load students for the model at hand.

    Args:
        patcher: ComfyUI's ``ModelPatcher``.
        found: The checkpoint.
        readiness: Thresholds.
        config: Settings of the students; ``None`` = the checkpoint's.

    Raises:
        FileNotFoundError: There is no checkpoint.
        CheckpointError: It is damaged, or of another model.
        ValueError: The model's layers have no names.
    """
    found.require()
    model = describe_model(patcher)
    if found.old is not None:
        old = load_old(found.old, model, readiness)
        return Students(model, old.bank, old.readiness, found.old)
    saved = load_students(found.folder, fingerprint=model.fingerprint, config=config, readiness=readiness)
    return Students(model, saved.bank, saved.readiness, found.folder, saved.changed)


def serving_thresholds(found: CheckpointPlace, threshold: float) -> ReadinessConfig | None:
    """Return the thresholds of a node that does not train; ``None`` = the defaults.

    Args:
        found: The checkpoint.
        threshold: What the user asks for; 0 = what lets those layers serve that the checkpoint calls ready.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    default = ReadinessConfig()
    if threshold > 0.0:
        return ReadinessConfig(threshold, max(threshold, default.partial_threshold), minimum_updates=1)
    if found.old is not None:
        return None
    saved = load_checkpoint(found.folder, groups=()).manifest.get("readiness")
    layers = saved.values() if isinstance(saved, dict) else ()
    ready = [one for one in layers if isinstance(one, dict) and one.get("level") == "ready"]
    # The least threshold that admits the cosine distance and the squared relative L2 distance of each of them.
    needed = [max(float(one["ema_cosine"]), float(one["ema_relative_l2"]) ** 2 / L2_TO_COSINE) for one in ready]
    least = max([default.threshold, *needed])
    return ReadinessConfig(least, max(least, default.partial_threshold), minimum_updates=1)


def load_old(file: Path, model: ComfyModel, readiness: ReadinessConfig | None) -> LegacyStudents:
    """Read a checkpoint file of an older version.

    Raises:
        CheckpointError: It is damaged, or belongs to another model.
    """
    old = read_legacy_students(file, fingerprint=model.fingerprint, readiness=readiness)
    bank = old.bank
    strangers = [str(layer) for layer in bank.layers if layer not in model.layers]
    if strangers or (bank.heads, bank.width) != (model.heads, model.width):
        raise CheckpointError(
            f"checkpoint {file} belongs to another model: it has {bank.heads} heads of width {bank.width} and layers "
            f"{bank.layers[0]} to {bank.layers[-1]}; {model.family} has {model.heads} of {model.width} and "
            f"{model.layers[0]} to {model.layers[-1]}"
        )
    return old


class FullPrecision:
    """A ``Backend`` that answers in float32, whatever the dtype of the call.

    Args:
        backend: Who answers.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        """Name of the backend that answers."""
        return self.backend.name

    def refuses(self, call: AttentionCall) -> str | None:
        """Say why it cannot answer; ``None`` if it can."""
        return self.backend.refuses(call)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with ``[B, H, Nq, Dv]`` in the dtype of the call."""
        wide = replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())
        return self.backend(wide).to(call.q.dtype)


class Placed:
    """A guard that forbids nothing and moves students to the device of the model when a run begins.

    Args:
        bank: The students.
        device: Where the model runs.
    """

    def __init__(self, bank: StudentBank, device: torch.device | str) -> None:
        self.bank = bank
        self.device = device

    def __call__(self, call: AttentionCall) -> str | None:
        """Allow every call."""
        return None

    def begin_run(self) -> None:
        """Move them."""
        place(self.bank, self.device)

    def end_run(self) -> None:
        """They stay until the next run, or until the model is forgotten."""


class Chosen:
    """A guard that allows some layers.

    Args:
        layers: Those.
    """

    def __init__(self, layers: Sequence[LayerKey]) -> None:
        self.layers = frozenset(layers)

    def __call__(self, call: AttentionCall) -> str | None:
        """Return why the call's layer is not allowed, or ``None``."""
        return None if call.layer in self.layers else "no student is wanted in this layer"


def serve(
    patcher: Any,
    students: Students,
    layers: Sequence[LayerKey],
    guards: Sequence[Guard] = (),
    *,
    mixed_precision: bool = True,
) -> Any:
    """Make a clone of a model in which ready students answer.

    Args:
        patcher: ComfyUI's ``ModelPatcher``.
        students: Who answers.
        layers: In these layers.
        guards: What else must allow a call.
        mixed_precision: Whether students answer calls of half precision in it, and multiply their feature networks in
            bfloat16 where the device does that faster.
    """
    backend: Backend = StudentBackend(students.bank, mixed_precision=mixed_precision)
    if not mixed_precision:
        backend = FullPrecision(backend)
    allowed: tuple[Guard, ...] = (
        Chosen(layers),
        Placed(students.bank, patcher.load_device),
        ReadyGuard(students.readiness),
        *guards,
    )
    handler = ServingHandler(AttentionRouter([Route(FiniteBackend(backend), allowed)]), students)
    return install(patcher, handler, key=TTR)


class ServingHandler(Measured):
    """``Measured`` that knows which students serve.

    Args:
        router: Who answers.
        students: Who serves.
    """

    def __init__(self, router: AttentionRouter, students: Students) -> None:
        super().__init__(router)
        self.students = students

    def __deepcopy__(self, memo: dict[int, Any]) -> "ServingHandler":
        return self
